"""The CUDA C++ kernels (csrc/cuda) under the names and signatures of ``reference``: tensors become pointers here.

Inputs are contiguous CUDA tensors of float32, bfloat16 or float16. Work is queued on torch's current stream of the tensors'
device. Statistics and sums are float32 and the same in every run.
"""

from .attention import attention_backward, attention_forward, attention_forward_and_bits
from .embedding_layer_norm import embedding_layer_norm_backward, embedding_layer_norm_forward
from .extension import DEVICE_TYPE, unavailable_reason
from .layer_norms import add_layer_norm_backward, add_layer_norm_forward, gelu_layer_norm_backward, gelu_layer_norm_forward
from .mlm_loss import mlm_loss_backward, mlm_loss_forward

OPS = ("embedding_layer_norm", "attention", "add_layer_norm", "gelu_layer_norm", "mlm_loss")

__all__ = [
    "DEVICE_TYPE",
    "OPS",
    "add_layer_norm_backward",
    "add_layer_norm_forward",
    "attention_backward",
    "attention_forward",
    "attention_forward_and_bits",
    "embedding_layer_norm_backward",
    "embedding_layer_norm_forward",
    "gelu_layer_norm_backward",
    "gelu_layer_norm_forward",
    "mlm_loss_backward",
    "mlm_loss_forward",
    "unavailable_reason",
]
