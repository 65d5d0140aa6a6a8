"""Who computes an encoder's hidden states in the inference benchmark: fastbert, and what else is installed.

A contender is made once from a :class:`Subject`, the model with its weights, and then called with padded batches. Peers' packages
are imported when they are needed; where one is not installed or cannot do a dtype here, :class:`NotAvailable` says why. Each is
run as its own documentation says it is fastest, on the threads that torch has. ``steps`` has the peers of training steps.

Left out: Intel's Extension for PyTorch, which is archived, its work merged into torch; Optimum, which runs the engines below.
Those of GPUs are written after their sources and documentation and have not been run on one.
"""

from __future__ import annotations

from . import engines, with_torch
from .engines import NNCF
from .peer import FLOATS, NotAvailable, Package, Peer
from .subject import Batch, Run, Subject
from .with_torch import TOKEN_BUDGET, onednn_float32_matmul, token_budget_groups

__all__ = [
    "FASTBERT", "FLASH_ATTN", "FLOATS", "OURS", "PEERS", "TOKEN_BUDGET", "TORCH", "TRANSFORMERS", "Batch", "NotAvailable",
    "Package", "Peer", "Run", "Subject", "onednn_float32_matmul", "token_budget_groups",
]  # fmt: skip

FASTBERT, TORCH, TRANSFORMERS = Package("fastbert"), Package("torch"), Package("transformers")
FLASH_ATTN = Package("flash_attn", "pip install flash-attn --no-build-isolation")
ONNX = (Package("onnxruntime"), Package("onnx"))
_BOTH = {"cpu": FLOATS, "cuda": FLOATS}
OURS = Peer(
    "fastbert", with_torch.fastbert_model, {"cpu": (*FLOATS, "int8"), "cuda": FLOATS},
    "fastbert.BertModel; int8: fastbert.quantize, weights per channel, activations token by token", (FASTBERT,),
)  # fmt: skip
# Names are those of --peers. Those of torch first, the reference of all figures as the first of them.
PEERS = {
    "transformers": Peer(
        "transformers", with_torch.transformers_sdpa, _BOTH, "BertModel as it comes: attention by torch's SDPA, padding computed",
        (TRANSFORMERS, TORCH),
    ),
    "transformers-eager": Peer(
        "transformers eager", with_torch.transformers_eager, _BOTH, 'BertModel with attn_implementation="eager"',
        (TRANSFORMERS, TORCH),
    ),
    "transformers-compiled": Peer(
        "transformers compiled", with_torch.transformers_compiled, _BOTH, "torch.compile(model, dynamic=False), compiled anew for "
        "each shape", (TRANSFORMERS, TORCH), on_request={"cpu": ("bfloat16",)},
    ),
    "transformers-sorted": Peer(
        "transformers sorted, oneDNN", with_torch.transformers_sorted, {"cpu": FLOATS},
        f"sequences sorted by length, in micro-batches of at most {TOKEN_BUDGET} tokens with padding; float32 matmuls by oneDNN",
        (TRANSFORMERS, TORCH),
    ),
    "transformers-flash": Peer(
        "transformers flash-attention", with_torch.transformers_flash, {"cuda": ("bfloat16",)},
        'BertModel with attn_implementation="flash_attention_2"', (FLASH_ATTN, TRANSFORMERS, TORCH),
    ),
    "transformers-packed": Peer(
        "transformers flash-attention, packed", with_torch.transformers_packed, {"cuda": ("bfloat16",)},
        'the batch\'s real tokens as one row with cu_seq_lens, attn_implementation="flash_attention_2", and back',
        (FLASH_ATTN, TRANSFORMERS, TORCH),
    ),
    "flash-attn-bert": Peer(
        "flash-attn's BERT", with_torch.flash_attn_bert, {"cuda": ("bfloat16",)},
        "flash_attn.models.bert.BertModel with use_flash_attn, fused_dropout_add_ln, unpadded from the first layer to the last; "
        "fused_bias_fc where fused_dense_lib is built, fused_mlp where the model's GELU is tanh's approximation, too",
        (FLASH_ATTN, Package("einops", "pip install einops"), Package("torchvision", "pip install torchvision")),
    ),
    "zentorch": Peer(
        "transformers zentorch", with_torch.transformers_zentorch, {"cpu": FLOATS},
        'torch.compile(model, backend="zentorch", dynamic=False): AMD\'s ZenDNN',
        (Package("zentorch", "pip install zentorch"), TRANSFORMERS, TORCH),
    ),
    "onnxruntime": Peer(
        "ONNX Runtime", engines.onnxruntime, {"cpu": ("float32", "int8"), "cuda": ("float32",)},
        "onnxruntime.transformers.optimizer's fused BERT; int8: quantize_dynamic, weights per channel; on a GPU the "
        "CUDAExecutionProvider without TF32, on torch's memory", ONNX, in_torch=False,
    ),
    "openvino": Peer(
        "OpenVINO", engines.openvino, {"cpu": (*FLOATS, "int8")},
        "compile_model with the hint LATENCY; bfloat16 by its precision hint; int8: nncf.quantize with ModelType.TRANSFORMER",
        (Package("openvino"),), extras=(NNCF,), in_torch=False,
    ),
    "ctranslate2": Peer(
        "CTranslate2", engines.ctranslate2, {"cpu": ("float32", "int8")},
        "TransformersConverter, Encoder.forward_batch with lengths: no padding in its linear layers; int8: compute_type",
        (Package("ctranslate2"),), in_torch=False,
    ),
}  # fmt: skip
