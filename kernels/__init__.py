"""Expensive loss and attention steps, one folder per operation.

Each folder holds `reference.py` (plain PyTorch, the definition), `tiled.py` (linear memory on any
device), `triton.py` (GPU) and, in `__init__.py`, the one public function that chooses among them.
"""
