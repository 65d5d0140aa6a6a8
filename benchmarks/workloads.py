"""What is measured: models of the published sizes with random weights, batches with and without padding, and their FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BertConfig

from fastbert.train import telemetry

VOCABULARY = 30522
# Token counts of MNLI's matched dev pairs (bert-base-uncased's WordPiece): 32 evenly spaced quantiles, mean 39.
MNLI_LENGTHS = (
    12, 15, 17, 19, 20, 22, 24, 25, 26, 28, 29, 30, 31, 33, 34, 35, 37, 38, 40, 41, 43, 44, 46, 48, 50, 53, 55, 58, 62, 66, 73, 89,
)  # fmt: skip
# Sequence pairs of Wikipedia cut at 512 tokens fill half of them: evenly spread lengths with the mean 254 that MLPerf's data has.
WIKIPEDIA_LENGTHS = tuple(8 + 492 * i // 31 for i in range(32))
# kind -> (name, one cycle of lengths, padded to)
REAL_LENGTHS = {"mnli": ("MNLI", MNLI_LENGTHS, 128), "wikipedia": ("Wikipedia", WIKIPEDIA_LENGTHS, 512)}
# name -> (lengths, padded to)
BATCHES = {
    "32 x 128": ((128,) * 32, 128),
    "MNLI lengths, padded to 128": (MNLI_LENGTHS, 128),
    "8 x 512": ((512,) * 8, 512),
    "1 x 32": ((32,), 32),
}
SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768), "large": (24, 1024)}


def config_for(size: str, **changes) -> BertConfig:
    """BERT of a published size (Turc et al., 2019, for those below base)."""
    layers, hidden = SIZES[size]
    return BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, **changes,
    )  # fmt: skip


def padded_batch(lengths: tuple[int, ...], padded_to: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (batch, padded_to), shuffled as a data set is."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.tensor(lengths)[torch.randperm(len(lengths), generator=generator)]
    ids = torch.randint(1000, VOCABULARY, (len(lengths), padded_to), generator=generator)
    mask = (torch.arange(padded_to) < shuffled[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def training_batches(kinds: list[str], tokens: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """name -> (lengths, padded to), each of about ``tokens`` tokens with its padding: "128" and "512" have none, "mnli" has
    MNLI's lengths padded to 128, "wikipedia" Wikipedia's padded to 512 (whole cycles of their 32 lengths, at least one)."""
    batches = {}
    for kind in kinds:
        if kind in ("128", "512"):
            length = int(kind)
            sequences = max(1, tokens // length)
            batches[f"{sequences} x {length}"] = ((length,) * sequences, length)
        else:
            name, cycle, padded_to = REAL_LENGTHS[kind]
            batches[f"{name} lengths, padded to {padded_to}"] = (cycle * max(1, tokens // padded_to // len(cycle)), padded_to)
    return batches


def packed_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """A padded batch as one row of its real tokens, with the sequences' bounds: what a packing data loader makes."""
    real = batch["attention_mask"] == 1
    lengths = real.sum(1)
    longest = int(lengths.max())
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    rows = {key: value[real].unsqueeze(0) for key, value in batch.items() if value.shape == real.shape and key != "attention_mask"}
    others = {key: value for key, value in batch.items() if value.shape != real.shape}
    positions = torch.arange(real.shape[1], device=real.device).expand(real.shape)[real].unsqueeze(0)
    return {
        **rows, **others, "position_ids": positions,
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def encoder_flops(config: BertConfig, lengths: Sequence[int]) -> float:
    """FLOPs of a forward pass over sequences of these lengths, see ``fastbert.train.telemetry``."""
    return telemetry.encoder_flops(config, sum(lengths), _attended_pairs(lengths))


def training_flops(config: BertConfig, lengths: Sequence[int], labelled: float) -> float:
    """FLOPs of a training step of masked LM, with the ``labelled`` share of the tokens, see ``fastbert.train.telemetry``."""
    tokens = sum(lengths)
    return telemetry.training_flops(config, tokens, _attended_pairs(lengths), labelled * tokens)


def _attended_pairs(lengths: Sequence[int]) -> int:
    return sum(length * length for length in lengths)
