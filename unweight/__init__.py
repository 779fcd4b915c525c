"""Lossless compression of BF16 weights; knows tensors, not models."""
