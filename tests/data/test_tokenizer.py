from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from fastbert.data.corpus import CorpusError, Document
from fastbert.data.encoding import SentenceEncoder
from fastbert.data.tokenizer import SPECIAL_TOKENS, TokenizerError, load_tokenizer, save_tokenizer, train_wordpiece

SENTENCE = "Every SAILOR remembered the quiet sea, didn't he? Café 1912."
VOCABULARY = [*SPECIAL_TOKENS.values(), *"abcdefgh", *("##" + letter for letter in "abcdefgh"), "bad", "##ed"]


def texts(stories: list[Document]) -> list[str]:
    return [paragraph for document in stories for paragraph in document.paragraphs]


def write_vocabulary(folder: Path, tokens: list[str]) -> Path:
    (folder / "vocab.txt").write_text("".join(token + "\n" for token in tokens), encoding="utf-8")
    return folder


def test_ids_and_template_are_those_of_bert(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS.values()] == [0, 1, 2, 3, 4]
    encoded = tokenizer("the sea", "a gull")
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    middle = tokens.index("[SEP]") + 1
    assert (tokens[0], tokens[-1], tokens.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    assert encoded["token_type_ids"] == [0] * middle + [1] * (len(tokens) - middle)
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "the sea a gull"


def test_the_vocabulary_is_laid_out_and_free_of_repeats(tokenizer: PreTrainedTokenizerFast) -> None:
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    kinds = [0 if token in SPECIAL_TOKENS.values() else len(token.removeprefix("##")) > 1 and 2 or 1 for token in by_id]
    assert kinds == sorted(kinds)
    assert {"captain", "lighthouse"} <= set(by_id)
    assert len(tokenizer) <= 400


def test_training_gives_the_same_vocabulary_on_every_run() -> None:
    # Random letters make countless ties between pairs, which an arbitrary order of characters would break differently.
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyzßαβγδ" + "".join(map(chr, range(0x0430, 0x0450)))
    lines = [" ".join("".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(12)) for _ in range(400)]
    vocabularies = [train_wordpiece(iter(lines), 600).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert len(vocabularies[0]) == 600


def test_lowercase_is_a_choice(stories: list[Document]) -> None:
    cased = train_wordpiece(texts(stories), 400, lowercase=False)
    assert "[UNK]" not in cased.tokenize("The old captain")
    assert cased.decode(cased("The captain").input_ids, skip_special_tokens=True) == "The captain"
    uncased = train_wordpiece(["the cafe was open " * 3], 200)
    assert uncased.tokenize("THE CAFÉ") == uncased.tokenize("the cafe")


def test_rare_characters_make_way_in_a_small_vocabulary() -> None:
    common = "съешь ещё этих мягких французских булок , да выпей чаю : 0123456789 в чащах юга жил бы цитрус ? да ! "
    rare = "".join(map(chr, range(0x0250, 0x02B0)))
    characters = {token for token in train_wordpiece([common * 50, rare], 300, lowercase=False).get_vocab() if len(token) == 1}
    assert len(characters) == 64
    assert set(common.replace(" ", "")) <= characters


def test_only_characters_that_can_continue_a_word_have_a_continuation() -> None:
    vocabulary = train_wordpiece(["some words, some more; 中文 and dashes - of all kinds! " * 3], 300).get_vocab()
    assert {",", ";", "!", "-", "中", "文", "o"} <= set(vocabulary)
    assert not {"##,", "##;", "##!", "##-", "##中", "##文"} & set(vocabulary)
    assert "##o" in vocabulary


@pytest.mark.parametrize("vocab_size", [0, 199])
def test_a_tiny_vocabulary_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size must be at least 200, not {vocab_size}"):
        train_wordpiece(["some text"], vocab_size)


@pytest.mark.parametrize("lines", [[], ["", " \n\t", "\x00"]])
def test_a_vocabulary_needs_text(lines: list[str]) -> None:
    with pytest.raises(CorpusError, match="no text to train a vocabulary on"):
        train_wordpiece(lines, 1000)


@pytest.mark.parametrize("with_model_config", [False, True])
@pytest.mark.parametrize("lowercase", [False, True])
def test_a_saved_tokenizer_is_loaded_by_transformers_and_by_us(
    stories: list[Document], tmp_path: Path, lowercase: bool, with_model_config: bool
) -> None:
    tokenizer = train_wordpiece(texts(stories), 400, lowercase=lowercase)
    tokenizer.model_max_length = 96
    tokenizer.save_pretrained(tmp_path)
    if with_model_config:
        BertConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded(SENTENCE, "The end.").data == tokenizer(SENTENCE, "The end.").data
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.model_max_length == 96
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(SENTENCE).data == tokenizer(SENTENCE).data


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_an_os_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*tokenizer\.json: No space left on device"):
        save_tokenizer(tokenizer, tmp_path)


def test_padding_and_truncation_baked_into_a_tokenizer_json_are_turned_off(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(length=128)
    backend.enable_truncation(max_length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.backend_tokenizer.padding is None and loaded.backend_tokenizer.truncation is None
    assert loaded(SENTENCE)["input_ids"] == tokenizer(SENTENCE)["input_ids"]


def test_special_tokens_that_a_tokenizer_json_does_not_mark_are_no_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in parts["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    text = "the [MASK] and [CLS] sea [SEP]"
    assert SentenceEncoder(loaded).encode([text])[0].tolist() == SentenceEncoder(tokenizer).encode([text])[0].tolist()
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_cased_tokenizer_json_stays_cased_without_a_config(stories: list[Document], tmp_path: Path) -> None:
    tokenizer = train_wordpiece(texts(stories), 400, lowercase=False)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    BertConfig().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).tokenize(SENTENCE) == tokenizer.tokenize(SENTENCE)


def test_a_vocab_txt_alone_is_enough(tmp_path: Path) -> None:
    loaded = load_tokenizer(write_vocabulary(tmp_path, VOCABULARY))
    assert loaded.tokenize("BADed [MASK]") == ["bad", "##ed", "[MASK]"]
    assert loaded("bad", "a")["token_type_ids"] == [0, 0, 0, 1, 1]
    cased = load_tokenizer(write_vocabulary(tmp_path, [*VOCABULARY, "Bad"]))
    assert cased.tokenize("Bad BAD") == ["Bad", "[UNK]"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 64}))
    told = load_tokenizer(tmp_path)
    assert (told.tokenize("Bad"), told.model_max_length) == (["bad"], 64)


def test_special_tokens_may_have_other_names(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, ["<blank>" if token == "[MASK]" else token for token in VOCABULARY])
    with pytest.raises(TokenizerError, match=r"vocab\.txt: the vocabulary lacks \[MASK\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<blank>", "special": True}}))
    assert load_tokenizer(tmp_path).mask_token_id == 4


