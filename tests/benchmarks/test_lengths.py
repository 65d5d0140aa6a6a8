"""Histograms of token counts: counted from files as their publishers write them, embedded, and behind ``--data``."""

from __future__ import annotations

import gzip
import json

import pytest

from benchmarks import bench, lengths
from benchmarks.lengths import SETS, Lengths, counted, embedded, read_sets, write_sets
from fastbert.data.errors import DataError
from fastbert.data.tokenizer import load_tokenizer

# In the toy vocabulary each of these words is one token.
SENTENCES = ["the film is good", "the book was bad", "the song"]


@pytest.fixture
def folder(tmp_path):
    """SST-2, MNLI, SQuAD and Wikipedia in small."""
    sst2 = tmp_path / "glue" / "SST-2" / "dev.tsv"
    mnli = tmp_path / "glue" / "MNLI" / "dev_matched.tsv"
    squad = tmp_path / "qa" / "squad_v1.1" / "dev-v1.1.json.gz"
    wikipedia = tmp_path / "pretrain" / "wikipedia" / "part.txt.gz"
    for path in (sst2, mnli, squad, wikipedia):
        path.parent.mkdir(parents=True)
    sst2.write_text("sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in SENTENCES))
    mnli.write_text(
        "index\tsentence1\tsentence2\tgold_label\n"
        "0\tthe film is good\tthe film\tneutral\n1\tthe song\tthe song\tentailment\n2\tthe " + "film " * 200 + "\tthe\tneutral\n"
    )
    context = " ".join(["the film is good ."] * 100)  # 500 tokens: two windows of 384
    answer = {"text": "the film", "answer_start": 0}
    questions = [{"id": "1", "question": "who is good ?", "answers": [answer]}]
    short = [{"id": "2", "question": "where ?", "answers": [answer]}]
    paragraphs = [{"context": context, "qas": questions}, {"context": "the film is good .", "qas": short}]
    with gzip.open(squad, "wt") as file:
        json.dump({"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]}, file)
    with gzip.open(wikipedia, "wt") as file:
        file.write("the film is good\nthe song\n\nthe book was bad\n" + "the " * 600 + "\n")
    return tmp_path


EXPECTED = {
    "sst2": {4: 1, 6: 2},  # [CLS] and [SEP]
    "mnli": {7: 1, 9: 1, 128: 1},  # the third pair is cut
    "squad": {10: 1, 258: 1, 384: 1},  # 500 tokens of context in windows of 377 beside the question, each 249 further
    "wikipedia": {4: 1, 6: 2, 512: 1},
}


def test_counting(folder, toy_tokenizer):
    found = counted(folder, toy_tokenizer)
    assert list(found) == ["sst2", "mnli", "squad", "wikipedia"]
    for name in found:
        assert found[name].counts == EXPECTED[name], name
        assert list(found[name].counts) == sorted(found[name].counts)
        assert (found[name].title, found[name].padded_to) == (SETS[name].title, SETS[name].padded_to)


def test_only_what_is_named_is_counted(folder, toy_tokenizer, monkeypatch):
    def never(path, tokenizer):
        raise AssertionError(f"{path} was read")

    for name in ("sst2", "squad", "wikipedia"):
        monkeypatch.setitem(SETS, name, lengths.Counted("", 1, "", SETS[name].path, never))
    assert list(counted(folder, toy_tokenizer, ["mnli"])) == ["mnli"]
    assert counted(folder, toy_tokenizer, []) == {}


def test_a_file_that_is_missing_or_wrong(folder, toy_tokenizer, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"named cola are counted from .*glue/CoLA/dev\.tsv, which does not exist"):
        counted(folder, toy_tokenizer, ["mnli", "cola"])
    with pytest.raises(FileNotFoundError, match=r"has none of the sets cola, .*: expected such as .*MNLI/dev_matched\.tsv"):
        counted(tmp_path_factory.mktemp("empty"), toy_tokenizer)
    (folder / "glue" / "SST-2" / "dev.tsv").write_text("text\tclass\nthe film\t1\n")
    with pytest.raises(DataError, match="has no column 'sentence'"):
        counted(folder, toy_tokenizer)


def test_written_and_read(tmp_path):
    sets = {"b": Lengths("B", 64, 'texts of "B"', {3: 5, 9: 1}), "a": Lengths("A", 8, "", {1: 2})}
    path = tmp_path / "lengths.json"
    write_sets(path, sets)
    assert read_sets(path) == sets and list(read_sets(path)) == ["b", "a"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["lengths.json"]


def test_the_embedded_file_is_as_it_would_be_written(tmp_path):
    kept = {name: of for name, of in embedded().items() if name != lengths.MLPERF}
    assert list(kept) == list(SETS)
    write_sets(tmp_path / "again.json", kept)
    assert (tmp_path / "again.json").read_text() == lengths.EMBEDDED.read_text()
    for name, of in kept.items():
        assert list(of.counts) == sorted(of.counts) and min(of.counts.values()) > 0
        assert max(of.counts) <= of.padded_to and (of.title, of.padded_to) == (SETS[name].title, SETS[name].padded_to)
    assert len(lengths.EMBEDDED.read_text().splitlines()) < 100
    assert embedded()[lengths.MLPERF].mean == 254


def test_the_embedded_histogram_is_that_of_the_data(data_folder):
    tokenizer = load_tokenizer(data_folder / "vocab" / "bert-base-uncased")
    found = counted(data_folder, tokenizer, ["mnli", "sst2"])
    assert found == {name: embedded()[name] for name in ("mnli", "sst2")}


# --- behind --data ---------------------------------------------------------------------------------------------------------


def options(**changes) -> bench.Options:
    return bench.Options("inference", "cpu", **changes)


def test_batches_have_the_lengths_of_the_data(folder, toy_model):
    chosen = options(model=str(toy_model), data=folder, batches=("3xsst2/longest", "2x8"))
    assert chosen.problems() == []
    assert [of.lengths for of in chosen.workloads] == [(4, 6, 6), (8, 8)]
    named = options(model="tiny", data=folder, tokenizer=str(toy_model), batches=("3xmnli", "mlperf"))
    assert named.problems() == []
    assert named.workloads[0].lengths == (7, 9, 128) and named.workloads[1].padded_to == 512


def test_the_data_are_counted_once(folder, toy_model, monkeypatch):
    calls = []
    counting = lengths.counted
    monkeypatch.setattr(lengths, "counted", lambda *given: calls.append(given[2]) or counting(*given))
    chosen = options(model=str(toy_model), data=folder, batches=("sst2/longest", "4xsst2/longest", "2x8"))
    assert chosen.problems() == [] and len(chosen.workloads) == 3
    assert calls == [["sst2"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": ("mnli",)}, "--data needs --tokenizer (folder or Hub name), since --model tiny has none"),
        ({"batches": ("mnli",), "tokenizer": "TMP"}, "TMP"),
        ({"batches": ("32x128", "mlperf")}, "--data: none of the batches 32x128, mlperf has lengths that are counted there"),
        ({"batches": ("qqp",), "tokenizer": "TOY"}, "the lengths named qqp are counted from"),
        ({"batches": ("novels",), "tokenizer": "TOY"}, "there are no lengths named novels; there are cola"),
        ({"data": None, "tokenizer": "TOY"}, "--tokenizer counts the tokens of --data, which is not given"),
    ],
)
def test_wrong_usage(changes, message, folder, toy_model, tmp_path_factory):
    empty = str(tmp_path_factory.mktemp("no-tokenizer"))
    places = {"TMP": empty, "TOY": str(toy_model)}
    given = {"data": folder, "model": "tiny", **changes}
    if "tokenizer" in given:
        given["tokenizer"] = places[given["tokenizer"]]
    (problem,) = options(**given).problems()
    assert message.replace("TMP", empty) in problem
