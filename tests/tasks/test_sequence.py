"""Text classification: reading, labels, checks, features, scores and predictions, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from sklearn.metrics import f1_score

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.tasks.registry import task_for


def read(tmp_path: Path, content: str, task: str = "text-classification", name: str = "train.tsv", **columns: str):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    made = task_for(task, columns)
    return made, made.read(Source(path))


def test_pairs_and_labels_by_their_usual_names(tmp_path):
    task, examples = read(tmp_path, "index\tquestion\tsentence\tlabel\n0\tWho?\tBob.\tno\n1\tWhere?\tRome.\tyes\n")
    assert [(e.text, e.text_pair, e.label) for e in examples] == [("Who?", "Bob.", "no"), ("Where?", "Rome.", "yes")]
    assert task.with_labels_of(examples).labels == ("no", "yes")


def test_numeric_labels_are_in_numeric_order(tmp_path):
    task, examples = read(tmp_path, "text\tlabel\na\t10\nb\t9\nc\t-1\n")
    assert task.with_labels_of(examples).labels == ("-1", "9", "10")


def test_named_columns(tmp_path):
    _, examples = read(tmp_path, "a\tb\tc\nx\ty\tz\n", text="b", text_pair="c", label="a")
    assert [(e.text, e.text_pair, e.label) for e in examples] == [("y", "z", "x")]


def test_a_column_whose_name_has_a_comma(tmp_path):
    _, examples = read(tmp_path, "text\tmy,label\nx\ty\n", label="my,label")
    assert [(e.text, e.label) for e in examples] == [("x", "y")]
    table = "text\tgood, fresh\tbad\nx\t1\t0\ny\t0\t1\n"
    for label in ("good, fresh,bad", "bad,good, fresh"):
        task, examples = read(tmp_path, table, "multi-label-classification", label=label)
        assert [e.label for e in examples] == [("good, fresh",), ("bad",)]
    assert task.with_labels_of(examples).labels == ("bad", "good, fresh")
    with pytest.raises(DataError, match="has no column 'good' for the label; it has 'text', 'good, fresh', 'bad'"):
        read(tmp_path, table, "multi-label-classification", label="good,bad")


def test_several_labels_in_a_cell_or_in_columns(tmp_path):
    task, examples = read(tmp_path, "text\tlabel\nx\tred, blue\ny\t\n", "multi-label-classification")
    assert [e.label for e in examples] == [("red", "blue"), ()]
    assert task.with_labels_of(examples).labels == ("blue", "red")
    _, examples = read(tmp_path, "text\tred\tblue\nx\t1\t0\ny\t0\t0\n", "multi-label-classification", label="red,blue")
    assert [e.label for e in examples] == [("red",), ()]
    _, examples = read(tmp_path, '{"text": "x", "labels": ["red"]}\n', "multi-label-classification", name="train.jsonl")
    assert [e.label for e in examples] == [("red",)]


@pytest.mark.parametrize(
    ("content", "task", "message"),
    [
        (
            "text\tlabel\na\t1\nb\t1\n",
            "text-classification",
            r"train.tsv, column 'label': holds '1' in all 2 rows: there",
        ),
        ("text\tscore\na\t1\nb\t1.0\n", "regression", r"train.tsv, column 'score': holds 1.0 in all 2 rows"),
        ("text\tscore\na\t1\nb\tmuch\n", "regression", r"train.tsv, line 3, column 'score': holds 'much', expected a number"),
        ("text\tscore\na\t1\nb\tinf\n", "regression", r"line 3, column 'score': holds 'inf', expected a finite number"),
        (
            "text\tscore\na\t1\nb\t-1e300\n",
            "regression",
            r"line 3, column 'score': holds '-1e300', expected a number up to 1.8e\+19",
        ),
        ("text\tlabel\na\t1\nb\t\n", "text-classification", r"train.tsv, line 3, column 'label': is empty"),
        (
            "text\tother\na\t1\nb\t2\n",
            "text-classification",
            r"has no column 'label', it has 'text', 'other'; --label-column names",
        ),
        ("x\tlabel\na\t1\n", "text-classification", r"has the columns 'x', 'label'; --text-column names the one with the text"),
    ],
)
def test_labels_that_cannot_be_learned(content, task, message, tmp_path):
    with pytest.raises(DataError, match=message):
        made, examples = read(tmp_path, content, task)
        made.with_labels_of(examples)


def test_an_unknown_label_in_dev_names_its_line(tmp_path):
    task, train = read(tmp_path, "text\tlabel\na\t0\nb\t1\n")
    task = task.with_labels_of(train)
    _, dev = read(tmp_path, "text\tlabel\na\t0\nb\t2\n", name="dev.tsv")
    with pytest.raises(DataError, match=r"dev.tsv, line 3, column 'label': holds '2'; the training data have '0', '1'"):
        task.check(dev, labelled=True)
    task.check(dev, labelled=False)


@pytest.mark.parametrize(("text", "column"), [(" \t0", "sentence1"), ("x\t0", "sentence2")])
def test_an_empty_text_names_its_column(text, column, tmp_path):
    first, label = text.split("\t")
    content = f"sentence1\tsentence2\tlabel\na\tb\t1\n{first}\t{' ' if column == 'sentence2' else 'b'}\t{label}\n"
    task, examples = read(tmp_path, content)
    with pytest.raises(DataError, match=rf"train.tsv, line 3, column '{column}': is empty"):
        task.check(examples, labelled=True)


def test_a_text_that_the_tokenizer_drops(tmp_path, toy_tokenizer):
    task, examples = read(tmp_path, "text\tlabel\ngood\t0\n\u200b\u200d\t1\n")
    task = task.with_labels_of(examples)
    with pytest.raises(DataError, match=r"line 3, column 'text': holds .* of which the tokenizer keeps nothing"):
        task.features(examples, toy_tokenizer, 16, labelled=True)


@pytest.mark.parametrize("column", ["sentence1", "sentence2"])
def test_a_text_of_a_pair_that_the_tokenizer_drops(column, tmp_path, toy_tokenizer):
    texts = ("\ufe0f", "good") if column == "sentence1" else ("good", "\ufe0f")
    task, examples = read(tmp_path, "sentence1\tsentence2\tlabel\ngood\tbad\t0\n{}\t{}\t1\n".format(*texts))
    task = task.with_labels_of(examples)
    with pytest.raises(DataError, match=rf"line 3, column '{column}': holds '\\ufe0f', of which the tokenizer keeps nothing"):
        task.features(examples, toy_tokenizer, 16, labelled=True)


def test_features_are_what_the_tokenizer_gives_and_truncation_is_counted(tmp_path, toy_tokenizer):
    task, examples = read(tmp_path, f"text\ttext_pair\tlabel\ngood film\tbad\t1\n{'house ' * 40}\tbad\t0\n")
    features = task.with_labels_of(examples).features(examples, toy_tokenizer, 16, labelled=True)
    expected = toy_tokenizer("good film", "bad")
    assert features.rows[0] == {
        "input_ids": expected["input_ids"], "token_type_ids": expected["token_type_ids"], "labels": 1,
    }  # fmt: skip
    assert [len(row["input_ids"]) for row in features.rows] == [6, 16]
    assert features.truncated == 1


@pytest.mark.filterwarnings("error")
def test_one_class_throughout_has_no_correlation(tmp_path):
    _, examples = read(tmp_path, "text\tlabel\na\t0\nb\t0\n")
    scores = task_for("text-classification", labels=("0", "1")).scores([np.array([1.0, 0.0])] * 2, None, examples)
    assert (scores["accuracy"], scores["matthews_correlation"]) == (1.0, 0.0)


def test_scores_of_each_problem(tmp_path):
    task, examples = read(tmp_path, "text\tlabel\na\t0\nb\t1\nc\t1\nd\t0\n")
    task = task.with_labels_of(examples)
    outputs = [np.array(x, np.float32) for x in ([2, 1], [0, 1], [1, 0], [0, 3])]
    scores = task.scores(outputs, None, examples)
    assert scores["accuracy"] == 0.5
    assert scores["f1"] == f1_score([0, 1, 1, 0], [0, 1, 0, 1])
    assert scores["matthews_correlation"] == 0.0

    task, examples = read(tmp_path, "text\tlabel\na\tx\nb\tx,y\nc\t\n", "multi-label-classification")
    outputs = [np.array(x, np.float32) for x in ([1, -1], [1, -1], [-1, -1])]
    scores = task.with_labels_of(examples).scores(outputs, None, examples)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["f1_micro"] == pytest.approx(0.8)

    task, examples = read(tmp_path, "text\tscore\na\t1\nb\t2\nc\t4\n", "regression")
    scores = task.scores([np.array([x], np.float32) for x in (1, 2, 3)], None, examples)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["mean_squared_error"] == pytest.approx(1 / 3)
    constant = task.scores([np.array([1.0], np.float32)] * 3, None, examples)
    assert constant["pearson_spearman"] == 0.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("chosen", "f1"), [("", 0.0), ("bc", 0.5), ("ab", 1.0), ("abcd", 2 / 3)])
def test_scores_of_one_label_are_those_of_that_label(chosen, f1, tmp_path):
    """Of a single column scikit-learn makes two classes: "not the label" would count like the label."""
    task, examples = read(tmp_path, "text\tlabel\na\tx\nb\tx\nc\t\nd\t\n", "multi-label-classification")
    outputs = [np.array([1.0 if text in chosen else -1.0], np.float32) for text in "abcd"]
    scores = task.with_labels_of(examples).scores(outputs, None, examples)
    assert scores == {"f1_micro": pytest.approx(f1), "f1_macro": pytest.approx(f1), "accuracy": 1.0 if chosen == "ab" else 0.5}


def test_inputs_that_are_no_texts():
    task = task_for("text-classification")
    assert [(e.text, e.text_pair) for e in task.examples_from(["a", ("b", "c")])] == [("a", None), ("b", "c")]
    for wrong in (1, None, b"a", ("a",), ("a", None), ("a", "b", "c"), {"a": 1, "b": 2}):
        with pytest.raises(DataError, match=r"inputs, input 2: holds .*, expected a text or a pair of texts"):
            task.examples_from(["a", wrong])


def test_predictions_are_probabilities(tmp_path):
    task, examples = read(tmp_path, "text\tlabel\na\tneg\nb\tpos\n")
    task = task.with_labels_of(examples)
    first, second = task.predictions([np.array([0.0, 0.0]), np.array([-1000.0, 1000.0])], None, examples)
    assert first["probabilities"] == {"neg": pytest.approx(0.5), "pos": pytest.approx(0.5)}
    assert second == {"label": "pos", "probability": 1.0, "probabilities": {"neg": 0.0, "pos": 1.0}}
    task, examples = read(tmp_path, "text\tlabel\na\tx\nb\ty\n", "multi-label-classification")
    (prediction,) = task.with_labels_of(examples).predictions([np.array([1000.0, -1000.0])], None, examples)
    assert prediction == {"labels": ["x"], "probabilities": {"x": 1.0, "y": 0.0}}


def test_files_of_glue(data_folder):
    task = task_for("text-classification", {"label": "Quality"})
    examples = task.read(Source(data_folder / "glue/MRPC/train.tsv"))
    assert len(examples) == 3668
    assert task.with_labels_of(examples).labels == ("0", "1")
    test = task.read(Source(data_folder / "glue/MRPC/test.tsv"))
    assert len(test) == 1725 and test.items[0].label is None


def test_labels_that_only_look_like_numbers(tmp_path):
    task, examples = read(tmp_path, "text\tlabel\na\t²\nb\t--5\nc\t7\n")
    assert task.with_labels_of(examples).labels == ("7", "--5", "²")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ('"text": ["a"], "label": "x"', r"line 1, column 'text': expected a text, found a list"),
        ('"text": "a", "label": ["x"]', r"line 1, column 'label': expected one label, found a list; lists are for multi-label"),
    ],
)
def test_lists_are_not_taken_for_what_they_print_as(cells, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(tmp_path, "{" + cells + "}\n", name="train.jsonl")


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        ("sentiment", {"text": "ab", "label": [0.0, float("nan")]}, "row 2, column 'label': expected one label, found nan"),
        ("text-classification", {"text": [b"a", b"b"], "label": "xy"}, "row 1, column 'text': expected a text, found bytes"),
        ("text-classification", {"text": "ab", "label": [b"0", b"1"]}, "row 1, column 'label': expected one label, found bytes"),
        ("text-classification", {"text": [1.5, float("inf")], "label": "xy"}, "row 2, column 'text': expected a text, found inf"),
        ("multi-label-classification", {"text": "ab", "label": [["x"], ["y", None]]}, "row 2, column 'label': .*, found null"),
        ("multi-label-classification", {"text": "ab", "label": [b"x", b"y"]}, "row 1, column 'label': .*, found bytes"),
    ],
)
def test_cells_without_a_text_are_refused(task, cells, message, tmp_path):
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: list(values) for name, values in cells.items()}), path)
    with pytest.raises(DataError, match=f"train.parquet, {message}"):
        task_for(task).read(Source(path))


def test_whole_numbers_are_one_label_however_they_are_written(tmp_path):
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "label": [0.0, 1.0, 2.5]}), path)
    task = task_for("text-classification")
    task = task.with_labels_of(task.read(Source(path)))
    assert task.labels == ("0", "1", "2.5")
    _, dev = read(tmp_path, "text,label\na,0\nb,1\n", name="dev.csv")
    task.check(dev, labelled=True)
    lines = '{"text": "a", "label": 1}\n{"text": "b", "label": 1.0}\n{"text": "c", "label": 0}\n'
    task, examples = read(tmp_path, lines, name="train.jsonl")
    assert task.with_labels_of(examples).labels == ("0", "1")
    _, examples = read(tmp_path, '{"text": "a", "label": [1, 1.0, 2]}\n', "multi-label-classification", name="train.jsonl")
    assert examples.items[0].label == ("1", "2")


def test_several_label_columns_are_for_several_labels(tmp_path):
    with pytest.raises(DataError, match="2 label columns are for --task multi-label-classification; --task sentiment reads one"):
        read(tmp_path, "text\ta\tb\nx\t0\t1\n", "sentiment", label="a,b")


def test_labels_that_are_held_back(tmp_path):
    _, examples = read(tmp_path, '{"text": "x", "label": null}\n{"text": "y", "label": ""}\n', name="test.jsonl")
    assert [example.label for example in examples] == [None, None]
    _, examples = read(tmp_path, "text\tscore\nx\t\n", "regression", name="test.tsv")
    assert examples.items[0].label is None


def test_what_is_to_be_predicted_needs_no_labels_and_no_columns(tmp_path):
    task = task_for("regression", {"text": "review", "label": "stars"})
    (tmp_path / "new.tsv").write_text("review\tstars\nx\tunknown\n", encoding="utf-8")
    (tmp_path / "new.txt").write_text("a text\n", encoding="utf-8")
    assert [e.label for e in task.read_unlabelled(Source(tmp_path / "new.tsv"))] == [None]
    assert [(e.place, e.text) for e in task.read_unlabelled(Source(tmp_path / "new.txt"))] == [("line 1", "a text")]


def test_pairs_and_single_texts_are_not_mixed(tmp_path):
    task, pairs = read(tmp_path, "sentence1\tsentence2\tlabel\na\tb\t0\nc\td\t1\n")
    pair_task = task.with_labels_of(pairs)
    _, single = read(tmp_path, "sentence1\tlabel\na\t0\nc\t1\n", name="dev.tsv")
    with pytest.raises(DataError, match="dev.tsv, line 2: has no second text, but the training data are pairs of texts"):
        pair_task.check(single, labelled=True)
    with pytest.raises(DataError, match="train.tsv, line 2: has a second text, but the training data are single texts"):
        task.with_labels_of(single).check(pairs, labelled=True)
    glue = task_for("rte")
    _, train = read(tmp_path, "sentence1\tsentence2\tlabel\na\tb\tentailment\nc\td\tnot_entailment\n", "rte")
    with pytest.raises(DataError, match="inputs, input 1: has no second text"):
        glue.with_labels_of(train).check(glue.examples_from(["a"]), labelled=False)


@pytest.mark.parametrize("name", ["rte", "sentiment", "multi-label-classification"])
def test_labels_that_are_given_and_never_change(name, tmp_path):
    """Of GLUE's tasks, and where a fine-tuned model is trained further."""
    task = task_for(name) if name == "rte" else task_for(name, labels=("entailment", "not_entailment", "other"))
    header = "sentence1\tsentence2" if name == "rte" else "text"
    row = "a\tb" if name == "rte" else "a"
    _, same = read(tmp_path, f"{header}\tlabel\n{row}\tentailment\n{row}\tentailment\n", name)
    with pytest.raises(DataError, match="column 'label': holds 'entailment' in all 2 rows: there is nothing to learn"):
        task.with_labels_of(same)
    _, two = read(tmp_path, f"{header}\tlabel\n{row}\tentailment\n{row}\tnot_entailment\n", name)
    assert task.with_labels_of(two).labels == task.labels
    if name == "multi-label-classification":
        _, some = read(tmp_path, f"{header}\tlabel\n{row}\tentailment\n{row}\t\n", name)
        assert task.with_labels_of(some).labels == task.labels


