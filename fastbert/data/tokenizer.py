"""BERT's WordPiece tokenizer: trained on a corpus or loaded, always as a transformers fast tokenizer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordPiece
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from fastbert.data.errors import CorpusError, TokenizerError
from fastbert.data.hub import no_waiting_for_the_hub

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SMALLEST_VOCABULARY = 200
_ALPHABET_SIZES = (64, 1000)
_ALPHABET_SHARE = 8
_CONTINUATION = "##"
_NOT_A_WORD = re.compile(r"\[\w+\]")


def train_wordpiece(texts: Iterable[str], vocab_size: int, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """Trains BERT's WordPiece vocabulary (Wu et al., 2016; Devlin et al., 2019) with the tokenizers library.

    Ids: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, the characters, the ``##`` characters, the merges by rank. The
    characters are the most frequent ones, as many as an eighth of the vocabulary (but at least 64 and at most 1000);
    pieces seen once are left out, so a small corpus gives fewer than ``vocab_size`` entries. ``lowercase`` also strips
    accents. The same texts give the same vocabulary on every run. Raises ValueError for a vocab_size below 200,
    CorpusError where the texts hold no characters.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, not {vocab_size}")
    texts = list(texts)
    backend = Tokenizer(WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    smallest, largest = _ALPHABET_SIZES
    alphabet = _alphabet(texts, backend, min(largest, max(smallest, vocab_size // _ALPHABET_SHARE)))
    if not alphabet:
        raise CorpusError("there is no text to train a vocabulary on")
    # The trainer numbers the "##" characters in the random order of a hash map and breaks ties between pairs by these
    # numbers; given beforehand, in a fixed order, as "special" tokens, they cannot vary.
    inner_alphabet = [_CONTINUATION + character for character in alphabet if _can_continue_a_word(character, backend)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS.values(), *inner_alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_CONTINUATION,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    trained = backend.get_vocab()
    tokens = dict.fromkeys([*SPECIAL_TOKENS.values(), *alphabet, *inner_alphabet, *sorted(trained, key=trained.__getitem__)])
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, do_lower_case=lowercase)


def _alphabet(texts: Iterable[str], backend: Tokenizer, size: int) -> list[str]:
    """The ``size`` most frequent characters after normalization, sorted; ties go to the lower code point."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for normalized in backend.normalizer.normalize_str(character):
            if not normalized.isspace():
                counts[normalized] += count
    return sorted(sorted(counts, key=lambda character: (-counts[character], character))[:size])


def _can_continue_a_word(character: str, backend: Tokenizer) -> bool:
    """False of punctuation and of Chinese characters, which BERT's pre-tokenizer makes words of their own."""
    return len(backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str("a" + character))) == 1


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a folder with tokenizer.json or vocab.txt, or from the Hugging Face hub by its name.

    A folder's tokenizer.json is taken as it is, but for the padding and truncation that it may have baked in, which are
    turned off. For a vocab.txt alone, ``do_lower_case`` comes from tokenizer_config.json; without one the vocabulary
    is uncased if it has no word with a capital letter. Raises TokenizerError where files are missing or
    damaged, or where the tokenizer lacks one of [PAD], [CLS], [SEP], [MASK] (under whatever name).
    """
    folder = Path(path_or_name)
    tokenizer = _load_folder(folder) if folder.is_dir() else _load_from_hub(path_or_name)
    for role in SPECIAL_TOKENS:
        token = getattr(tokenizer, role)
        if role != "unk_token" and (token is None or token not in tokenizer.get_vocab()):
            raise TokenizerError(
                f"{path_or_name}: the tokenizer has no {role} ({token or SPECIAL_TOKENS[role]} is not in its vocabulary); "
                "pretraining needs [PAD], [CLS], [SEP] and [MASK]"
            )
    _mark_special(tokenizer)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _mark_special(tokenizer: PreTrainedTokenizerFast) -> None:
    """A tokenizer.json may hold [CLS], [MASK] and the others as ordinary tokens, which text could then have ids of."""
    names = {getattr(tokenizer, role) for role in SPECIAL_TOKENS}
    ordinary = [
        token
        for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        if token.content in names and not token.special
    ]
    for token in ordinary:
        token.special = True
    tokenizer.backend_tokenizer.add_special_tokens(ordinary)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the files that :func:`load_tokenizer` and ``AutoTokenizer`` read. Raises OSError where they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower, of a full disk neither
        raise OSError(f"cannot write {folder / 'tokenizer.json'}: {error}") from error


def _load_folder(folder: Path) -> PreTrainedTokenizerFast:
    config = _tokenizer_config(folder)
    options: dict[str, Any] = {"model_max_length": config["model_max_length"]} if "model_max_length" in config else {}
    for role, token in SPECIAL_TOKENS.items():
        named = config.get(role) or token
        options[role] = named["content"] if isinstance(named, dict) else named
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json", options)
    if (folder / "vocab.txt").is_file():
        return _from_vocabulary(folder / "vocab.txt", config.get("do_lower_case"), options)
    raise TokenizerError(f"{folder}: the folder holds neither tokenizer.json nor vocab.txt")


def _from_json(path: Path, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Not through BertTokenizer.from_pretrained: without a tokenizer_config.json it lower-cases a cased tokenizer.json."""
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise TokenizerError(f"{path}: not a readable tokenizer.json ({error})") from error
    known = {name: value for name, value in options.items() if name not in SPECIAL_TOKENS or backend.token_to_id(value) is not None}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **known)


def _from_vocabulary(path: Path, lowercase: bool | None, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    try:
        tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if lowercase is None:
        lowercase = not any(_has_capital(token) for token in tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    missing = [options[role] for role in SPECIAL_TOKENS if options[role] not in vocabulary]
    if missing:
        raise TokenizerError(f"{path}: the vocabulary lacks {', '.join(missing)}")
    return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, **options)


def _has_capital(token: str) -> bool:
    return token != token.lower() and not _NOT_A_WORD.fullmatch(token)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _load_from_hub(name: str | Path) -> PreTrainedTokenizerFast:
    if isinstance(name, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise TokenizerError(f"{name}: no such folder (a tokenizer is a folder or the name of one on the Hugging Face hub)")
    try:
        with no_waiting_for_the_hub(name):
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{name}: no such folder, and loading it from the Hugging Face hub failed ({error})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerError(f"{name}: {type(tokenizer).__name__} is not backed by the tokenizers library")
    return tokenizer
