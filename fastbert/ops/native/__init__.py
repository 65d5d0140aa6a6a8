"""The C++ CPU kernels (csrc/cpu) under the names and signatures of ``reference``: tensors become pointers here.

Inputs are contiguous CPU tensors of float32 or bfloat16 (``backends.py`` refuses others); a block of logits may have a row
stride. Arithmetic, statistics and sums are float32, except that attention and matmuls multiply bfloat16 as it is, and add the
products in float32, with avx512_bf16 and avx512_amx. Results do not depend on the number of threads, which is torch's.

The extension links no OpenMP runtime: it is handed the entry point of the one that torch uses, so the process has one.
FASTBERT_CPU_ISA=baseline|avx2|avx2_vnni|avx512|avx512_vnni|avx512_bf16|avx512_amx forces an instruction set; the default is the
widest that the CPU supports and, for the tiles of AMX, the operating system.
"""

from .attention import attention_backward, attention_forward, attention_of_rows_backward, attention_of_rows_forward
from .embedding_layer_norm import embedding_layer_norm_backward, embedding_layer_norm_forward
from .extension import (
    AVAILABLE,
    DTYPES,
    EXTENSION,
    NAMES,
    NO_DROPOUT,
    WEIGHT_DTYPES,
    instruction_set,
    multiplies,
    set_instruction_set,
    supported_instruction_sets,
    unavailable_reason,
)
from .feed_forward import bias_gelu_backward, feed_forward_backward, linear_gelu_backward, linear_gelu_forward
from .int8_linear import int8_linear_forward, int8_unavailable_reasons
from .layer_norms import add_layer_norm_backward, add_layer_norm_forward, gelu_layer_norm_backward, gelu_layer_norm_forward
from .mlm_loss import mlm_loss_backward, mlm_loss_forward
from .product import matmul, matmul_and_row_sums, matmul_gelu, matmul_gelu_gradient

__all__ = [
    "AVAILABLE",
    "DTYPES",
    "EXTENSION",
    "NAMES",
    "NO_DROPOUT",
    "WEIGHT_DTYPES",
    "add_layer_norm_backward",
    "add_layer_norm_forward",
    "attention_backward",
    "attention_forward",
    "attention_of_rows_backward",
    "attention_of_rows_forward",
    "bias_gelu_backward",
    "embedding_layer_norm_backward",
    "embedding_layer_norm_forward",
    "feed_forward_backward",
    "gelu_layer_norm_backward",
    "gelu_layer_norm_forward",
    "instruction_set",
    "int8_linear_forward",
    "int8_unavailable_reasons",
    "linear_gelu_backward",
    "linear_gelu_forward",
    "matmul",
    "matmul_and_row_sums",
    "matmul_gelu",
    "matmul_gelu_gradient",
    "mlm_loss_backward",
    "mlm_loss_forward",
    "multiplies",
    "set_instruction_set",
    "supported_instruction_sets",
    "unavailable_reason",
]
