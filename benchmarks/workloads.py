"""What is measured: models, of the published sizes with random weights or a checkpoint's, and batches of real and equal lengths.

A batch has a short name: ``32x128`` is 32 sequences of 128 tokens, ``mnli`` 32 sequences of MNLI's lengths padded to where its
scripts pad (128), ``64xsquad`` 64 of SQuAD's, ``mnli/longest`` padded to the longest of the batch. ``lengths`` has the sets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, BertConfig

from fastbert.data.hub import no_waiting_for_the_hub

from . import lengths as length_sets
from .harness import first_line
from .lengths import Lengths

VOCABULARY = 30522
SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768), "large": (24, 1024)}
SEQUENCES = 32  # of a batch of real lengths, where its name has no number
STANDARD = ("32x128", "mnli", "8x512", "1x32")
# Named lists of batches, for curves: 4,096 tokens in sequences of growing length, and growing numbers of sequences.
BATCH_LISTS = {
    "standard": STANDARD,
    "by-length": ("256x16", "128x32", "64x64", "32x128", "16x256", "8x512"),
    "by-sequences": ("1x128", "2x128", "4x128", "8x128", "16x128", "32x128"),
    "real": ("sst2", "mnli", "squad", "wikipedia"),
}
_SPEC = re.compile(r"(?:(\d+)x)?(\d+|[a-z][a-z0-9]*)(/longest)?")
_SMALLEST_ID = 1000  # of a random word: below are special tokens and unused ones


class WorkloadError(ValueError):
    """A model or a batch that does not exist; says which do."""


@dataclass(frozen=True)
class Workload:
    """lengths: tokens of each sequence; all are padded to ``padded_to``."""

    name: str
    lengths: tuple[int, ...]
    padded_to: int

    @property
    def tokens(self) -> int:
        """Real ones."""
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """Of tokens that attend to each other."""
        return attended_pairs(self.lengths)

    @property
    def has_padding(self) -> bool:
        return min(self.lengths) < self.padded_to

    def described(self) -> dict[str, int | float]:
        """What a document says of it."""
        return {"sequences": len(self.lengths), "tokens": self.tokens, "padded_to": self.padded_to}


def workload(spec: str, sets: Mapping[str, Lengths] | None = None) -> Workload:
    """The batch of that short name. sets: lengths by name; None for the embedded ones. Raises :class:`WorkloadError`."""
    sets = length_sets.embedded() if sets is None else sets
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise WorkloadError(f"batch {spec!r}: expected such as 32x128, mnli, 64xsquad or mnli/longest")
    count, of, longest = match.groups()
    if of.isdecimal():
        length = int(of)
        if count is None or not int(count) or not length or longest:
            raise WorkloadError(f"batch {spec!r}: expected SEQUENCESxTOKENS, both at least 1, such as 32x{length or 128}")
        return Workload(f"{int(count)} x {length}", (length,) * int(count), length)
    if of not in sets:
        raise WorkloadError(f"batch {spec!r}: there are no lengths named {of}; there are {', '.join(sets)}")
    if count is not None and not int(count):
        raise WorkloadError(f"batch {spec!r}: expected at least 1 sequence")
    chosen = sets[of].quantiles(int(count or SEQUENCES))
    padded_to = chosen[-1] if longest else sets[of].padded_to
    number = "" if count is None or int(count) == SEQUENCES else f"{int(count)} of "
    return Workload(f"{number}{sets[of].title} lengths, padded to {'the longest' if longest else padded_to}", chosen, padded_to)


def workloads(specs: Sequence[str], sets: Mapping[str, Lengths] | None = None) -> tuple[Workload, ...]:
    """Of short names and names of :data:`BATCH_LISTS`, each batch once, under whatever name (mnli is 32xmnli, too)."""
    return tuple(dict.fromkeys(workload(name, sets) for name in names_of(specs)))


def names_of(specs: Sequence[str]) -> list[str]:
    """Short names, with the lists of :data:`BATCH_LISTS` in place of their names."""
    return [name for spec in specs for name in BATCH_LISTS.get(spec, (spec,))]


def set_of(spec: str) -> str | None:
    """The set of lengths that a batch's short name speaks of; None for equal lengths and for what is no name of a batch."""
    match = _SPEC.fullmatch(spec)
    return None if match is None or match[2].isdecimal() else match[2]


def config_for(model: str, **changes) -> BertConfig:
    """BERT of a published size (Turc et al., 2019, for those below base), or of a checkpoint (folder or Hub name).

    Raises :class:`WorkloadError` for what is neither, and for a checkpoint of another architecture.
    """
    if model in SIZES:
        layers, hidden = SIZES[model]
        return BertConfig(
            vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden, **changes,
        )  # fmt: skip
    try:
        with no_waiting_for_the_hub(model):
            config = AutoConfig.from_pretrained(model, **changes)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise WorkloadError(
            f"model {model!r} is neither one of {', '.join(SIZES)} nor a checkpoint (folder or Hub name): {reason}"
        ) from error
    if config.model_type != "bert":
        raise WorkloadError(f"model {model!r} is of type {config.model_type!r}; the benchmarks measure models of type 'bert'")
    return config


def model_title(model: str) -> str:
    return f"bert-{model}" if model in SIZES else Path(model).name


def padded_batch(of: Workload, vocabulary: int = VOCABULARY, device: str = "cpu") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (sequences, padded_to), int64, shuffled as a data set is."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.tensor(of.lengths)[torch.randperm(len(of.lengths), generator=generator)]
    ids = torch.randint(min(_SMALLEST_ID, vocabulary // 2), vocabulary, (len(of.lengths), of.padded_to), generator=generator)
    mask = (torch.arange(of.padded_to) < shuffled[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


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


def attended_pairs(lengths: Sequence[int]) -> int:
    return sum(length * length for length in lengths)
