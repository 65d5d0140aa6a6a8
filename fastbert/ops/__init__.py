"""The fused operations: public functions here, specification in ``reference``, choice of implementation in ``backends``."""

from .add_layer_norm import add_layer_norm
from .attention import attention
from .embedding_layer_norm import embedding_layer_norm
from .gelu_layer_norm import gelu_layer_norm
from .int8_linear import int8_linear
from .linear_gelu import linear_gelu
from .mlm_loss import mlm_loss

__all__ = ["add_layer_norm", "attention", "embedding_layer_norm", "gelu_layer_norm", "int8_linear", "linear_gelu", "mlm_loss"]
