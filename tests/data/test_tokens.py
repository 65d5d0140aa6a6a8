from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from fastbert.data import encoding, tokens
from fastbert.data.corpus import CorpusError, Document
from fastbert.data.encoding import SentenceEncoder
from fastbert.data.sentences import split_sentences
from fastbert.data.tokenizer import SPECIAL_TOKENS, train_wordpiece
from fastbert.data.tokens import TokenizedCorpus, tokenize_documents

from .helpers import numbered_corpus, random_lengths, story


def by_sentence(corpus: TokenizedCorpus) -> list[list[list[int]]]:
    """Documents of sentences of ids."""
    bounds = corpus.sentence_offsets
    sentences = [corpus.ids[start:end].tolist() for start, end in zip(bounds[:-1], bounds[1:])]
    bounds = corpus.document_offsets
    return [sentences[start:end] for start, end in zip(bounds[:-1], bounds[1:])]


def directly(tokenizer: PreTrainedTokenizerFast, sentences: list[str]) -> list[list[int]]:
    """What the tokenizers library gives for whole sentences."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch(sentences, add_special_tokens=False)]


def encoded(encoder: SentenceEncoder, sentences: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(sentences)
    assert lengths.sum() == len(ids)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


# --- encoding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowercase", [True, False])
def test_encoding_by_words_gives_the_ids_of_whole_sentences(
    stories: list[Document], lowercase: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_MOST_WORDS_KEPT", 300)
    tokenizer = train_wordpiece((paragraph for document in stories for paragraph in document.paragraphs), 400, lowercase=lowercase)
    encoder = SentenceEncoder(tokenizer)
    draw = random.Random(3)
    characters = "aeßtÉİ\u0301\u0308Σ中文!.,-' \t\n\u00a0\u2028\u200b\u0000\u001c\ufffd😀0["
    odd = ["".join(draw.choices(characters, k=draw.randint(0, 25))) for _ in range(2000)]
    plain = [sentence for document in stories for paragraph in document.paragraphs for sentence in split_sentences(paragraph)]
    for sentences in (odd[:1000], plain, odd[1000:], ["", " ", "x" * 500], []):
        assert encoded(encoder, sentences) == (directly(tokenizer, sentences) or [[]])


def test_special_tokens_in_the_text_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = SentenceEncoder(tokenizer)
    ids = encoded(encoder, ["the [MASK] and [CLS][SEP] of the [PAD]"])[0]
    assert not set(ids) & {tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    assert len(ids) > 8
    assert tokenizer.tokenize("[MASK]") == ["[MASK]"], "the tokenizer itself must stay as it is"


def test_other_tokenizers_are_given_whole_sentences(tokenizer: PreTrainedTokenizerFast) -> None:
    def variant(change) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        change(backend)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)

    def replace_spaces(backend: Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence([normalizers.Replace("the sea", "nothing"), normalizers.Lowercase()])

    sentences = ["By the sea and the captain", "the old captain"]
    for tokenizer_variant in (
        variant(replace_spaces),
        variant(lambda backend: backend.add_tokens([AddedToken("old captain", normalized=False)])),
    ):
        assert encoded(SentenceEncoder(tokenizer_variant), sentences) == directly(tokenizer_variant, sentences)


def test_padding_and_truncation_of_the_tokenizer_are_ignored(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(length=64)
    backend.enable_truncation(max_length=4)
    padded = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)
    sentence = "The lighthouse keeper forgot the north wind."
    assert encoded(SentenceEncoder(padded), [sentence]) == directly(tokenizer, [sentence])
    assert backend.padding is not None and backend.truncation is not None


@pytest.mark.parametrize(("too_many", "dtype"), [(0, np.uint16), (1, np.int32)])
def test_ids_are_as_small_as_the_vocabulary_allows(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, too_many: int, dtype: type
) -> None:
    monkeypatch.setattr(encoding, "_LARGEST_UINT16_VOCABULARY", len(tokenizer) - too_many)
    ids, _ = SentenceEncoder(tokenizer).encode(["The quiet sea."])
    assert ids.dtype == dtype


# --- tokenize_documents ----------------------------------------------------------------------------------------------------


def test_documents_keep_their_sentences(
    stories: list[Document], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 500)
    seen: list[tuple[int, int]] = []
    corpus = tokenize_documents(iter(stories), tokenizer, progress=lambda *done: seen.append(done))
    expected = [
        directly(tokenizer, [sentence for paragraph in document.paragraphs for sentence in split_sentences(paragraph)])
        for document in stories
    ]
    assert by_sentence(corpus) == expected
    assert len(seen) > 5 and seen == sorted(seen) and seen[-1] == (len(stories), corpus.num_tokens)
    assert (corpus.num_documents, corpus.num_sentences) == (len(stories), sum(map(len, expected)))
    assert corpus.num_tokens == len(list(chain.from_iterable(chain.from_iterable(expected))))
    assert corpus.ids.dtype == np.uint16
    assert corpus.sentence_offsets.dtype == corpus.document_offsets.dtype == np.int64
    assert str(corpus) == f"60 documents, {corpus.num_sentences:,} sentences, {corpus.num_tokens:,} tokens"


def test_what_gives_no_tokens_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    nothing = "\u200d \x00"
    documents = [
        Document("empty", [nothing]),
        Document("a", ["The sea. " + nothing, nothing, "A gull."]),
        Document("none", []),
        Document("b", ["The pier."]),
        Document("empty", [nothing]),
    ]
    corpus = tokenize_documents(documents, tokenizer)
    assert by_sentence(corpus) == [directly(tokenizer, ["The sea.", "A gull."]), directly(tokenizer, ["The pier."])]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "0 of 0 documents give tokens"),
        ([Document("a", ["\x00"]), Document("b", ["Text."]), Document("c", ["\u200d"])], "1 of 3 documents give tokens"),
    ],
)
def test_fewer_than_two_documents_are_refused(tokenizer: PreTrainedTokenizerFast, documents: list[Document], message: str) -> None:
    with pytest.raises(CorpusError, match=message + ": next sentence prediction needs at least two"):
        tokenize_documents(documents, tokenizer)


# --- split -----------------------------------------------------------------------------------------------------------------


def test_whole_documents_are_held_out() -> None:
    corpus = numbered_corpus(random_lengths(300, seed=0))
    train, held_out = corpus.split(0.1, seed=5)
    assert 0.05 <= held_out.num_tokens / corpus.num_tokens <= 0.15
    everything = {tuple(chain.from_iterable(document)) for document in by_sentence(corpus)}
    parts = [{tuple(chain.from_iterable(document)) for document in by_sentence(part)} for part in (train, held_out)]
    assert parts[0] | parts[1] == everything and not parts[0] & parts[1]
    for part in (train, held_out):
        assert sorted(by_sentence(part)) == by_sentence(part), "documents and sentences keep their order"
    assert by_sentence(corpus.split(0.1, seed=5)[1]) == by_sentence(held_out)
    assert by_sentence(corpus.split(0.1, seed=6)[1]) != by_sentence(held_out)


def test_a_huge_document_is_not_held_out_for_a_small_part() -> None:
    corpus = numbered_corpus([[20] * 500, [20] * 500, *([[20] * 5] * 40)])
    for seed in range(20):
        train, held_out = corpus.split(0.05, seed)
        assert held_out.num_tokens <= 0.075 * corpus.num_tokens
        assert {len(document) for document in by_sentence(held_out)} == {5}
        assert train.num_tokens + held_out.num_tokens == corpus.num_tokens


@pytest.mark.parametrize("documents", [2, 3, 5])
def test_a_few_books_are_divided_at_their_ends(documents: int) -> None:
    corpus = numbered_corpus([[10] * 200] * documents)
    train, held_out = corpus.split(0.1, seed=0)
    assert train.num_documents == held_out.num_documents == documents
    for whole, kept, end in zip(by_sentence(corpus), by_sentence(train), by_sentence(held_out)):
        assert kept + end == whole and len(end) == 20


def test_a_document_of_one_sentence_stays_in_training() -> None:
    train, held_out = numbered_corpus([[3], [5] * 30, [5] * 2, [4]]).split(0.01, seed=0)
    assert [len(document) for document in by_sentence(train)] == [1, 29, 1, 1]
    assert [len(document) for document in by_sentence(held_out)] == [1, 1]


@pytest.mark.parametrize("lengths", [[[3], [4]], [[3] * 9, [4]]])
def test_a_corpus_too_small_to_divide(lengths: list[list[int]]) -> None:
    with pytest.raises(CorpusError, match="too small to hold out a part with two documents"):
        numbered_corpus(lengths).split(0.1, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="held_out_fraction must be between 0 and 1"):
        numbered_corpus([[3] * 9, [4] * 9]).split(fraction, seed=0)


def test_stories_are_reproducible() -> None:
    assert story(4, 3) == story(4, 3) != story(5, 3)
