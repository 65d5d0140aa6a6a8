"""Pairs of models with sdpa and with ``attn_implementation="fastbert"``, and what their attention functions are called with."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils

from fastbert.model import attention_interface
from fastbert.ops import backends

from ..model.helpers import BATCH, LENGTH, LENGTHS, VOCABULARY, mask, small_config

no_kernels = backends.unavailable_reason("native")
needs_kernels = pytest.mark.skipif(no_kernels is not None, reason=f"without C++ kernels all of it runs through sdpa: {no_kernels}")
attention_interface.register_attention()
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODERS = {
    "BertModel": transformers.BertConfig(**SIZES),
    "RobertaModel": transformers.RobertaConfig(**SIZES),
    "ElectraModel": transformers.ElectraConfig(**SIZES, embedding_size=24),
    "DistilBertModel": transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40
    ),
    "EuroBertModel": transformers.EuroBertConfig(**SIZES, mask_token_id=3),
}


def count_ways(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """From now on, how many calls of attention went which way, "fused" or "sdpa"."""
    counted = Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(attention_interface, "attention", counting("fused", attention_interface.attention))
    sdpa = attention_interface.sdpa_attention_forward
    monkeypatch.setattr(attention_interface, "sdpa_attention_forward", counting("sdpa", sdpa))
    return counted


def twins(name: str, config: transformers.PreTrainedConfig, theirs: str = "sdpa") -> tuple[nn.Module, nn.Module]:
    """Twice the same model of transformers: with its own attention, and with ours."""
    model_class = getattr(transformers, name)
    plain = model_class._from_config(copy.deepcopy(config), attn_implementation=theirs).eval()
    fused = model_class._from_config(copy.deepcopy(config), attn_implementation="fastbert").eval()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def text(padded: bool = True) -> dict[str, torch.Tensor]:
    batch = {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH))}
    return {**batch, "attention_mask": mask()} if padded else batch


def one_row(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The real tokens of a padded batch one after the other, as DataCollatorWithFlattening gives them."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "input_ids": batch["input_ids"][mask().bool()].unsqueeze(0),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0),
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
    }  # fmt: skip


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


class SelfAttention(nn.Module):
    """What the attention function sees of a layer."""

    is_causal = False

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        raise NotImplementedError


class CrossAttention(SelfAttention):
    def forward(self, hidden_states, key_value_states=None, attention_mask=None):
        raise NotImplementedError


class CausalAttention(SelfAttention):
    is_causal = True


class OneLayer(nn.Module):
    """What a model does with masks and attention: the part of it that is worth compiling in a test."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        config = small_config(attn_implementation=implementation, attention_probs_dropout_prob=0.0)
        self.attention = transformers.models.bert.modeling_bert.BertSelfAttention(config)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        made = masking_utils.create_bidirectional_mask(self.attention.config, hidden_states, attention_mask)
        return self.attention(hidden_states, made, **kwargs)[0]


def heads(length: int = LENGTH, batch: int = BATCH, **options) -> list[torch.Tensor]:
    """Query, key and value (batch, 4, length, 12)."""
    return [torch.randn(batch, 4, length, 12, **options) for _ in range(3)]


def padding(real: torch.Tensor) -> torch.Tensor:
    return real.bool()[:, None, None, :]
