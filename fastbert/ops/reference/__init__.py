"""Every fused operation in plain torch: the specification that all backends are tested against.

One function per direction and op, ``<op>_forward`` and ``<op>_backward``; the Triton kernels (``kernels/<op>.py``), the C++ ones
(``native/``) and those of CUDA C++ (``cuda/``) expose the same names and signatures. The forward functions are differentiable, so
autograd through them in float64 is the truth for gradients; the backward functions are the formulas that a kernel has to
implement, and run where no kernel is available.

Shapes: ``total`` is the number of real tokens of a packed batch, ``rows`` any number of rows, ``hidden`` the model width.
Statistics (mean, rstd, lse, row_max, row_sum) are float32, or float64 for float64 inputs.
"""

from .add_layer_norm import (
    add_layer_norm_backward,
    add_layer_norm_forward,
    add_layer_norm_mixed_backward,
    add_layer_norm_mixed_forward,
)
from .attention import (
    attention_backward,
    attention_forward,
    attention_keep,
    attention_of_rows_backward,
    attention_of_rows_forward,
)
from .embedding_layer_norm import (
    embedding_layer_norm_backward,
    embedding_layer_norm_forward,
    embedding_table_gradients,
)
from .encoder_layer import encoder_layer_forward
from .gelu_layer_norm import gelu_layer_norm_backward, gelu_layer_norm_forward
from .int8_linear import INT8_LARGEST, int8_linear_forward, quantize_rows, quantize_weight
from .linear_gelu import bias_gelu_backward, gelu_derivative, linear_gelu_backward, linear_gelu_forward
from .mlm_loss import mlm_loss_backward, mlm_loss_forward
from .philox_dropout import (
    DROPOUT_LEVELS,
    PHILOX_KEY_INCREMENTS,
    PHILOX_MULTIPLIERS,
    dropout,
    dropout_keep,
    dropout_scale,
    dropout_threshold,
    philox_4x32,
    row_keep,
)

__all__ = [
    "DROPOUT_LEVELS",
    "INT8_LARGEST",
    "PHILOX_KEY_INCREMENTS",
    "PHILOX_MULTIPLIERS",
    "add_layer_norm_backward",
    "add_layer_norm_forward",
    "add_layer_norm_mixed_backward",
    "add_layer_norm_mixed_forward",
    "attention_backward",
    "attention_forward",
    "attention_keep",
    "attention_of_rows_backward",
    "attention_of_rows_forward",
    "bias_gelu_backward",
    "dropout",
    "dropout_keep",
    "dropout_scale",
    "dropout_threshold",
    "embedding_layer_norm_backward",
    "embedding_layer_norm_forward",
    "embedding_table_gradients",
    "encoder_layer_forward",
    "gelu_derivative",
    "gelu_layer_norm_backward",
    "gelu_layer_norm_forward",
    "int8_linear_forward",
    "linear_gelu_backward",
    "linear_gelu_forward",
    "mlm_loss_backward",
    "mlm_loss_forward",
    "philox_4x32",
    "quantize_rows",
    "quantize_weight",
    "row_keep",
]
