"""Transformer Engine's own Python layers with kernels written in PyTorch, on a CPU.

Call `install()` before anything imports megatron-core or Transformer Engine. It needs only the package `transformer-engine` (pure Python,
a megabyte). The compiled extension is replaced by a module with the functions and enumerations recorded in VERSION.json (`record.py`) and
the kernels of `kernels.py` and `fp8.py`. Shapes, types, names, tensors kept for the backward pass, FP8 rounding and scaling, and refused
inputs are therefore those of Transformer Engine and its kernels; speed is not.

Requests to a GPU go to the CPU: in each module of Transformer Engine the name `torch` is a view of torch in which `cuda` is one Hopper GPU
whose memory is the host's (compare `megatron_mm.platform.cpu`).
"""

from support.te.install import install as install
from support.te.install import python_of_transformer_engine as python_of_transformer_engine
