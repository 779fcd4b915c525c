"""What the GPU bench of `unweight` is made of. Imports nothing but torch, triton and unweight."""
