"""Texts to embeddings: the features of a BERT that stays as it is, at the speed of packed batches.

    from fastbert import Embedder
    vectors = Embedder.from_pretrained("bert-base-uncased", pooling="mean")(["A text.", "Another one."])

Sequences of a chunk are sorted by length and packed, so that nothing is computed on padding. Models of an architecture that
fastbert does not know run as transformers' own, in padded batches; :attr:`Embedder.notes` says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastbert.data.batches import boundary_arguments
from fastbert.data.budget import token_budget_batches
from fastbert.data.errors import DataError
from fastbert.model.encoder import PackedEncoder
from fastbert.model.explain import explain
from fastbert.model.int8_checkpoint import METHOD as INT8
from fastbert.runs.errors import SettingsError
from fastbert.tasks.model import check_length, longest_sequence

from .encoder import load_encoder
from .pooling import LAST_LAYERS, num_layers, sequence_rows, token_rows
from .settings import TOKENS_PER_BATCH, check_pooling

Text = str | Sequence[str]  # a text, or its words


class TextError(DataError):
    """A text that has no embedding; ``index``: its number among those of the call."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index, self.problem = index, problem

    def __str__(self) -> str:
        return f"text {self.index} {self.problem}"


# A chunk is what is tokenized, sorted and written at a time: 64k tokens of English, of which a whole row is kept at level "token".
CHUNK_CHARACTERS = {"sequence": 2**18, "token": 2**16}
_CHARACTERS_PER_TOKEN = 4
_SPECIAL_TOKENS = 2


@dataclass(frozen=True)
class Embedded:
    """The embeddings of one chunk of texts.

    rows: (sum of counts, dim) float32, in the order of the texts; counts: (n,) int64, rows of each text (1 at level "sequence");
    names: of each row its token or word where they were asked for; tokens: that the model saw; truncated: texts that were cut.
    """

    rows: NDArray[np.float32]
    counts: NDArray[np.int64]
    names: list[str] | None
    tokens: int
    truncated: int


@dataclass(frozen=True)
class _Encoded:
    """Token ids of n texts, one text behind the other: ``inputs`` maps input_ids (and token_type_ids) to (total,) int64; offsets:
    (n + 1,); kept: (total,) bool, the tokens that get a row at level "token"; names: of those."""

    inputs: dict[str, NDArray[np.int64]]
    offsets: NDArray[np.int64]
    kept: NDArray[np.bool_] | None
    names: list[str] | None
    truncated: int


