"""Triton kernels of the loss. A leaf: imports torch and triton alone."""