def test_columns_that_are_labels_are_all_labels_in_their_order(tmp_path):
    task, examples = read(tmp_path, "text\tb\ta\nx\t1\t0\ny\t0\t1\n", "multi-label-classification", label="b,a")
    task = task.with_labels_of(examples)
    assert task.labels == ("b", "a")
    _, dev = read(tmp_path, "text\tb\ta\nx\t1\t1\n", task.name, name="dev.tsv", label="b,a")
    task.check(dev, labelled=True)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("text\ta\tb\tc\nx\t1\t0\t0\ny\t0\t1\t0\n", "a,b,c", "train.tsv, column 'c': holds 0 in all 2 rows: there is nothing"),
        ("text\ta\tb\nx\t1\t1\ny\t0\t1\n", "a,b", "train.tsv, column 'b': holds 1 in all 2 rows: there is nothing to learn"),
        ("text\ttags\nx\ta\ny\ta,b,b\n", "tags", "train.tsv, column 'tags': holds 'a' in all 2 rows: there is nothing to learn"),
        ("text\ttags\nx\t\ny\t\n", "tags", "train.tsv, column 'tags': names no label in 2 rows: there is nothing to learn"),
        ("text\ta\nx\t1\ny\t0\n", "a", "train.tsv, column 'a': holds '0' or '1', expected names of labels; a single column"),
        ("text\ta\nx\tTrue\ny\t\n", "a", "train.tsv, column 'a': holds 'True', expected names of labels; a single column"),
    ],
)
def test_several_labels_that_cannot_be_learned(content, columns, message, tmp_path):
    task, examples = read(tmp_path, content, "multi-label-classification", label=columns)
    with pytest.raises(DataError, match=message):
        task.with_labels_of(examples)


def test_labels_may_be_called_0_and_1(tmp_path):
    task, examples = read(tmp_path, "text\tlabel\nx\t0,1\ny\t1\nz\t\n", "multi-label-classification")
    assert task.with_labels_of(examples).labels == ("0", "1")


def test_columns_that_are_labels_hold_0_or_1(tmp_path):
    task, examples = read(tmp_path, "text\ta\tb\nx\t0.0\t1.0\ny\tTrue\tno\n", "multi-label-classification", label="a,b")
    assert [e.label for e in examples] == [("b",), ("a",)]
    _, examples = read(tmp_path, '{"text": "x", "a": null, "b": 1}\n', task.name, name="train.jsonl", label="a,b")
    assert examples.items[0].label == ("b",)
    with pytest.raises(DataError, match="train.tsv, line 2, column 'b': holds '-1', expected 0 or 1"):
        read(tmp_path, "text\ta\tb\nx\t0\t-1\n", task.name, label="a,b")
