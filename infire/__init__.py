"""The engine: token ids in, token ids out, on a GPU group or CPU; knows no text and no network."""
