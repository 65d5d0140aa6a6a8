from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.model.accelerate import accelerate
from fastbert.tasks.choices import MultipleChoice, pad_choices
from fastbert.tasks.examples import ChoiceExample, Examples
from fastbert.tasks.model import TaskModel
from fastbert.tasks.outputs import model_outputs
from fastbert.tasks.registry import load_task, save_task, task_for

TASK = MultipleChoice(name="multiple-choice")


def write(path: Path, content: str) -> Source:
    path.write_text(content, encoding="utf-8")
    return Source(path)


def rows(path: Path, *values: dict[str, Any]) -> Source:
    return write(path, "\n".join(map(json.dumps, values)))


@pytest.fixture(scope="module")
def tokenizer() -> transformers.BertTokenizer:
    words = ["the", "cat", "sat", "on", "mat", "dog", "ran", "away", "she", "."]
    return transformers.BertTokenizer(
        vocab={token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    )


def made_up(count: int, num_choices: int = 3, *, labelled: bool = True) -> Examples[ChoiceExample]:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "mat", "dog", "ran", "away", "she", "."]

    def text(most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(1, most)))

    items = [
        ChoiceExample(
            f"row {number}",
            text(12),
            tuple(text(6) for _ in range(num_choices)),
            text(4) if number % 2 else None,
            int(rng.integers(num_choices)) if labelled else None,
        )
        for number in range(1, count + 1)
    ]
    return Examples("made up", items, {})


# --- reading ---------------------------------------------------------------------------------------------------------------


