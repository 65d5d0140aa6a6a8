"""Contenders of the inference benchmark that compute in torch: fastbert, transformers in several ways, flash-attn's BERT."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

import fastbert

from ..workloads import packed_batch
from .peer import NotAvailable
from .subject import Batch, Run, Subject

# Tokens of a batch with its padding: the fastest of 128 to 2048 for sequences of MNLI's lengths, in inference and in training.
TOKEN_BUDGET = 256


def fastbert_model(subject: Subject, dtype: str) -> Run:
    config = copy.deepcopy(subject.config)  # quantize writes into it, and what others make of the subject must not say int8
    model = fastbert.BertModel(config, add_pooling_layer=False).eval().to(subject.device)
    model.load_state_dict(subject.model.state_dict())
    if dtype == "bfloat16":
        model.bfloat16()
    if dtype == "int8":
        model = fastbert.quantize(model)
    run = _hidden_states(model)
    with torch.inference_mode():  # packs its weights for this CPU, as the other engines do when they are made
        run({name: value.to(subject.device) for name, value in subject.example.items()})
    return run


def transformers_sdpa(subject: Subject, dtype: str) -> Run:
    return _hidden_states(subject.of_dtype(dtype))


def transformers_eager(subject: Subject, dtype: str) -> Run:
    return _hidden_states(subject.with_attention("eager", dtype))


def transformers_flash(subject: Subject, dtype: str) -> Run:
    """transformers takes the padding out around each layer's attention and puts it back."""
    return _hidden_states(subject.with_attention("flash_attention_2", dtype))


def transformers_packed(subject: Subject, dtype: str) -> Run:
    """What a careful user of transformers does on a GPU: padding taken out before the model, as DataCollatorWithFlattening does,
    and put back behind it."""
    model = subject.with_attention("flash_attention_2", dtype)

    def run(batch: Batch) -> Tensor:
        real = batch["attention_mask"] == 1
        rows = model(**packed_batch(batch)).last_hidden_state
        hidden = rows.new_zeros((*real.shape, rows.shape[-1]))
        hidden[real] = rows[0]
        return hidden

    return run


def transformers_compiled(subject: Subject, dtype: str) -> Run:
    return _hidden_states(torch.compile(subject.of_dtype(dtype), dynamic=False))


def transformers_zentorch(subject: Subject, dtype: str) -> Run:
    """AMD's ZenDNN as a backend of torch.compile, which importing it registers."""
    import zentorch  # noqa: F401

    return _hidden_states(torch.compile(subject.of_dtype(dtype), backend="zentorch", dynamic=False))


def _hidden_states(model: torch.nn.Module) -> Run:
    return lambda batch: model(**batch).last_hidden_state


def transformers_sorted(subject: Subject, dtype: str) -> Run:
    """What a careful user of transformers does: similar lengths together in small batches, and oneDNN's matmul."""
    model = subject.of_dtype(dtype)

    def run(batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = ids.new_zeros((*ids.shape, subject.config.hidden_size), dtype=getattr(torch, dtype))
        lengths, order = mask.sum(1).sort()
        with onednn_float32_matmul():
            for group in token_budget_groups(lengths.tolist(), TOKEN_BUDGET):
                rows, longest = order[group], int(lengths[group][-1])
                part = model(input_ids=ids[rows, :longest], attention_mask=mask[rows, :longest])
                hidden[rows, :longest] = part.last_hidden_state
        return hidden

    return run


def token_budget_groups(ascending: list[int], budget: int) -> Iterator[slice]:
    """Cuts lengths in ascending order into runs of at most ``budget`` tokens when padded to their longest, at least one each."""
    start = 0
    for end in range(1, len(ascending) + 1):
        if end == len(ascending) or (end + 1 - start) * ascending[end] > budget:
            yield slice(start, end)
            start = end


@contextlib.contextmanager
def onednn_float32_matmul() -> Iterator[None]:
    """Float32 matmuls go to oneDNN instead of MKL, unless it then multiplies in bfloat16."""
    with contextlib.nullcontext() if onednn_rounds_float32() else _medium_precision():
        yield


@functools.cache
def onednn_rounds_float32() -> bool:
    """Whether torch's float32 matmul on oneDNN multiplies in bfloat16 here, as on CPUs with AMX."""
    exact = torch.full((256, 256), 1 + 2**-12)
    with _medium_precision():
        return not torch.equal(exact @ torch.eye(256), exact)


@contextlib.contextmanager
def _medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Activations that flash_attn's fused MLP computes: all are tanh's approximation of GELU.
_TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def flash_attn_bert(subject: Subject, dtype: str) -> Run:
    """flash_attn.models.bert, which descends from MLPerf's: no padding from the first layer to the last, attention by
    flash_attn, dropout + residual + LayerNorm in one Triton kernel. Its fused MLP knows only tanh's approximation of GELU, so a
    model with the exact one runs without it; bias and matmul in one need flash_attn's extension fused_dense_lib."""
    from flash_attn.models import bert

    config = copy.deepcopy(subject.config)
    if config.hidden_act not in ("gelu", *_TANH_GELUS):
        raise NotAvailable(f"flash_attn's BERT has no activation {config.hidden_act}")
    fused_dense = importlib.util.find_spec("fused_dense_lib") is not None
    config.position_embedding_type = "absolute"  # which it asks for and transformers no longer has
    config.use_flash_attn = config.fused_dropout_add_ln = True
    config.fused_bias_fc = fused_dense
    config.fused_mlp = fused_dense and config.hidden_act in _TANH_GELUS
    model = bert.BertModel(config, add_pooling_layer=False)
    named = bert.remap_state_dict({f"bert.{name}": value for name, value in subject.model.state_dict().items()}, config)
    model.load_state_dict({name.removeprefix("bert."): value for name, value in named.items()})
    model.eval().to(subject.device, getattr(torch, dtype))
    return lambda batch: model(batch["input_ids"], attention_mask=batch["attention_mask"].bool()).last_hidden_state
