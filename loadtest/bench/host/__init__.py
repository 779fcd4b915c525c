"""The command `python -m loadtest.bench.host`."""
