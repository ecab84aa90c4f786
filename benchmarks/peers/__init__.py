"""Programs that run in the peers' own environment, each given a port and the address of Redis."""
