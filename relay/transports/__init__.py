"""Transports: one client's connection as frames in and frames out, from its upgrade request to its end."""
