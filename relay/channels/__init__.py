"""Channels: sockets and their joined topics, the fan-out, and the bridge to the broker."""
