"""Token classification: features word by word, long sentences, dropped words, entities."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.tasks.examples import Examples, WordsExample
from fastbert.tasks.registry import task_for
from fastbert.tasks.tokens import IGNORED, _spans_of_tags


def sentences(*pairs: tuple[str, str]) -> Examples[WordsExample]:
    items = [WordsExample(f"line {n}", tuple(words.split()), tuple(tags.split())) for n, (words, tags) in enumerate(pairs, 1)]
    return Examples("train.conll", items, {"tags": "1"})


EXAMPLES = sentences(("Anna saw Paris", "B-PER O B-LOC"), ("the unheardofhouse", "O I-LOC"))


def logits_of(task, features, tags: list[list[str]]) -> list[np.ndarray]:
    """Logits whose largest are those of ``tags``, and of another tag at every piece that is not a word's first."""
    outputs = []
    for row, number, words in zip(features.rows, features.example_of, features.notes, strict=True):
        logits = np.zeros((len(row["input_ids"]), len(task.labels)), np.float32)
        logits[:, -1] = 1
        for index, position in enumerate(words.positions):
            logits[position, task.labels.index(tags[number][words.first + index])] = 5
        outputs.append(logits)
    return outputs


def test_labels_make_whole_bio(toy_tokenizer):
    task = task_for("ner").with_labels_of(EXAMPLES)
    assert task.labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert task.main_metric == "f1"
    assert task_for("token-classification").with_labels_of(sentences(("a b", "DET NOUN"))).main_metric == "accuracy"
    assert task_for("token-classification").with_labels_of(EXAMPLES).main_metric == "f1"


def test_a_label_stands_at_the_first_piece_of_its_word(toy_tokenizer):
    task = task_for("ner").with_labels_of(EXAMPLES)
    features = task.features(EXAMPLES, toy_tokenizer, 32, labelled=True)
    for example, row, words in zip(EXAMPLES, features.rows, features.notes, strict=True):
        encoded = toy_tokenizer(list(example.words), is_split_into_words=True)
        assert row["input_ids"] == encoded["input_ids"]
        word_ids = encoded.word_ids()
        first = [word_ids.index(number) for number in range(len(example.words))]
        assert words.positions.tolist() == first
        labels = np.array(row["labels"])
        assert [task.labels[label] for label in labels[first]] == list(example.tags)
        assert (np.delete(labels, first) == IGNORED).all()


def test_columns_of_conll_are_no_texts(tmp_path):
    """Training reads them under any name, prediction a text in each line of a .txt."""
    path = tmp_path / "test.txt"
    path.write_text("Anna B-PER\nlikes O\n\nOslo B-LOC\n", encoding="utf-8")
    task = task_for("ner").with_labels_of(EXAMPLES)
    with pytest.raises(DataError, match=r"test.txt: 3 of 3 lines end in a tag of the task: .* name that ends in .conll"):
        task.read_unlabelled(Source(path))
    path.write_text("Anna likes Oslo\nPlan O\n", encoding="utf-8")
    assert [example.words for example in task.read_unlabelled(Source(path))] == [("Anna", "likes", "Oslo"), ("Plan", "O")]


def test_a_long_sentence_is_cut_between_words_and_no_word_is_lost(toy_tokenizer):
    words = ["house", "unheardofhouse", "Anna"] * 20
    tags = ["O", "B-LOC", "B-PER"] * 20
    examples = sentences((" ".join(words), " ".join(tags)))
    task = task_for("ner").with_labels_of(examples)
    features = task.features(examples, toy_tokenizer, 24, labelled=True)
    assert len(features.rows) > 2
    assert all(len(row["input_ids"]) <= 24 for row in features.rows)
    assert sum(len(words.positions) for words in features.notes) == 60
    outputs = logits_of(task, features, [tags])
    assert task.predicted_tags(outputs, features, examples) == [tags]
    assert task.scores(outputs, features, examples)["f1"] == 1.0


def test_a_word_longer_than_the_model_keeps_its_tag(toy_tokenizer):
    examples = sentences(("house " + "ab" * 40 + " Anna", "O B-LOC B-PER"))
    task = task_for("ner").with_labels_of(examples)
    features = task.features(examples, toy_tokenizer, 12, labelled=True)
    assert all(len(row["input_ids"]) <= 12 for row in features.rows)
    assert sum(len(words.positions) for words in features.notes) == 3


def test_a_word_that_the_tokenizer_drops_is_the_unknown_token(toy_tokenizer):
    examples = sentences(("Anna \ufe0f house", "B-PER O O"))
    task = task_for("ner").with_labels_of(examples)
    features = task.features(examples, toy_tokenizer, 12, labelled=True)
    row, words = features.rows[0], features.notes[0]
    assert row["input_ids"][words.positions[1]] == toy_tokenizer.unk_token_id
    assert len(words.positions) == 3
    (notice,) = features.notices
    assert notice.endswith("keeps nothing of 1 words, which stand as [UNK] (the first: sentence at line 1, word 2 ('\\ufe0f'))")


