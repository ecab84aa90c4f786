"""The Phoenix Channels protocol without I/O: frames, payloads, names, and the state of one socket."""
