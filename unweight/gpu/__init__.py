"""Unweight on GPUs: Triton kernels that read 12-bit tiles, and what chooses between them."""
