"""The worker near the caller: text in, text out; keeps nothing that it could not lose."""
