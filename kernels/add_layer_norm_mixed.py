"""``add_layer_norm`` with x in half precision beside a float32 residual: the kernels are add_layer_norm.py's."""

from .add_layer_norm import add_layer_norm_mixed_backward, add_layer_norm_mixed_forward

__all__ = ["add_layer_norm_mixed_backward", "add_layer_norm_mixed_forward"]
