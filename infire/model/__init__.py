"""Decoder families as one transformer and a table of rows."""
