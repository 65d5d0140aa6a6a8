"""What is measured: batches by name, and models by size or checkpoint."""

from __future__ import annotations

import pytest
import torch
import transformers

from benchmarks import bench, finetune, lengths, training
from benchmarks.lengths import Lengths
from benchmarks.workloads import (
    BATCH_LISTS,
    SIZES,
    WorkloadError,
    attended_pairs,
    config_for,
    model_title,
    names_of,
    packed_batch,
    padded_batch,
    set_of,
    workload,
    workloads,
)

TOY = {
    "toy": Lengths("Toy", 64, "three texts", {4: 1, 7: 2, 40: 1}),
    "same": Lengths("Same", 16, "texts of one length", {9: 1000}),
}


@pytest.mark.parametrize(
    ("spec", "name", "of_lengths", "padded_to"),
    [
        ("2x128", "2 x 128", (128, 128), 128),
        ("02x8", "2 x 8", (8, 8), 8),
        ("4xtoy", "4 of Toy lengths, padded to 64", (4, 7, 7, 40), 64),
        ("4xtoy/longest", "4 of Toy lengths, padded to the longest", (4, 7, 7, 40), 40),
        ("3xsame", "3 of Same lengths, padded to 16", (9, 9, 9), 16),
        ("3xsame/longest", "3 of Same lengths, padded to the longest", (9, 9, 9), 9),
        ("toy", "Toy lengths, padded to 64", (4,) * 8 + (7,) * 16 + (40,) * 8, 64),
        ("32xtoy", "Toy lengths, padded to 64", (4,) * 8 + (7,) * 16 + (40,) * 8, 64),
    ],
)
def test_names(spec, name, of_lengths, padded_to):
    made = workload(spec, TOY)
    assert (made.name, made.lengths, made.padded_to) == (name, of_lengths, padded_to)
    assert made.tokens == sum(of_lengths) and made.pairs == sum(n * n for n in of_lengths) == attended_pairs(of_lengths)
    assert made.has_padding == (min(of_lengths) < padded_to)
    assert made.described() == {"sequences": len(of_lengths), "tokens": sum(of_lengths), "padded_to": padded_to}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "expected such as 32x128"),
        ("32x", "expected such as 32x128"),
        ("-1x8", "expected such as 32x128"),
        ("32 x 128", "expected such as 32x128"),
        ("MNLI", "expected such as 32x128"),
        ("toy/shortest", "expected such as 32x128"),
        ("128", "expected SEQUENCESxTOKENS, both at least 1, such as 32x128"),
        ("0x8", "expected SEQUENCESxTOKENS"),
        ("8x0", "expected SEQUENCESxTOKENS"),
        ("8x16/longest", "expected SEQUENCESxTOKENS"),
        ("novels", "there are no lengths named novels; there are toy, same"),
        ("0xtoy", "expected at least 1 sequence"),
    ],
)
def test_what_is_no_batch(spec, message):
    with pytest.raises(WorkloadError) as error:
        workload(spec, TOY)
    assert message in str(error.value) and repr(spec) in str(error.value)


@pytest.mark.parametrize(
    ("counts", "sequences", "expected"),
    [
        ({4: 1, 7: 2, 40: 1}, 1, (7,)),  # the lower median
        ({4: 1, 7: 2, 40: 1}, 2, (4, 7)),  # at 1 and 3 of 4 texts
        ({4: 1, 7: 2, 40: 1}, 8, (4, 4, 7, 7, 7, 7, 40, 40)),
        ({7: 3, 4: 1}, 4, (4, 7, 7, 7)),  # in whatever order
        ({5: 1, 6: 1, 7: 1}, 3, (5, 6, 7)),
        ({5: 10**9, 6: 1}, 3, (5, 5, 5)),
    ],
)
def test_quantiles(counts, sequences, expected):
    assert Lengths("Toy", 64, "", counts).quantiles(sequences) == expected


@pytest.mark.parametrize("sequences", [1, 6, 7, 60, 997])
def test_quantiles_of_as_many_sequences_as_texts_are_the_texts(sequences):
    texts = torch.randint(3, 50, (sequences,), generator=torch.Generator().manual_seed(1)).sort().values.tolist()
    counts = {length: texts.count(length) for length in texts}
    assert Lengths("Toy", 64, "", counts).quantiles(sequences) == tuple(texts)
    assert Lengths("Toy", 64, "", counts).quantiles(3 * sequences) == tuple(n for n in texts for _ in range(3))


def test_each_batch_is_there_once():
    assert [of.name for of in workloads(("toy", "2x8", "32xtoy", "2x8", "02x8"), TOY)] == ["Toy lengths, padded to 64", "2 x 8"]
    assert workloads(("standard", "32x128")) == workloads(("standard",))


