"""Triton kernels, one module per op; `orthonorm._library` loads them for CUDA keys still free."""
