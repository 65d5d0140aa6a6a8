from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import fastbert
from fastbert.data.batches import PackedBatch, PretrainingBatches
from fastbert.data.corpus import Document
from fastbert.data.masking import IGNORE_INDEX
from fastbert.data.pairs import make_pairs
from fastbert.data.passages import SMALLEST_GAP, make_passages
from fastbert.data.streams import Stream, generator
from fastbert.data.tokenizer import train_wordpiece
from fastbert.data.tokens import TokenizedCorpus, tokenize_documents

from .helpers import TENSORS, numbered_corpus, same


@pytest.fixture
def batches(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> PretrainingBatches:
    return PretrainingBatches(corpus, tokenizer, max_seq_length=48, tokens_per_batch=300, seed=3)


def originals(batch: PackedBatch) -> torch.Tensor:
    """The ids before masking, where they are known: masked positions hold their label."""
    return torch.where(batch.labels == IGNORE_INDEX, batch.input_ids, batch.labels)


def test_packing(batches: PretrainingBatches, tokenizer: PreTrainedTokenizerFast) -> None:
    for batch in batches.epoch(0):
        total = batch.num_tokens
        assert 0 < total <= 300
        for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
            assert getattr(batch, name).shape == (total,) and getattr(batch, name).dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32 and batch.next_sentence_label.dtype == torch.int64
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == total and len(bounds) == batch.num_sequences + 1
        assert batch.max_seqlen == max(end - start for start, end in zip(bounds, bounds[1:])) <= 48
        for start, end in zip(bounds, bounds[1:]):
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            ids = originals(batch)[start:end].tolist()
            middle = ids.index(tokenizer.sep_token_id) + 1
            assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
            assert ids.count(tokenizer.sep_token_id) == 2 and middle < len(ids) - 1
            assert batch.token_type_ids[start:end].tolist() == [0] * middle + [1] * (end - start - middle)
            assert (batch.labels[start:end] != IGNORE_INDEX).sum() == max(1, round(0.15 * (end - start - 3)))
            assert batch.labels[start] == batch.labels[end - 1] == IGNORE_INDEX


def pair_texts(batch: PackedBatch) -> list[tuple[int, ...]]:
    """The ids of each sequence, unmasked, with its label."""
    bounds, ids, labels = batch.cu_seqlens.tolist(), originals(batch).tolist(), batch.next_sentence_label.tolist()
    return [(label, *ids[start:end]) for start, end, label in zip(bounds, bounds[1:], labels)]


def test_every_pair_of_an_epoch_is_in_exactly_one_batch_in_another_order(
    batches: PretrainingBatches, corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    for epoch in (0, 3):
        made = list(batches.epoch(epoch))
        pairs = make_pairs(corpus, 48, generator(3, Stream.SEQUENCES, epoch))
        ids = pairs.assemble(0, len(pairs), cls_id=tokenizer.cls_token_id, sep_id=tokenizer.sep_token_id)
        texts = [(int(label), *part.tolist()) for part, label in zip(np.split(ids, pairs.offsets[1:-1]), pairs.next_sentence_label)]
        found = [text for batch in made for text in pair_texts(batch)]
        assert sorted(found) == sorted(texts)
        places = {}
        for number, text in enumerate(texts):
            places.setdefault(text, number)
        order = np.array([places[text] for text in found])
        assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2, "the order of the corpus is gone"
        assert len(made) == batches.num_batches(epoch) > 5
        fill = np.mean([batch.num_tokens for batch in made[:-1]]) / 300
        assert batches.fill(epoch) == pytest.approx(fill)
        assert fill > 0.97


def test_padded_holds_the_same_tokens(batches: PretrainingBatches, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = next(batches.epoch(0))
    padded = batch.padded(pad_id=tokenizer.pad_token_id)
    shape = (batch.num_sequences, batch.max_seqlen)
    real = padded["attention_mask"].bool()
    fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
    assert set(padded) == {*fills, "next_sentence_label"}
    for name, fill in fills.items():
        assert padded[name].shape == shape and padded[name].dtype == torch.int64
        assert (padded[name][~real] == fill).all()
    for name in ("input_ids", "token_type_ids", "labels"):
        assert torch.equal(padded[name][real], getattr(batch, name))
    assert torch.equal(real.sum(1), batch.cu_seqlens.diff().long())
    assert (real.int().diff(dim=1) <= 0).all(), "padding stands behind the tokens"
    assert torch.equal(padded["next_sentence_label"], batch.next_sentence_label)
    assert (batch.padded(pad_id=77)["input_ids"][~real] == 77).all()


def test_model_inputs(batches: PretrainingBatches) -> None:
    batch = next(batches.epoch(0))
    inputs = batch.model_inputs()
    for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
        assert inputs[name].shape == (1, batch.num_tokens)
        assert torch.equal(inputs[name][0], getattr(batch, name))
    assert inputs["cu_seq_lens_q"] is inputs["cu_seq_lens_k"] is batch.cu_seqlens
    assert inputs["max_length_q"] == inputs["max_length_k"] == batch.max_seqlen
    assert inputs["next_sentence_label"] is batch.next_sentence_label
    assert len(inputs) == 9


def test_to_moves_every_tensor(batches: PretrainingBatches) -> None:
    batch = next(batches.epoch(0))
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in TENSORS)
    assert moved.max_seqlen == batch.max_seqlen and moved.num_tokens == batch.num_tokens
    assert same(batch.to(torch.device("cpu")), batch)


def test_two_loaders_of_a_seed_agree_and_others_do_not(
    corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast, batches: PretrainingBatches
) -> None:
    def loader(seed: int) -> PretrainingBatches:
        return PretrainingBatches(corpus, tokenizer, max_seq_length=48, tokens_per_batch=300, seed=seed)

    torch.manual_seed(1)
    first = list(batches.epoch(1))
    torch.manual_seed(2)
    np.random.seed(2)
    again = list(loader(3).epoch(1))
    assert len(first) == len(again) and all(map(same, first, again))
    assert not same(first[0], next(loader(4).epoch(1)))
    assert not same(first[0], next(loader(3).epoch(0)))


def test_masks_are_new_in_every_epoch_and_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    """Batches of one sequence of 43 tokens each, which differ in nothing but their text: only the masks can vary."""
    corpus = numbered_corpus([[40]] * 5)
    batches = PretrainingBatches(corpus, tokenizer, max_seq_length=43, tokens_per_batch=43, seed=0)
    masks = [
        tuple((batch.labels != IGNORE_INDEX).nonzero().flatten().tolist()) for epoch in range(10) for batch in batches.epoch(epoch)
    ]
    assert len(masks) == len(set(masks)) == 50


def test_an_epoch_begins_anywhere(batches: PretrainingBatches, corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    halves = [corpus._select(np.arange(corpus.num_sentences) % 2 == half) for half in range(2)]
    shards = PretrainingBatches(halves, tokenizer, max_seq_length=48, tokens_per_batch=300, seed=3, block_tokens=1)
    for made in (batches, shards):
        whole = list(made.epoch(2))
        for start in (1, 5, len(whole) - 1, len(whole)):
            rest = list(made.epoch(2, start))
            assert len(rest) == len(whole) - start and all(map(same, rest, whole[start:]))


def test_a_corpus_smaller_than_a_batch_is_one_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = PretrainingBatches(numbered_corpus([[5] * 3, [5] * 3]), tokenizer, max_seq_length=32, tokens_per_batch=10_000, seed=0)
    assert batches.num_batches() == 1
    assert 0 < batches.fill() < 0.02
    assert len(list(batches.epoch(0))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seq_length": 7}, "max_seq_length must be at least 8, not 7"),
        ({"max_seq_length": 129}, "max_seq_length 129 is above the 128 tokens that the tokenizer allows"),
        ({"tokens_per_batch": 63}, "tokens_per_batch 63 is below max_seq_length 64: a batch must hold a whole sequence"),
        ({"seed": -1}, "seed must lie between 0 and 18446744073709551615, it is -1"),
        ({"seed": 2**64}, "it is 18446744073709551616"),
    ],
)
def test_bad_sizes_are_refused(
    corpus: TokenizedCorpus,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, int],
    message: str,
) -> None:
    monkeypatch.setattr(tokenizer, "model_max_length", 128)
    with pytest.raises(ValueError, match=message):
        PretrainingBatches(corpus, tokenizer, **{"max_seq_length": 64, "tokens_per_batch": 256, "seed": 0, **change})


def test_a_corpus_of_another_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    foreign = numbered_corpus([[100] * 10, [100] * 10])
    with pytest.raises(ValueError, match=f"holds token id 2004, the tokenizer has {len(tokenizer)} tokens"):
        PretrainingBatches(foreign, tokenizer, max_seq_length=64, tokens_per_batch=256, seed=0)


def _holds(text: list[int], part: list[int]) -> bool:
    return any(text[start : start + len(part)] == part for start in range(len(text) - len(part) + 1))


def test_sequences_without_pairs(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    batches = PretrainingBatches(corpus, tokenizer, max_seq_length=48, tokens_per_batch=300, seed=3, objective="mlm")
    found = []
    for batch in batches.epoch(0):
        bounds, ids = batch.cu_seqlens.tolist(), originals(batch).tolist()
        assert batch.next_sentence_label is None and batch.num_sequences == len(bounds) - 1
        assert not batch.token_type_ids.any()
        assert "next_sentence_label" not in batch.model_inputs() and "next_sentence_label" not in batch.padded(0)
        assert len(batch.model_inputs()) == 8 and batch.padded(0)["input_ids"].shape[0] == batch.num_sequences
        assert batch.to("cpu").next_sentence_label is None
        found += [ids[start + 1 : end - 1] for start, end in zip(bounds, bounds[1:])]
    passages = make_passages(corpus, 48)
    texts = [corpus.ids[start : start + length].tolist() for start, length in zip(passages.a_starts, passages.a_lengths)]
    # All but those that were divided to fill what the others' batches had left.
    divided = [text for text in texts if text not in found]
    assert len(divided) < 0.2 * len(texts) and sum(map(len, found)) == sum(map(len, texts))
    parts = [text for text in found if text not in texts]
    assert all(any(_holds(text, part) for text in divided) for part in parts) and found[: len(texts)] != texts
    assert batches.fill() > 1 - SMALLEST_GAP / 300


def test_static_pairs_are_those_of_epoch_0_in_another_order_under_other_masks(
    corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    half = len(corpus.document_offsets) // 2
    shards = [corpus._select(np.arange(corpus.num_sentences) < corpus.document_offsets[half]), corpus]
    options = {"max_seq_length": 48, "tokens_per_batch": 300, "seed": 3, "block_tokens": 1}
    static = PretrainingBatches(shards, tokenizer, **options, static_pairs=True)
    epochs = [list(static.epoch(epoch)) for epoch in range(3)]
    texts = [[text for batch in epoch for text in pair_texts(batch)] for epoch in epochs]
    assert texts[0] != texts[1] != texts[2] and sorted(texts[0]) == sorted(texts[1]) == sorted(texts[2])
    masked = [{tuple(batch.input_ids.tolist()) for batch in epoch} for epoch in epochs]
    assert not masked[0] & masked[1]
    dynamic = PretrainingBatches(shards, tokenizer, **options)
    assert all(map(same, dynamic.epoch(0), epochs[0]))
    assert sorted(text for batch in dynamic.epoch(1) for text in pair_texts(batch)) != sorted(texts[1])


def test_masks_are_of_the_kind_that_was_asked_for(stories: list[Document]) -> None:
    tokenizer = train_wordpiece(stories[0].paragraphs, 200)  # which knows a few of the words of the other stories
    corpus = tokenize_documents(stories, tokenizer)
    pieces = [token.startswith("##") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    options = {"max_seq_length": 48, "tokens_per_batch": 300, "seed": 3, "mlm_probability": 0.3}
    for masking, split in (("token", True), ("whole-word", False), ("span", False)):
        halves = chosen = ordinary = 0
        for batch in PretrainingBatches(corpus, tokenizer, masking=masking, **options).epoch(0):
            asked = batch.labels != IGNORE_INDEX
            ids = originals(batch)
            goes_on = torch.tensor(pieces)[ids[1:]] & (ids[:-1] > tokenizer.mask_token_id)  # truncation cuts words
            halves += int((goes_on & (asked[1:] != asked[:-1])).sum())
            chosen, ordinary = chosen + int(asked.sum()), ordinary + batch.num_tokens - 3 * batch.num_sequences
        assert (halves > 20) == split, masking
        assert abs(chosen / ordinary - 0.3) < 0.02


def test_what_a_tokenizer_cannot_do_is_refused_at_once(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"max_seq_length": 48, "tokens_per_batch": 300, "seed": 3}
    for change, message in (
        ({"objective": "nsp"}, "objective is 'nsp', expected one of mlm-nsp, mlm"),
        ({"masking": "words"}, "masking is 'words', expected one of token, whole-word, span"),
        ({"mlm_probability": 0.0}, "probability must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PretrainingBatches(corpus, tokenizer, **options, **change)


@pytest.mark.parametrize("objective", ["mlm-nsp", "mlm"])
def test_a_batch_of_fixed_shape_has_the_same_loss_and_gradients(
    corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast, objective: str
) -> None:
    batches = PretrainingBatches(corpus, tokenizer, max_seq_length=48, tokens_per_batch=300, seed=3, objective=objective)
    tokens, sequences = batches.shape
    config = fastbert.BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = (fastbert.BertForPreTraining if objective == "mlm-nsp" else fastbert.BertForMaskedLM)(config).train()

    def loss_and_gradients(batch: PackedBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(1)  # the dropout masks of the tokens that both have are the same
        model.zero_grad()
        loss = model(**batch.model_inputs()).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    made = list(batches.epoch(0))
    for batch in (made[0], made[1], made[-1]):
        fixed = batch.with_shape(tokens, sequences, max_seqlen=48, pad_id=tokenizer.pad_token_id)
        assert fixed.num_tokens == tokens and fixed.num_sequences == sequences and fixed.max_seqlen == 48
        assert fixed.cu_seqlens[-1] == tokens and (fixed.cu_seqlens.diff() <= 48).all() and (fixed.cu_seqlens.diff() == 0).any()
        assert fixed.cu_seqlens.dtype == torch.int32
        starts = torch.repeat_interleave(fixed.cu_seqlens[:-1], fixed.cu_seqlens.diff())
        assert torch.equal(fixed.position_ids, torch.arange(tokens) - starts)
        assert (fixed.input_ids[batch.num_tokens :] == tokenizer.pad_token_id).all()
        loss, gradients = loss_and_gradients(batch)
        for same_shape in (fixed, batches.filled(batch)):
            fixed_loss, fixed_gradients = loss_and_gradients(same_shape)
            torch.testing.assert_close(fixed_loss, loss, rtol=1e-6, atol=0)
            assert len(gradients) == len(fixed_gradients) > 30
            for gradient, expected in zip(fixed_gradients, gradients):
                assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9


@pytest.mark.parametrize("masking", ["token", "whole-word", "span"])
@pytest.mark.parametrize("objective", ["mlm-nsp", "mlm"])
def test_all_batches_are_filled_to_one_shape(
    corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast, objective: str, masking: str
) -> None:
    """Their labelled rows among them: every one of a batch, then one without a label."""
    batches = PretrainingBatches(
        corpus, tokenizer, max_seq_length=48, tokens_per_batch=1024, seed=3, objective=objective, masking=masking
    )
    shapes = set()
    for batch in batches.epoch(0):
        filled = batches.filled(batch)
        shapes.add(tuple((name, getattr(filled, name).shape) for name in TENSORS if getattr(filled, name) is not None))
        count = int((batch.labels != IGNORE_INDEX).sum())
        rows = filled.labelled_rows
        assert rows.shape == (batches.most_labels,) and batches.most_labels % 8 == 0
        assert torch.equal(rows[:count], (batch.labels != IGNORE_INDEX).nonzero().squeeze(1))
        assert (filled.labels[rows[count:]] == IGNORE_INDEX).all()
        assert filled.to("cpu").model_inputs()["labelled_rows"] is rows and "labelled_rows" not in batch.model_inputs()
    assert len(shapes) == 1


def test_a_batch_with_too_many_labels_stays_as_it_is(batches: PretrainingBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batches.batch(0, 0, 0)
    count = int((batch.labels != IGNORE_INDEX).sum())
    for most, fits in ((count, True), (count - 1, False)):
        monkeypatch.setattr(PretrainingBatches, "most_labels", most)
        assert (batches.filled(batch) is not None) == fits
    with pytest.raises(ValueError, match=f"{count} of 300 tokens have a label, which cannot be filled up to {count - 1}"):
        batch.with_shape(*batches.shape, max_seqlen=48, pad_id=0, num_labels=count - 1)


def test_a_shape_that_is_too_small_is_refused(batches: PretrainingBatches) -> None:
    batch = next(batches.epoch(0))
    fits = {"num_tokens": batch.num_tokens + 10, "num_sequences": batch.num_sequences + 2, "max_seqlen": 48, "pad_id": 0}
    assert batch.with_shape(**fits).num_tokens == batch.num_tokens + 10
    for change in (
        {"num_tokens": batch.num_tokens - 1},
        {"num_sequences": batch.num_sequences - 1},
        {"num_sequences": batch.num_sequences},
        {"num_tokens": batch.num_tokens + 97},
        {"max_seqlen": batch.max_seqlen - 1},
    ):
        with pytest.raises(
            ValueError, match=f"a batch of {batch.num_tokens} tokens in {batch.num_sequences} sequences .* cannot be"
        ):
            batch.with_shape(**{**fits, **change})


def test_every_batch_fits_the_shape(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    """Also where most documents are much shorter than the corpus makes them look."""
    uneven = numbered_corpus([[2]] * 60 + [[2] * 30])
    for text in (corpus, uneven):
        for objective in ("mlm-nsp", "mlm"):
            batches = PretrainingBatches(text, tokenizer, max_seq_length=32, tokens_per_batch=128, seed=0, objective=objective)
            for batch in batches.epoch(0):
                assert batch.with_shape(*batches.shape, max_seqlen=32, pad_id=0).num_tokens == 128


def test_batches_of_shards(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    """Pairs come from one block each, and a block's random segments from its own documents."""
    half = corpus.document_offsets[len(corpus.document_offsets) // 2]
    parts = [corpus._select(np.arange(corpus.num_sentences) < half), corpus._select(np.arange(corpus.num_sentences) >= half)]
    options = {"max_seq_length": 48, "tokens_per_batch": 300, "seed": 0}
    batches = PretrainingBatches(parts, tokenizer, **options, block_tokens=1)
    assert batches.num_blocks() == 2
    for block in range(2):
        part = parts[batches.blocks.shards(0, block)[0]]
        pairs = make_pairs(part, 48, generator(0, Stream.SEQUENCES, 0, block))
        found = [text for n in range(batches.num_batches_in_block(0, block)) for text in pair_texts(batches.batch(0, block, n))]
        ids = pairs.assemble(0, len(pairs), cls_id=tokenizer.cls_token_id, sep_id=tokenizer.sep_token_id)
        texts = [(int(label), *row.tolist()) for row, label in zip(np.split(ids, pairs.offsets[1:-1]), pairs.next_sentence_label)]
        assert sorted(found) == sorted(texts)
    small = [batch.num_tokens < 250 for batch in batches.epoch(0)]
    assert sum(small) <= 2, "at most one at the end of each block"
    whole = PretrainingBatches(parts, tokenizer, **options)
    assert whole.num_blocks() == 1
