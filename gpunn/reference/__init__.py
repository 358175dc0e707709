"""What every operator should compute: NumPy in float64, one file an operator.

Forward and backward are written out by hand from the formula, which is cited. Nothing here knows
PyTorch, Triton or automatic differentiation, so that an error in one of them cannot be shared.
``gpunn check`` and the tests compare the kernels with these, by the rule in ``closeness.py``.
"""
