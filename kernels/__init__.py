"""Triton kernels, one module per op; `orthonorm._library` loads them for CUDA keys still free.

Every kernel works on a list of matrices through one table of int64 on the device (`tables.py`), so
one launch serves matrices of different shapes. `tiles.py` reads that table, `configs.py` picks tile
shapes. Calls that a kernel does not serve go to the op's definition, by a predicate on dtypes and
shapes.
"""