class Embedder:
    """Embeddings of texts by ``model``, which should be in evaluation mode, on one device.

    pooling: "mean" (the default), "cls", "max" or "last-4", see :mod:`fastbert.features.pooling`. level: "sequence", a row per
    text, or "token": a row per token, [CLS] and [SEP] included, or, of texts that are given as lists of words, a row per word,
    that of its first piece; the rows are those of the last layer then, or with pooling "last-4" of the last four. Words
    that were cut off with the end of their text have no row. normalize: rows get length 1.
    max_seq_length: tokens at most, [CLS] and [SEP] included; longer texts are cut; None: as many as the model has positions for.
    tokens_per_batch: of a packed batch at most, but for a text that is longer.

    Raises SettingsError for what does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str | None = None,
        level: str = "sequence",
        normalize: bool = False,
        max_seq_length: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        self.pooling = check_pooling(pooling, level)
        if tokens_per_batch < 1:
            raise SettingsError(f"--tokens-per-batch must be at least 1, not {tokens_per_batch}")
        self.model, self.tokenizer = model, tokenizer
        self.level, self.normalize, self.tokens_per_batch = level, normalize, tokens_per_batch
        self.packed = isinstance(model, PackedEncoder)
        self._layers = num_layers(self.pooling)
        layers = model.config.num_hidden_layers
        if layers < self._layers:
            raise SettingsError(f"--pooling last-4 needs a model of at least {LAST_LAYERS} layers, this one has {layers}")
        self.max_seq_length = self._longest(max_seq_length)
        if not self.packed and tokenizer.pad_token_id is None:
            raise SettingsError(f"the tokenizer has no padding token, which {type(model).__name__} needs in batches")
        self.device = next(model.parameters()).device
        self.notes = self._notes()

    @classmethod
    def from_pretrained(
        cls, name: str, *, dtype: str | None = None, device: str = "auto", words: bool = False, **settings: Any
    ) -> Embedder:
        """An Embedder of a checkpoint: a folder, or a name on the Hugging Face hub. ``settings``: those of the class.

        dtype: "float32" (the default), "bfloat16", or "int8" (the encoder's matmuls, on CPUs); a checkpoint that was saved in int8
        stays so. device: "auto" is a GPU where there is one. words: the texts will be lists of words.

        Raises SettingsError for settings that cannot work, DataError for a checkpoint that cannot be used.
        """
        check_pooling(settings.get("pooling"), settings.get("level", "sequence"))
        model, tokenizer, notes = load_encoder(name, dtype=dtype, device=device, words=words)
        embedder = cls(model, tokenizer, **settings)
        embedder.notes[:0] = notes
        return embedder

    @property
    def dtype(self) -> str:
        """Of the encoder's matmuls."""
        if getattr(self.model, "quantization_method", None) == INT8:
            return "int8"
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def dim(self) -> int:
        """The width of a row."""
        return self._layers * self.model.config.hidden_size

    def __call__(
        self, texts: Sequence[Text], text_pairs: Sequence[str] | None = None
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """(n, dim) float32, at level "token" a list of (tokens, dim), one of each text.

        texts: strings, or lists of words; text_pairs: the second text of each, which the model reads together with the first.
        Raises TypeError for what is neither or a mixture of both, TextError for a text that has no embedding, with their numbers.
        """
        for name, values in (("texts", texts), ("text_pairs", text_pairs)):
            if isinstance(values, str):
                raise TypeError(f"{name} must be a sequence of texts, not a single string")
        texts, text_pairs = list(texts), None if text_pairs is None else list(text_pairs)
        if text_pairs is not None and len(text_pairs) != len(texts):
            raise ValueError(f"there are {len(texts)} texts and {len(text_pairs)} text_pairs; each text needs its own")
        _check_kinds(texts, text_pairs)
        self._check_room(text_pairs)
        bounds = self.chunk_bounds(texts, text_pairs)
        parts = [
            self.embed(texts[start:end], None if text_pairs is None else text_pairs[start:end])
            for start, end in zip(bounds, bounds[1:])
        ]
        rows = np.concatenate([part.rows for part in parts]) if parts else np.empty((0, self.dim), np.float32)
        if self.level == "sequence":
            return rows
        counts = np.concatenate([part.counts for part in parts]) if parts else np.empty(0, np.int64)
        return np.split(rows, np.cumsum(counts)[:-1]) if len(counts) else []

    def chunk_bounds(self, texts: Sequence[Text], text_pairs: Sequence[str] | None) -> list[int]:
        """Where chunks of the texts begin, and the last one ends: from 0 to n. They depend on the texts and the settings alone."""
        limit, longest = CHUNK_CHARACTERS[self.level], self.max_seq_length * _CHARACTERS_PER_TOKEN
        bounds, characters = [0], 0
        for index, text in enumerate(texts):
            size = len(text) if isinstance(text, str) else sum(map(len, text))
            size += 0 if text_pairs is None else len(text_pairs[index])
            size = min(size + _SPECIAL_TOKENS * _CHARACTERS_PER_TOKEN, longest)
            if characters and characters + size > limit:
                bounds.append(index)
                characters = 0
            characters += size
        return [*bounds, len(texts)] if texts else [0]

    def check_texts(self, texts: Sequence[Text], text_pairs: Sequence[str] | None) -> None:
        """Raises TextError for a text, or one of a pair, of which the tokenizer keeps nothing, before anything is computed, and
        SettingsError where pairs have no room.

        No tokenizer of BERT's kind drops letters or digits, so that only texts without any are tokenized: nearly none. Where one
        does, :meth:`embed` finds out.
        """
        self._check_room(text_pairs)
        bounds = self.chunk_bounds(texts, text_pairs)
        for start, end in zip(bounds, bounds[1:]):
            parts = (texts,) if text_pairs is None else (texts, text_pairs)
            doubtful = [i for i in range(start, end) if not all(any(map(str.isalnum, part[i])) for part in parts)]
            pairs = None if text_pairs is None else [text_pairs[index] for index in doubtful]
            try:
                if doubtful:
                    self._encode([texts[index] for index in doubtful], pairs, False)
            except TextError as error:
                raise TextError(doubtful[error.index], error.problem) from error

    def embed(self, texts: Sequence[Text], text_pairs: Sequence[str] | None = None, *, names: bool = False) -> Embedded:
        """One chunk, all of it in memory at a time; ``names``: with the token or word of each row, at level "token"."""
        encoded = self._encode(texts, text_pairs, names)
        lengths = np.diff(encoded.offsets)
        by_token = self.level == "token"
        if not by_token:
            counts = np.ones(len(lengths), np.int64)
        elif encoded.kept is None:
            counts = lengths
        else:
            counts = np.add.reduceat(encoded.kept, encoded.offsets[:-1], dtype=np.int64)
        first_row = np.concatenate([[0], np.cumsum(counts)])
        rows = np.empty((first_row[-1], self.dim), np.float32)
        for batch in token_budget_batches(lengths.tolist(), self.tokens_per_batch, padded=not self.packed):
            target = np.concatenate([np.arange(first_row[i], first_row[i + 1]) for i in batch]) if by_token else batch
            rows[target] = self._embed_batch(encoded, batch)
        if not np.isfinite(rows).all():
            row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            index = int(np.searchsorted(first_row, row, side="right")) - 1
            raise TextError(index, "gets an embedding with NaN or infinity in it: the model's weights are damaged")
        return Embedded(rows, counts, encoded.names, int(encoded.offsets[-1]), encoded.truncated)

    def fingerprint(self) -> str:
        """SHA-256 of what decides about the embeddings beside the settings: weights, configuration and tokenizer."""
        digest = hashlib.sha256()
        config = self.model.config.to_dict()
        for origin in ("_name_or_path", "transformers_version", "architectures"):
            config.pop(origin, None)
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # as the last call left them
            tokenizer.pop(state)
        digest.update(json.dumps([config, tokenizer], sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    # --- tokens ---------------------------------------------------------------------------------------------------------

    def _encode(self, texts: Sequence[Text], text_pairs: Sequence[str] | None, names: bool) -> _Encoded:
        words = bool(texts) and not isinstance(texts[0], str)
        encoded = self._tokenized(texts, text_pairs, words)
        if words and (bare := _words_without_tokens(encoded, texts)):
            # Characters that the tokenizer drops (a lone variation selector, say) make a word of nothing; every word gets a row.
            visible = [list(text) for text in texts]
            for index, word in bare:
                visible[index][word] = self.tokenizer.unk_token
            encoded = self._tokenized(visible, text_pairs, words)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        special = self.tokenizer.num_special_tokens_to_add(pair=text_pairs is not None)
        bare_texts = (index for index, length in enumerate(lengths) if length <= special)
        if text_pairs is not None:
            bare_texts = (index for index, part in enumerate(encoded.encodings) if not {0, 1} <= set(part.sequence_ids))
        if (bare_text := next(bare_texts, None)) is not None:
            raise TextError(bare_text, "has nothing that the tokenizer keeps")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        inputs = {
            name: np.fromiter(chain.from_iterable(encoded[name]), np.int64, offsets[-1])
            for name in ("input_ids", "token_type_ids")
            if name in encoded
        }
        kept = None
        if words and self.level == "token":
            kept = np.fromiter(chain.from_iterable(map(_first_pieces, encoded.encodings)), np.bool_, offsets[-1])
        row_names = None
        if names and self.level == "token":
            row_names = [name for index, part in enumerate(encoded.encodings) for name in _names(part, texts[index], words)]
        truncated = sum(bool(part.overflowing) for part in encoded.encodings)
        return _Encoded(inputs, offsets, kept, row_names, truncated)

    def _tokenized(self, texts: Sequence[Text], text_pairs: Sequence[str] | None, words: bool) -> transformers.BatchEncoding:
        return self.tokenizer(
            [list(text) for text in texts] if words else list(texts),
            None if text_pairs is None else list(text_pairs),
            truncation=True,
            max_length=self.max_seq_length,
            padding=False,
            return_attention_mask=False,
            is_split_into_words=words,
        )

    # --- one batch ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _embed_batch(self, encoded: _Encoded, batch: list[int]) -> NDArray[np.float32]:
        slices = [slice(encoded.offsets[i], encoded.offsets[i + 1]) for i in batch]
        lengths = np.array([part.stop - part.start for part in slices])
        cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        inputs = {name: torch.from_numpy(np.concatenate([row[s] for s in slices])) for name, row in encoded.inputs.items()}
        layers = (
            self._packed_layers(inputs, cu_seqlens, int(lengths.max())) if self.packed else self._padded_layers(inputs, lengths)
        )
        rows = token_rows(layers)
        if self.level == "sequence":
            rows = sequence_rows(rows, cu_seqlens.to(self.device), self.pooling)
        elif encoded.kept is not None:
            rows = rows[torch.from_numpy(np.concatenate([encoded.kept[s] for s in slices])).to(self.device)]
        return (F.normalize(rows, dim=1) if self.normalize else rows).cpu().numpy()

    def _packed_layers(self, inputs: dict[str, Tensor], cu_seqlens: Tensor, longest: int) -> Sequence[Tensor]:
        """The layers that pooling reads, each (total, hidden)."""
        row = {name: values.unsqueeze(0).to(self.device) for name, values in inputs.items()}
        boundaries = boundary_arguments(cu_seqlens.to(self.device, torch.int32), longest)
        output = self.model(**row, **boundaries, output_hidden_states=self._layers > 1)
        return [state[0] for state in self._last_layers(output)]

    def _padded_layers(self, inputs: dict[str, Tensor], lengths: NDArray[np.int64]) -> Sequence[Tensor]:
        mask = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
        padded = {"attention_mask": mask.long()}
        for name, values in inputs.items():
            fill = self.tokenizer.pad_token_id if name == "input_ids" else self.tokenizer.pad_token_type_id
            padded[name] = torch.full(mask.shape, fill).masked_scatter_(mask, values)
        output = self.model(**{name: x.to(self.device) for name, x in padded.items()}, output_hidden_states=self._layers > 1)
        return [state[mask.to(self.device)] for state in self._last_layers(output)]

    def _last_layers(self, output: Any) -> Sequence[Tensor]:
        return output.hidden_states[-self._layers :] if self._layers > 1 else [output.last_hidden_state]

    # --- checks ---------------------------------------------------------------------------------------------------------

    def _longest(self, wanted: int | None) -> int:
        positions = longest_sequence(self.model.config, self.tokenizer)
        if wanted is None:
            return positions
        if wanted < (shortest := self.tokenizer.num_special_tokens_to_add() + 1):
            raise SettingsError(f"--max-seq-length must be at least {shortest}, special tokens included, not {wanted}")
        check_length(wanted, positions, self.model.name_or_path)
        return wanted

    def _check_room(self, text_pairs: Sequence[str] | None) -> None:
        """Raises SettingsError where a token of each text of a pair has no room."""
        shortest = self.tokenizer.num_special_tokens_to_add(pair=True) + 2
        if text_pairs is not None and self.max_seq_length < shortest:
            raise SettingsError(
                f"--max-seq-length must be at least {shortest} for pairs, special tokens included, not {self.max_seq_length}"
            )

    def _notes(self) -> list[str]:
        if not self.packed:
            return []
        hidden_states = {"output_hidden_states": True} if self._layers > 1 else {}
        return [f"the encoder runs transformers' forward pass: {reason}" for reason in explain(self.model, **hidden_states).encoder]


def _check_kinds(texts: Sequence[Any], text_pairs: Sequence[Any] | None) -> None:
    """Raises TypeError for what is no text where the first one is, or no list of words where that is; TextError for no Unicode."""
    words = bool(texts) and not isinstance(texts[0], str)
    if words and text_pairs is not None:
        raise TypeError("text_pairs are for texts that are strings, not for lists of words")
    for name, values, in_words in (("texts", texts, words), ("text_pairs", text_pairs or (), False)):
        for index, value in enumerate(values):
            parts = tuple(value) if in_words and isinstance(value, Iterable) else (value,)
            if isinstance(value, str) == in_words or not all(isinstance(part, str) for part in parts):
                expected = "a list of words, as the first one is" if in_words else "a string"
                raise TypeError(f"{name}[{index}] is {value!r:.60}, expected {expected}")
            if not all(map(_is_unicode, parts)):
                raise TextError(index, "holds a lone surrogate, which no UTF-8 text has")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names(encoding: Any, words: Text, by_word: bool) -> Iterator[str]:
    """Of the rows that a text has at level "token"."""
    if not by_word:
        yield from encoding.tokens
    else:
        yield from (words[word] for word, first in zip(encoding.word_ids, _first_pieces(encoding)) if first)


def _first_pieces(encoding: Any) -> list[bool]:
    """Whether each token is the first of a word."""
    words = encoding.word_ids
    return [word is not None and word != before for before, word in zip([None, *words], words)]


def _words_without_tokens(encoded: transformers.BatchEncoding, texts: Sequence[Text]) -> list[tuple[int, int]]:
    """(text, word) of the words that no token stands for, but for those that were cut off."""
    bare = []
    for index, (encoding, words) in enumerate(zip(encoded.encodings, texts)):
        present = {word for word in encoding.word_ids if word is not None}
        if len(present) < len(words):
            end = max(present, default=0) if encoding.overflowing else len(words)
            bare += [(index, word) for word in range(end) if word not in present]
    return bare
