"""The command `python -m loadtest.bench.edge`."""
