"""`python -m loadtest.bench.soak`: a fleet under traffic and faults, and what is left of it."""
