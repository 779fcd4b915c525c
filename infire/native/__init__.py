"""The engine's runtime on a CPU: numpy and compiled kernels, no torch."""
