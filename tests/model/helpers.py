"""A small configuration, a padded batch, and pairs of the same model in both libraries."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastbert
from fastbert.model.layer import FusedLayer

NAMES = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertLMHeadModel",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
BATCH, LENGTH, VOCABULARY, NUM_LABELS = 6, 21, 130, 3
LENGTHS = (21, 3, 1, 9, 12, 20)


def small_config(**changes) -> transformers.BertConfig:
    arguments = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
        "max_position_embeddings": 40, "num_labels": NUM_LABELS, "initializer_range": 0.1,
    }  # fmt: skip
    return transformers.BertConfig(**{**arguments, **changes})


def config_for(name: str, **changes) -> transformers.BertConfig:
    """Question answering has two labels per token, the span's start and end."""
    return small_config(**{"num_labels": 2 if name == "BertForQuestionAnswering" else NUM_LABELS, **changes})


def pair(name: str, **changes) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(transformers' model, ours) with the same weights, dropout off."""
    config = config_for(name, **changes)
    theirs = getattr(transformers, name)(config).eval()
    ours = getattr(fastbert, name)(copy.deepcopy(config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def mask() -> torch.Tensor:
    return (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    """A padded batch with labels for the class ``name``."""
    ids, types = torch.randint(VOCABULARY, (BATCH, LENGTH)), torch.randint(2, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": mask(), "token_type_ids": types}
    token_labels = torch.where((torch.rand(BATCH, LENGTH) < 0.3) & (mask() == 1), ids, -100)
    token_labels[0, 1] = 5
    if name in ("BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel"):
        batch["labels"] = token_labels
    if name == "BertForPreTraining":
        batch["next_sentence_label"] = torch.randint(2, (BATCH,))
    if name == "BertForTokenClassification":
        batch["labels"] = torch.where(mask() == 1, ids % NUM_LABELS, -100)
    if name == "BertForNextSentencePrediction":
        batch["labels"] = torch.randint(2, (BATCH,))
    if name == "BertForSequenceClassification":
        batch["labels"] = torch.randint(NUM_LABELS, (BATCH,))
    if name == "BertForMultipleChoice":
        batch = {key: value.view(2, BATCH // 2, LENGTH) for key, value in batch.items()}
        batch["labels"] = torch.tensor([0, 2])
    if name == "BertForQuestionAnswering":
        batch |= {"start_positions": torch.zeros(BATCH, dtype=torch.long), "end_positions": torch.tensor(LENGTHS) - 1}
    return batch


def on_real_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """Padding positions set to 0 in a (BATCH, LENGTH, ...) tensor; others as they are."""
    if tensor.shape[:2] != (BATCH, LENGTH):
        return tensor
    return tensor * mask().view(BATCH, LENGTH, *[1] * (tensor.dim() - 2))


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float) -> None:
    """Relative to each parameter's largest gradient; what is zero in exact arithmetic (a key's bias) is left out."""
    theirs_by_name = dict(theirs.named_parameters())
    largest = max(p.grad.abs().max() for p in theirs_by_name.values() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        expected = theirs_by_name[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None and expected.abs().max() > 1e-6 * largest:
            error = (parameter.grad - expected).abs().max() / expected.abs().max()
            assert error <= tolerance, f"{name}: relative error {error:.2e}"


def rows_of_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each run of a fused layer makes that does not go through packed weights, from now on."""
    rows, op_by_op = [], FusedLayer.op_by_op

    def counted(layer, hidden_states, packing, read=None):
        rows.append(len(hidden_states) if read is None else len(read))
        return op_by_op(layer, hidden_states, packing, read)

    monkeypatch.setattr(FusedLayer, "op_by_op", counted)
    return rows
