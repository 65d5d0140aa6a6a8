"""What an encoder that does not change makes of a data set: computed once, kept on disk, the same in all epochs and later runs.

A head reads one vector of each sequence ([CLS]'s) or those of all its tokens. Both are kept packed, in a ``.npy`` file that
training maps into memory: however large it is, no more of it is read than a batch needs. Files lie in the user's cache folder,
``$XDG_CACHE_HOME/fastbert/head-features`` (``~/.cache`` by default), because runs with other seeds, learning rates and output
folders need the same ones; a file's name is a fingerprint of what it was computed from. They are float32: a run then gives the
numbers that it would give with the encoder in it. bfloat16 would save half of the disk and move losses by up to 7e-4 (MiniLM on
SST-2 and WNUT-17; the scores stay).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from fastbert.data.budget import token_budget_batches
from fastbert.data.collator import DataCollatorWithPacking
from fastbert.runs import Say
from fastbert.runs.folder import write_json
from fastbert.user_cache import user_cache_folder

# Changes when the same weights and tokens would give other states, or the files another form.
_FORMAT = 1
_TOKENS_PER_BATCH = 4096
_CHUNK_BYTES = 1 << 24
_ITEM_BYTES = np.dtype(np.float32).itemsize
# What a configuration says about the task or the file it came from, and not about the encoder's outputs without dropout.
_NOT_OF_THE_ENCODER = (
    "_name_or_path", "architectures", "attention_probs_dropout_prob", "classifier_dropout", "dtype", "hidden_dropout_prob",
    "id2label", "label2id", "problem_type", "transformers_version",
)  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """The token sequences of a data set. ``features``: input_ids and token_type_ids; ``starts`` (sequences + 1,): the running sum
    of their lengths; ``bounds`` (rows + 1,): which of them belong to each row, one or, in multiple choice, several."""

    features: list[dict[str, Any]]
    starts: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Sequences:
        features: list[dict[str, Any]] = []
        bounds = [0]
        for row in rows:
            inputs = {name: row[name] for name in ("input_ids", "token_type_ids") if row.get(name) is not None}
            if np.isscalar(inputs["input_ids"][0]):
                features.append(inputs)
            else:
                features += [dict(zip(inputs, values)) for values in zip(*inputs.values(), strict=True)]
            bounds.append(len(features))
        lengths = [len(feature["input_ids"]) for feature in features]
        return cls(features, np.cumsum([0, *lengths]), np.array(bounds))


def encoder_states(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    *,
    per_token: bool,
    autocast: torch.dtype | None = None,
    title: str,
    say: Say,
) -> list[NDArray[np.float32]]:
    """For each row what the encoder of ``model`` makes of it, mapped from the cache, float32: (length, hidden) with
    ``per_token``, else (num_sequences, hidden), the vectors at the first position of its sequences.

    ``model``: one whose encoder is fastbert's; it is left in the mode, training or not, that it was in. ``title``: what to call the
    data. Raises OSError where the disk is too full, or the cache cannot be written.
    """
    if not len(rows):
        return []
    sequences = Sequences.of(rows)
    bounds = sequences.starts[sequences.bounds] if per_token else sequences.bounds
    shape = (int(bounds[-1]), model.config.hidden_size)
    path = cache_folder() / f"{_key(model, sequences, per_token, autocast)}.npy"
    num_bytes = shape[0] * shape[1] * _ITEM_BYTES
    size = f"{len(sequences.features):,} sequences, {sequences.starts[-1]:,} tokens, {num_bytes / 1e6:,.1f} MB"
    states = _load(path, shape, say)
    if states is None:
        started = time.perf_counter()
        _write(path, shape, lambda states: _compute(model, sequences, per_token, autocast, states, title))
        states = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        say(f"  {title}: encoder outputs ({size}) computed in {time.perf_counter() - started:.1f} s, kept in {path}")
    else:
        say(f"  {title}: encoder outputs ({size}) found in {path}")
    return [states[start:end] for start, end in zip(bounds[:-1], bounds[1:])]


def cache_folder() -> Path:
    """Where encoder outputs are kept."""
    return user_cache_folder() / "head-features"


@torch.inference_mode()
def _compute(
    model: PreTrainedModel,
    sequences: Sequences,
    per_token: bool,
    autocast: torch.dtype | None,
    states: NDArray[np.float32],
    title: str,
) -> None:
    """Fills ``states``, the longest sequences first: neighbours in length share a batch, so threads have even work."""
    encoder = model.base_model
    collate = DataCollatorWithPacking(position_ids_start=encoder.first_position)
    starts = sequences.starts
    device, training = model.device, encoder.training
    encoder.eval()
    bar = tqdm(total=len(sequences.features), desc=f"encode {title}", unit="sequence", disable=None, leave=False)
    try:
        with bar, torch.autocast(device.type, autocast, enabled=autocast is not None):
            for batch in token_budget_batches(np.diff(starts).tolist(), _TOKENS_PER_BATCH):
                inputs = collate([sequences.features[number] for number in batch])
                bounds = inputs["cu_seq_lens_q"].tolist()
                moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
                output = encoder(**moved).last_hidden_state[0].float().cpu().numpy()
                if per_token:
                    for number, first, end in zip(batch, bounds, bounds[1:]):
                        states[starts[number] : starts[number + 1]] = output[first:end]
                else:
                    states[batch] = output[bounds[:-1]]
                bar.update(len(batch))
    finally:
        encoder.train(training)


# --- files ---------------------------------------------------------------------------------------------------------------


def _key(model: PreTrainedModel, sequences: Sequences, per_token: bool, autocast: torch.dtype | None) -> str:
    """A fingerprint of everything that the states depend on: the encoder's weights and configuration, tokens, form."""
    encoder = model.base_model
    config = {name: value for name, value in encoder.config.to_dict().items() if name not in _NOT_OF_THE_ENCODER}
    facts = [_FORMAT, type(encoder).__name__, per_token, str(autocast), config]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in encoder.state_dict().items():
        if not name.startswith("pooler."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(sequences.starts.tobytes())
    for name in sequences.features[0]:
        digest.update(name.encode())
        for feature in sequences.features:
            digest.update(np.asarray(feature[name], np.int32))
    return digest.hexdigest()[:32]


def _load(path: Path, shape: tuple[int, int], say: Say) -> NDArray[np.float32] | None:
    """The states in a file, mapped, or None where there are none yet, or no whole ones, which is said."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return None
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        states = np.load(path, mmap_mode="r", allow_pickle=False)
        if states.shape != shape or states.dtype != np.float32:
            raise ValueError(f"it holds {states.dtype} {states.shape}, expected float32 {shape}")
        if _checksum(path) != facts["crc32"]:
            raise ValueError("its checksum is another")
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"  {path} is damaged ({error}): its encoder outputs are computed again")
        return None
    return np.asarray(states)


def _write(path: Path, shape: tuple[int, int], fill: Callable[[NDArray[np.float32]], None]) -> None:
    """Whoever looks for the file finds none or a whole one: the checksum beside it, without which it does not count, comes last.

    Raises OSError where the folder cannot be made, and where the disk is too full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path.parent} cannot be made ({error.strerror}); XDG_CACHE_HOME names another place") from error
    _check_space(path.parent, shape[0] * shape[1] * _ITEM_BYTES)
    sidecar = path.with_suffix(".json")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        states = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up meanwhile is an error here, and a signal in mapped memory
            with beside.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, beside.stat().st_size)
        fill(states)
        states.flush()
        sidecar.unlink(missing_ok=True)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    beside = beside.with_suffix(f"{beside.suffix}.json")  # of this process, as two may want the same states at once
    write_json(beside, {"crc32": _checksum(path), "shape": shape})
    os.replace(beside, sidecar)


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: the encoder's outputs take {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; XDG_CACHE_HOME names "
            "another place, and --mode top-k --top-k-layers 1 needs none"
        )
