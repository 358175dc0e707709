"""GPU kernels for neural networks, in Triton and CUDA C++, as drop-in PyTorch layers."""

from gpunn import functional, models, nn
from gpunn.folding import fold_batch_norm
from gpunn.kernels.launch import Trace, backend, trace
from gpunn.replacement import Replacement, accelerate, restore

__version__ = "0.1.0"

__all__ = [
    "Replacement",
    "Trace",
    "accelerate",
    "backend",
    "fold_batch_norm",
    "functional",
    "models",
    "nn",
    "restore",
    "trace",
]
