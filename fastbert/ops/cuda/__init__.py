"""The CUDA C++ kernels (csrc/cuda) under the names and signatures of ``reference.py``: tensors become pointers here.

Inputs are contiguous CUDA tensors of float32, bfloat16 or float16. Work is queued on torch's current stream of the tensors'
device. Statistics and sums are float32 and the same in every run.
"""

from .extension import DEVICE_TYPE, unavailable_reason
from .layer_norms import add_layer_norm_backward, add_layer_norm_forward, gelu_layer_norm_backward, gelu_layer_norm_forward

OPS = ("add_layer_norm", "gelu_layer_norm")

__all__ = [
    "DEVICE_TYPE",
    "OPS",
    "add_layer_norm_backward",
    "add_layer_norm_forward",
    "gelu_layer_norm_backward",
    "gelu_layer_norm_forward",
    "unavailable_reason",
]
