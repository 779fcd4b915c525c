"""Load on a running fleet, as clients make it, and the benches run by hand."""
