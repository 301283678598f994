"""Runs compiled kernels without a GPU: the PTX that Triton makes of them for sm_80 to sm_120, warp by warp, in numpy.

`program.py` reads PTX, `machine.py` is a multiprocessor (warps, shared memory, barriers, the search for races),
`operands.py`, `arithmetic.py`, `memory.py` and `matrix.py` are the instructions, `launch.py` puts it under Triton's own
launches, `mutations.py` breaks kernels, `grid.py` runs all of them in every way. docs/kernels.md says what is modelled
and what is not.
"""
