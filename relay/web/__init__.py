"""HTTP: the REST interface, pages, the console, metrics, and prefixes of other processes."""
