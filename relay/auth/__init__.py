"""Authentication and authorization: who a client is, by which token, and what it may do."""