def test_swag(tmp_path: Path) -> None:
    line = 'anetv_1,She sits.,She,runs away.,sits down.,"jumps, then falls.",is a dog.,2\n'
    source = write(tmp_path / "train.csv", "video-id,sent1,sent2,ending0,ending1,ending2,ending3,label\n" + line)
    examples = TASK.read(source)
    choices = ("runs away.", "sits down.", "jumps, then falls.", "is a dog.")
    assert examples.items == [ChoiceExample("line 2", "She sits.", choices, "She", 2)]
    assert examples.columns == {
        "context": "sent1", "question": "sent2", "choices": "ending0, ending1, ending2, ending3", "label": "label",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"context": "A.", "choices": ["x", "y"], "label": 1}, ("A.", ("x", "y"), None, 1)),
        ({"context": "A.", "question": "Q?", "choices": ["x", "y"], "label": "b"}, ("A.", ("x", "y"), "Q?", 1)),
        ({"question": "Q?", "options": ["x", "y", "z"], "answerKey": "A"}, ("Q?", ("x", "y", "z"), None, 0)),
        ({"article": "A.", "question": "Q?", "options": ["x", "y"], "answer": "B"}, ("A.", ("x", "y"), "Q?", 1)),
        ({"premise": "A.", "question": " ", "choice2": "y", "choice1": "x", "label": 0}, ("A.", ("x", "y"), None, 0)),
        ({"ctx": "A.", "endings": ["x", "y"], "label": ""}, ("A.", ("x", "y"), None, None)),
        ({"ctx": "A.", "endings": ["x", "y"], "label": -1}, ("A.", ("x", "y"), None, None)),
        ({"ctx": "A.", "option_a": "x", "Option B": "y", "label": None}, ("A.", ("x", "y"), None, None)),
        ({"context": "A.", **{f"choice{n}": str(n) for n in (10, 9, 2, 1)}}, ("A.", ("1", "2", "9", "10"), None, None)),
    ],
)
def test_columns_of_published_sets(tmp_path: Path, row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert TASK.read(rows(tmp_path / "a.jsonl", row)).items == [ChoiceExample("line 1", *expected)]


def test_columns_that_the_user_names(tmp_path: Path) -> None:
    row = {"context": "no", "label": 0, "body": "A.", "ask": "Q?", "one": "x", "two": "y", "right": "B", "all": ["u", "v"]}
    source = rows(tmp_path / "a.jsonl", row)
    named = {"text": "body", "text_pair": "ask", "label": "right"}
    for choices, expected in (("one,two", ("x", "y")), ("two,one", ("y", "x")), ("all", ("u", "v"))):
        task = MultipleChoice(name="multiple-choice", columns={**named, "choices": choices})
        assert task.read(source).items == [ChoiceExample("line 1", "A.", expected, "Q?", 1)]


def test_examples_from_python() -> None:
    made = TASK.examples_from([{"context": "A.", "question": "Q?", "choices": ["x", "y"]}, ("B.", ("u", "v"))])
    assert made.items == [ChoiceExample("input 1", "A.", ("x", "y"), "Q?"), ChoiceExample("input 2", "B.", ("u", "v"))]
    asks_a_number = {"context": "A.", "choices": ["x", "y"], "question": 5}
    for wrong, column in (
        ({"choices": ["x"]}, "context"), (("A.", "xy"), "choices"), (("A.", ["x", 1]), "choices"), (asks_a_number, "question")
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"inputs, input 1, column '{column}': expected"):
            TASK.examples_from([wrong])
    with pytest.raises(DataError, match="inputs, input 1: expected a dict with context and choices, or a pair of them"):
        TASK.examples_from(["A."])
    with pytest.raises(DataError, match="inputs, input 1: expected a dict with context and choices, or a pair of them"):
        TASK.examples_from([("A.", ["x", "y"], "Q?")])


def test_labels_that_are_whole_numbers(tmp_path: Path) -> None:
    """As where one label of a column is missing."""
    for labels in ((1, 1.0, None), ("1", "B", None)):
        found = [{"context": "A.", "choices": ["x", "y"], "label": label} for label in labels]
        assert [example.label for example in TASK.read(rows(tmp_path / "a.jsonl", *found))] == [1, 1, None]
    with pytest.raises(DataError, match="line 1, column 'label': holds 0.5; expected 0 to 1 or A to B"):
        TASK.read(rows(tmp_path / "a.jsonl", {"context": "A.", "choices": ["x", "y"], "label": 0.5}))


def test_labels_play_no_part_in_what_is_to_be_predicted(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", {"context": "A.", "choices": ["x", "y"], "label": "unknown"})
    assert TASK.read_unlabelled(source).items == [ChoiceExample("line 1", "A.", ("x", "y"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "A.", "choices": ["x", "y"]}, r"a\.jsonl: no column of contexts \(context, sent1, .*; it has text, choices"),
        ({"context": "A.", "choice1": "x"}, r"no columns of choices \(choices, endings, options, or .*; it has context, choice1"),
        ({"context": "A.", "choices": "x"}, "line 1, column 'choices': expected a list of texts"),
        ({"context": "A.", "choices": ["x", 1]}, "line 1, column 'choices': expected a list of texts"),
        ({"context": None, "choices": ["x", "y"]}, "line 1, column 'context': expected a text, found null"),
        ({"context": "A.", "ending0": "x", "ending1": 1}, "line 1, column 'ending1': expected a text, found int"),
        ({"context": "A.", "choices": ["x", "y"], "label": 2}, "line 1, column 'label': holds 2; expected 0 to 1 or A to B"),
        ({"context": "A.", "choices": ["x", "y"], "label": "C"}, "line 1, column 'label': holds 'C'; expected 0 to 1 or A to B"),
        ({"context": "A.", "choices": ["x", "y"], "label": "no"}, "holds 'no'; expected 0 to 1"),
        ({"context": "A.", "choices": ["x", "y"], "label": 0.5}, "holds 0.5; expected 0 to 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASK.read(rows(tmp_path / "a.jsonl", row))


def test_a_named_column_must_be_there(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", {"context": "A.", "choices": ["x", "y"]})
    for columns in ({"text": "body"}, {"label": "body"}, {"choices": "choices,body"}):
        with pytest.raises(DataError, match="no column 'body'; it has context, choices"):
            MultipleChoice(name="multiple-choice", columns=columns).read(source)


def test_labels_to_learn_must_be_there(tmp_path: Path) -> None:
    examples = TASK.read(rows(tmp_path / "a.jsonl", {"context": "A.", "choices": ["x", "y"]}))
    message = r"a.jsonl: no column of labels \(label, answer, answerKey\); it has context, choices; --label-column names"
    with pytest.raises(DataError, match=message):
        TASK.with_labels_of(examples)
    with pytest.raises(DataError, match=message):
        TASK.check(examples, labelled=True)
    TASK.check(examples, labelled=False)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (ChoiceExample("row 2", " ", ("x", "y"), None, 0), "made up, row 2, column 'context': is empty"),
        (ChoiceExample("row 2", "A.", ("x", "y", "z"), None, 0), "row 2, column 'choices': 3 choices, but 2 at row 1"),
        (ChoiceExample("row 2", "A.", ("x",), None, 0), r"row 2, column 'choices': 1 choice\(s\), expected two or more"),
        (ChoiceExample("row 2", "A.", ("x", " "), None, 0), r"row 2, column 'choices': choice 1 \(counted from 0\) is empty"),
        (ChoiceExample("row 2", "A.", ("x", "y")), "row 2, column 'label': has no label"),
        (ChoiceExample("row 2", "A.", ("x", "y"), None, 2), "row 2, column 'label': holds 2; the 2 choices are counted from 0"),
        (ChoiceExample("row 2", "A.", ("x", "y"), None, -1), "row 2, column 'label': holds -1"),
    ],
)
def test_a_bad_example_is_named(example: ChoiceExample, message: str) -> None:
    examples = Examples("made up", [ChoiceExample("row 1", "A.", ("x", "y"), None, 0), example], {"label": "label"})
    with pytest.raises(DataError, match=message):
        TASK.check(examples, labelled=True)
    if "label" in message:
        TASK.check(examples, labelled=False)
        with pytest.raises(DataError, match=message):
            TASK.with_labels_of(examples)


# --- features and outputs --------------------------------------------------------------------------------------------------


def test_a_row_has_a_sequence_for_each_choice(tokenizer: Any) -> None:
    items = [
        ChoiceExample("row 1", "The cat sat.", ("ran away", "sat"), "She", 1),
        ChoiceExample("row 2", "The dog " * 20, ("ran", "sat on the mat " * 4), None, 0),
    ]
    features = TASK.features(Examples("made up", items, {}), tokenizer, 16, labelled=True)
    tokens = [[" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in row["input_ids"]] for row in features.rows]
    assert tokens[0] == ["[CLS] the cat sat . [SEP] she ran away [SEP]", "[CLS] the cat sat . [SEP] she sat [SEP]"]
    assert tokens[1][0] == "[CLS] the dog the dog the dog the dog the dog the dog [SEP] ran [SEP]"
    assert [len(ids) for ids in features.rows[1]["input_ids"]] == [16, 16]
    assert features.rows[0]["token_type_ids"][0] == [0] * 6 + [1] * 4
    assert ([row["labels"] for row in features.rows], features.truncated, features.example_of) == ([1, 0], 1, [0, 1])
    assert "labels" not in TASK.features(Examples("made up", items, {}), tokenizer, 16, labelled=False).rows[0]
    assert TASK.features(Examples("made up", [], {}), tokenizer, 16, labelled=True).rows == []


def test_texts_of_which_the_tokenizer_keeps_nothing(tokenizer: Any) -> None:
    for context, choice, column in (("\u200d", "cat", "context"), ("cat", "\u200d", "choices")):
        examples = Examples("made up", [ChoiceExample("row 1", context, ("cat", choice))], {})
        with pytest.raises(DataError, match=f"made up, row 1, column '{column}': .* the tokenizer keeps nothing"):
            TASK.features(examples, tokenizer, 16, labelled=False)


def test_batches_are_those_of_transformers(tokenizer: Any) -> None:
    features = TASK.features(made_up(6), tokenizer, 32, labelled=True)
    ours = pad_choices(tokenizer)(features.rows)
    theirs = transformers.DataCollatorForMultipleChoice(tokenizer)(features.rows)
    assert ours.keys() == theirs.keys() == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    unlabelled = TASK.features(made_up(6), tokenizer, 32, labelled=False)
    assert pad_choices(tokenizer)(unlabelled.rows).keys() == ours.keys() - {"labels"}


def test_scores_and_predictions() -> None:
    examples = Examples("made up", [ChoiceExample("row", "A.", ("x", "y", "z"), None, label) for label in (0, 1, 2, 2)], {})
    outputs = [np.log(np.array(values, np.float32)) for values in ([2, 1, 1], [1, 2, 1], [1, 1, 2], [4, 1, 1])]
    features = TASK.features(Examples("made up", [], {}), None, 16, labelled=True)
    assert TASK.scores(outputs, features, examples) == {"accuracy": 0.75}
    prediction = TASK.predictions(outputs, features, examples)[2]
    assert (prediction["label"], prediction["choice"]) == (2, "z")
    assert prediction["probabilities"] == pytest.approx([0.25, 0.25, 0.5]) and prediction["probability"] == pytest.approx(0.5)
    json.dumps(prediction)


def test_the_accelerated_model_gives_transformers_outputs(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForMultipleChoice(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4
    examples = made_up(20)
    features = TASK.features(examples, tokenizer, 32, labelled=True)
    loaded = TaskModel(model, tokenizer, False, pad_choices(tokenizer), ())
    theirs = model_outputs(loaded, features.rows, family="choices", tokens_per_batch=200)
    accelerate(model)
    ours = model_outputs(loaded, features.rows, family="choices", tokens_per_batch=200)
    np.testing.assert_allclose(np.stack(ours), np.stack(theirs), rtol=0, atol=2e-4)
    assert np.ptp(np.stack(theirs)) > 0.1
    assert TASK.scores(ours, features, examples) == TASK.scores(theirs, features, examples)
    batch = pad_choices(tokenizer)(features.rows)
    assert model(**batch).loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(torch.from_numpy(np.stack(ours)), batch["labels"]).item(), abs=1e-4
    )


@pytest.mark.parametrize("name", ["multiple-choice", "question-answering"])
def test_the_tasks_are_saved_and_loaded(tmp_path: Path, name: str) -> None:
    columns = {"text": "body"} if name == "multiple-choice" else {}
    options = {} if name == "multiple-choice" else {"doc_stride": 64, "unanswerable": True}
    task = task_for(name, columns, **options)
    save_task(task, 96, tmp_path)
    assert load_task(tmp_path) == (task, 96)
