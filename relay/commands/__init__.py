"""Commands of ``relay`` that have a module of their own."""