@pytest.mark.parametrize("name", BATCH_LISTS)
def test_lists_of_batches(name):
    made = workloads((name,))
    assert len(made) == len(BATCH_LISTS[name]) == len(names_of((name,)))
    assert all(of.padded_to <= 512 for of in made)
    if name == "by-length":
        assert {of.tokens for of in made} == {4096}
    if name == "by-sequences":
        assert [len(of.lengths) for of in made] == [1, 2, 4, 8, 16, 32]


def test_the_embedded_sets_make_batches():
    for name, of in lengths.embedded().items():
        made = workload(name)
        assert len(made.lengths) == 32 and max(made.lengths) <= made.padded_to == of.padded_to
        assert sum(made.lengths) / 32 == pytest.approx(of.mean, rel=0.06)
        assert set_of(f"64x{name}/longest") == name
    assert set_of("32x128") is set_of("32x") is None


def test_padded_batch():
    of = workload("8xtoy", TOY)
    batch = padded_batch(of, vocabulary=50)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (8, 64) and ids.dtype == mask.dtype == torch.int64
    found = mask.sum(1).tolist()
    assert sorted(found) == list(of.lengths) and found != sorted(found)  # shuffled
    assert torch.equal(mask, (torch.arange(64) < mask.sum(1, keepdim=True)).long())
    assert ids[mask == 1].min() >= 25 and ids.max() < 50 and not ids[mask == 0].any()
    again = padded_batch(of, vocabulary=50)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert padded_batch(of)["input_ids"].max() > 1000


def test_packed_batch_has_the_real_tokens_in_order():
    batch = padded_batch(workload("4xtoy", TOY), vocabulary=50)
    packed = packed_batch({**batch, "labels": torch.arange(4)})
    real = batch["attention_mask"].sum(1)
    assert packed["cu_seq_lens_q"].tolist() == [0, *real.cumsum(0).tolist()] and packed["max_length_q"] == 40
    assert torch.equal(packed["input_ids"][0], torch.cat([row[:n] for row, n in zip(batch["input_ids"], real)]))
    assert torch.equal(packed["position_ids"][0], torch.cat([torch.arange(n) for n in real]))
    assert packed["labels"].tolist() == [0, 1, 2, 3] and "attention_mask" not in packed


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    config = config_for(size, num_labels=5)
    assert (config.num_hidden_layers, config.hidden_size) == SIZES[size]
    assert config.hidden_size // config.num_attention_heads == 64 and config.intermediate_size == 4 * config.hidden_size
    assert (config.vocab_size, config.num_labels, model_title(size)) == (30522, 5, f"bert-{size}")


def test_a_checkpoint(toy_model):
    config = config_for(str(toy_model), num_labels=3)
    assert (config.hidden_size, config.max_position_embeddings, config.num_labels) == (32, 64, 3)
    assert model_title(str(toy_model)) == toy_model.name


def test_what_is_no_model(tmp_path):
    transformers.RobertaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "roberta")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rubbish").mkdir()
    (tmp_path / "rubbish" / "config.json").write_text("{no JSON")
    with pytest.raises(WorkloadError, match="is of type 'roberta'; the benchmarks measure models of type 'bert'"):
        config_for(str(tmp_path / "roberta"))
    for name in ("empty", "rubbish", "nowhere"):
        with pytest.raises(WorkloadError, match="is neither one of tiny, mini, .* nor a checkpoint") as error:
            config_for(str(tmp_path / name))
        assert name in str(error.value)


def test_a_checkpoint_with_a_head_of_another_size_is_fine_tuned_with_a_new_one(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=1,
        problem_type="regression",
    )  # fmt: skip
    saved = transformers.BertForSequenceClassification(config)
    saved.save_pretrained(tmp_path)
    of = config_for(str(tmp_path), **finetune.TASK.config)
    model = training.model_of(finetune.TASK, transformers, str(tmp_path), of)
    assert model.classifier.weight.shape == (3, 32)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, saved.bert.encoder.layer[0].output.dense.weight)
    batch = finetune.with_labels(padded_batch(workload("2x8"), 50))
    assert model(**batch).loss.item() == pytest.approx(torch.tensor(3.0).log().item(), rel=0.3)  # a cross-entropy of 3 classes


@pytest.mark.parametrize("suite", ["inference", "finetune", "pretrain"])
def test_a_model_with_fewer_positions_than_the_batch(suite, toy_model):
    problems = bench.Options(suite, "cpu", model=str(toy_model), batches=("2x64", "2x65")).problems()
    assert problems == [f"--batches: 65 tokens, and {toy_model} takes 64 at most"]
    assert bench.Options(suite, "cpu", model=str(toy_model), batches=("2x64",)).problems() == []
