"""Kernels for CPUs in C++: one op a file, with the torch reference of `x.cpp` in `x.py`."""
