"""A few held-out words behind a [MASK] and what the model makes of them: the part of a score that people can read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastbert import BertForMaskedLM
from fastbert.data.batches import PackedBatch
from fastbert.data.masking import IGNORE_INDEX

SHOWN_TOKENS = 12
SHORTEST_WORD = 4
CONTINUATION = "##"


@dataclass(frozen=True)
class FilledMask:
    """``text``: :data:`SHOWN_TOKENS` tokens on either side of [MASK]; ``predictions``: (token, probability), best first."""

    text: str
    truth: str
    predictions: list[tuple[str, float]]

    def line(self) -> str:
        guesses = ", ".join(f"{token} {probability:.0%}" for token, probability in self.predictions)
        return f"{self.text}\n    was: {self.truth}; fastbert says: {guesses}"


@torch.no_grad()
def fill_in_examples(
    model: PreTrainedModel, batch: PackedBatch, tokenizer: PreTrainedTokenizerBase, *, count: int = 5, top: int = 3
) -> list[FilledMask]:
    """Masks a whole word in each of up to ``count`` sequences of a held-out ``batch`` and asks for the ``top`` best tokens.

    The same batch gives the same words. Fewer come back where sequences have no word of :data:`SHORTEST_WORD` letters.
    """
    inputs = batch.padded(tokenizer.pad_token_id)
    labels = inputs["labels"].cpu()
    original = torch.where(labels == IGNORE_INDEX, inputs["input_ids"].cpu(), labels)
    chosen = [(row, position) for row, ids in enumerate(original) if (position := _whole_word(ids, tokenizer)) is not None]
    chosen = chosen[:: max(1, len(chosen) // count)][:count]
    if not chosen:
        return []
    rows, positions = (torch.tensor(values) for values in zip(*chosen, strict=True))
    input_ids = original[rows]
    truths = input_ids[torch.arange(len(chosen)), positions]
    input_ids[torch.arange(len(chosen)), positions] = tokenizer.mask_token_id
    logits = _mask_logits(model, inputs, rows, positions, input_ids)
    best = logits.softmax(dim=-1).topk(top)
    return [
        FilledMask(
            text=_shown_text(input_ids[i], int(positions[i]), tokenizer),
            truth=tokenizer.convert_ids_to_tokens(int(truths[i])),
            predictions=list(zip(tokenizer.convert_ids_to_tokens(best.indices[i].tolist()), best.values[i].tolist(), strict=True)),
        )
        for i in range(len(chosen))
    ]


def _mask_logits(model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor, positions: Tensor, input_ids: Tensor) -> Tensor:
    """The logits (sequences, vocabulary), float32 on the CPU, at the masked position of each sequence."""
    training = model.training
    model.eval()
    try:
        outputs = model(
            input_ids=input_ids.to(model.device),
            attention_mask=inputs["attention_mask"].cpu()[rows].to(model.device),
            token_type_ids=inputs["token_type_ids"].cpu()[rows].to(model.device),
        )
    finally:
        model.train(training)
    logits = outputs.logits if isinstance(model, BertForMaskedLM) else outputs.prediction_logits
    return logits[torch.arange(len(rows)), positions].float().cpu()


def _whole_word(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The position of the middle one of the words that are a token of their own, or None."""
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    following = [*tokens[1:], ""]
    words = [
        position
        for position, (token, after) in enumerate(zip(tokens, following, strict=True))
        if token.isalpha() and len(token) >= SHORTEST_WORD and not after.startswith(CONTINUATION)
    ]
    return words[len(words) // 2] if words else None


def _shown_text(ids: Tensor, position: int, tokenizer: PreTrainedTokenizerBase) -> str:
    window = ids[max(0, position - SHOWN_TOKENS) : position + SHOWN_TOKENS + 1].tolist()
    hidden = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    return tokenizer.decode([token for token in window if token not in hidden])