@pytest.mark.parametrize("token", ["[MASK]", "[PAD]", "[CLS]", "[SEP]"])
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path: Path, token: str) -> None:
    write_vocabulary(tmp_path, [entry for entry in VOCABULARY if entry != token])
    with pytest.raises(TokenizerError, match=rf"vocab\.txt: the vocabulary lacks \{token[:-1]}\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "json").mkdir()
    vocabulary = {entry: index for index, entry in enumerate(VOCABULARY) if entry != token}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    (tmp_path / "json" / "tokenizer.json").write_text(json.dumps({"model": {**model, "vocab": vocabulary}}))
    with pytest.raises(TokenizerError, match=rf"json: the tokenizer has no {token[1:-1].lower()}_token \(\{token[:-1]}\] is not"):
        load_tokenizer(tmp_path / "json")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="the folder holds neither tokenizer.json nor vocab.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="/no/such/folder: no such folder"):
        load_tokenizer("/no/such/folder")
    with pytest.raises(TokenizerError, match="gone: no such folder"):
        load_tokenizer(tmp_path / "gone")
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(TokenizerError, match=r"vocab\.txt: not UTF-8 \(invalid start byte at byte 6\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a readable tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: expected a JSON object, found list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)


def test_a_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(TokenizerError, match="nobody/bert: no such folder, and loading .* failed .We couldn't connect"):
        load_tokenizer("nobody/bert")


def test_a_hub_name_is_loaded(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(length=128)
    hub = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", {"nobody/bert": hub}.__getitem__)
    assert load_tokenizer("nobody/bert") is hub
    assert hub.backend_tokenizer.padding is None
    assert hub("the sea")["input_ids"] == tokenizer("the sea")["input_ids"]
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: object())
    with pytest.raises(TokenizerError, match="object is not backed by the tokenizers library"):
        load_tokenizer("nobody/bert")
