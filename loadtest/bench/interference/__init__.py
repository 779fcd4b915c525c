"""The command `python -m loadtest.bench.interference`."""
