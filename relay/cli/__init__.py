"""The command line, ``relay``."""
