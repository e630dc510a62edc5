"""Transformer Engine's own Python layers over kernels written in PyTorch, on a CPU.

`install()` comes before anything imports megatron-core or Transformer Engine. It needs the package `transformer-engine` alone (pure Python,
a megabyte); its compiled extension is replaced by a module whose functions and enumerations are those written down in VERSION.json
(`record.py`), and whose kernels are in `kernels.py` and `fp8.py`. So shapes, types, names, what is kept for the backward pass, FP8 rounding
and scaling, and what kernels refuse are Transformer Engine's and its kernels'; speed is not.

What is asked of a GPU goes to the CPU: in each module of Transformer Engine the name `torch` is a view of torch in which `cuda` is one
Hopper GPU whose memory is this computer's (compare `megatron_mm.platform.cpu`).
"""

from support.te.install import install as install
from support.te.install import python_of_transformer_engine as python_of_transformer_engine
