from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastbert.data import batches as batches_module
from fastbert.data.batches import PackedBatch, PretrainingBatches, held_out_batches
from fastbert.data.masking import IGNORE_INDEX
from fastbert.data.pairs import make_pairs
from fastbert.data.streams import Stream, generator
from fastbert.data.tokens import TokenizedCorpus

from .helpers import numbered_corpus

TENSORS = ("input_ids", "token_type_ids", "position_ids", "labels", "cu_seqlens", "next_sentence_label")


@pytest.fixture
def batches(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> PretrainingBatches:
    return PretrainingBatches(corpus, tokenizer, max_seq_length=48, tokens_per_batch=300, seed=3)


def same(first: PackedBatch, second: PackedBatch) -> bool:
    return first.max_seqlen == second.max_seqlen and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in TENSORS
    )


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


def test_steps_go_on_over_epochs_and_resume_anywhere(
    corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast, batches: PretrainingBatches
) -> None:
    first, second = batches.num_batches(0), batches.num_batches(1)
    total = first + second + 3
    straight = list(islice(batches.steps(), total))
    epochs = [*batches.epoch(0), *batches.epoch(1), *islice(batches.epoch(2), 3)]
    assert all(map(same, straight, epochs))
    for start in (0, 1, first - 1, first, first + second, total - 1):
        fresh = PretrainingBatches(corpus, tokenizer, max_seq_length=48, tokens_per_batch=300, seed=3)
        resumed = list(islice(fresh.steps(start), total - start))
        assert len(resumed) == total - start and all(map(same, resumed, straight[start:]))


def test_skipped_batches_are_not_made(batches: PretrainingBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    mask_tokens = batches_module.mask_tokens
    monkeypatch.setattr(batches_module, "mask_tokens", lambda *args, **kwargs: made.append(1) or mask_tokens(*args, **kwargs))
    next(batches.steps(batches.num_batches(0) + 4))
    assert len(made) == 1


def test_held_out_batches_are_fixed(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"max_seq_length": 48, "tokens_per_batch": 300, "seed": 11}
    whole = held_out_batches(corpus, tokenizer, **options)
    few = held_out_batches(corpus, tokenizer, **options, max_batches=4)
    assert len(few) == 4 < len(whole)
    assert all(map(same, few, whole))
    assert all(map(same, whole, PretrainingBatches(corpus, tokenizer, **options).epoch(0)))


def test_a_corpus_smaller_than_a_batch_is_one_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = PretrainingBatches(numbered_corpus([[5] * 3, [5] * 3]), tokenizer, max_seq_length=32, tokens_per_batch=10_000, seed=0)
    assert batches.num_batches() == 1
    assert 0 < batches.fill() < 0.02
    assert len(list(islice(batches.steps(), 5))) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seq_length": 7}, "max_seq_length must be at least 8, not 7"),
        ({"max_seq_length": 129}, "max_seq_length 129 is above the 128 tokens that the tokenizer allows"),
        ({"tokens_per_batch": 63}, "tokens_per_batch 63 is below max_seq_length 64: a batch must hold a whole sequence"),
        ({"seed": -1}, "seed must not be negative, it is -1"),
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
    for make in (PretrainingBatches, held_out_batches):
        with pytest.raises(ValueError, match=message):
            make(corpus, tokenizer, **{"max_seq_length": 64, "tokens_per_batch": 256, "seed": 0, **change})


def test_a_corpus_of_another_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    foreign = numbered_corpus([[100] * 10, [100] * 10])
    with pytest.raises(ValueError, match=f"holds token id 2004, the tokenizer has {len(tokenizer)} tokens"):
        PretrainingBatches(foreign, tokenizer, max_seq_length=64, tokens_per_batch=256, seed=0)


def test_a_negative_step_is_refused(batches: PretrainingBatches) -> None:
    with pytest.raises(ValueError, match="start_step must not be negative, it is -2"):
        next(batches.steps(-2))
