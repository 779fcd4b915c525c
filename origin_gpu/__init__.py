"""A region: one front, many workers, and the KV passed between them."""
