"""What a delivered frame costs: the relay, a floor in C, and its peers, measured in one run.

``python -m benchmarks`` is the quick form (``make bench``), ``--full`` the long one (``make bench-full``).

| Module | Owns |
|---|---|
| `load` | sockets that count bytes, the publisher, and the check that every frame came once and in order |
| `dialects` | what a client and a publisher say to each kind of server |
| `servers` | the processes: pinned, waited for, ended by their own id; their CPU time and memory |
| `scenarios`, `compression`, `history`, `long_poll` | one small function for each thing that is measured |
| `points` | what the relay is to reach, and whether it does |
| `report`, `charts` | the table, the JSON, the pictures |
"""