def test_entities_are_spans_of_the_text(toy_tokenizer):
    task = task_for("ner").with_labels_of(EXAMPLES)
    text = "  Yesterday Anna  saw Paris-Rome."
    examples = task.examples_from([text, ["Bob", "left"]])
    assert examples.items[0].words == ("Yesterday", "Anna", "saw", "Paris-Rome", ".")
    features = task.features(examples, toy_tokenizer, 32, labelled=False)
    outputs = logits_of(task, features, [["O", "B-PER", "O", "B-LOC", "O"], ["B-PER", "O"]])
    first, second = task.predictions(outputs, features, examples)
    found = [(entity["type"], text[entity["start"] : entity["end"]], entity["first_word"]) for entity in first["entities"]]
    assert found == [("PER", "Anna", 1), ("LOC", "Paris-Rome", 3)]
    assert [entity["text"] for entity in second["entities"]] == ["Bob"]
    assert 0.9 < first["entities"][0]["probability"] < 1


def test_spans_of_tags_are_those_of_seqeval():
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    drawn = np.random.default_rng(0).choice(["O", "B-A", "I-A", "B-B-C", "I-B-C"], (300, 8)).tolist()
    assert [_spans_of_tags(tags) for tags in drawn] == [get_entities(tags) for tags in drawn]


def test_entities_are_found_without_seqeval(toy_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval", None)
    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    task = task_for("ner").with_labels_of(EXAMPLES)
    features = task.features(EXAMPLES, toy_tokenizer, 32, labelled=False)
    outputs = logits_of(task, features, [["B-PER", "O", "B-LOC"], ["O", "O"]])
    assert len(task.predictions(outputs, features, EXAMPLES)[0]["entities"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("e\u0301toile, Ma\u0301rio\u0301-de.", ["e\u0301toile", ",", "Ma\u0301rio\u0301-de", "."]),
        ("\u0928\u092e\u0938\u094d\u0924\u0947 \u0939\u093f", ["\u0928\u092e\u0938\u094d\u0924\u0947", "\u0939\u093f"]),
        ("\u2764\ufe0fday \u0301b don't", ["\u2764\ufe0f", "day", "\u0301", "b", "don't"]),
    ],
)
def test_marks_belong_to_the_character_before_them(text, words):
    (example,) = task_for("ner").examples_from([text])
    assert list(example.words) == words == [text[start:end] for start, end in example.spans]


def test_bad_input_names_its_place():
    task = task_for("ner").with_labels_of(EXAMPLES)
    with pytest.raises(DataError, match=r"train.conll, line 1, column '1': word 2 \('b'\) has the tag 'B-ORG'; known are O, B-LOC"):
        task.check(sentences(("a b", "O B-ORG")), labelled=True)
    with pytest.raises(DataError, match=r"line 1.*has 1 tags for 2 words"):
        task.check(sentences(("a b", "O")), labelled=True)
    with pytest.raises(DataError, match=r"every word has the tag 'O': there is nothing to learn"):
        task_for("ner").with_labels_of(sentences(("a b", "O O")))
    with pytest.raises(DataError, match=r"inputs, input 2, column 'words': holds no words"):
        task.check(task.examples_from(["a", " "]), labelled=False)


def test_lists_in_tables(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"tokens": ["Anna", "left"], "ner_tags": ["I-PER", "O"]}\n', encoding="utf-8")
    examples = task_for("ner").read(Source(path))
    assert [(e.words, e.tags) for e in examples] == [(("Anna", "left"), ("B-PER", "O"))]
    path.write_text('{"tokens": ["Anna", "left"], "ner_tags": ["O"]}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"train.jsonl, line 1, column 'ner_tags': has 1 tags for the 2 words of column 'tokens'"):
        task_for("ner").read(Source(path))


@pytest.mark.parametrize(
    ("task", "path", "count"),
    [("ner", "ner/wnut17/dev.conll", 1009), ("pos", "pos/ud_english_ewt/en_ewt-ud-dev.conllu.gz", 2001)],
)
def test_real_files(task, path, count, data_folder):
    examples = task_for(task).read(Source(data_folder / path))
    assert len(examples) == count
    assert len(task_for(task).with_labels_of(examples).labels) == (13 if task == "ner" else 17)


def test_inputs_that_are_no_words():
    task = task_for("ner")
    assert [example.words for example in task.examples_from(["Anna left.", ["Bob", "ran"]])] == [
        ("Anna", "left", "."),
        ("Bob", "ran"),
    ]
    for wrong in (1, None, ["a", 1], {"a": 1}, b"a"):
        with pytest.raises(DataError, match=r"inputs, input 2: holds .*, expected a text or a list of words"):
            task.examples_from(["a", wrong])
