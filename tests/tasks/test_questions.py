from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from fastbert.data.collator import DataCollatorWithPacking
from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.tokenizer import load_tokenizer
from fastbert.model.accelerate import accelerate
from fastbert.runs.errors import SettingsError
from fastbert.tasks import questions
from fastbert.tasks.examples import Answer, Examples, QuestionExample
from fastbert.tasks.model import TaskModel
from fastbert.tasks.outputs import model_outputs
from fastbert.tasks.questions import QuestionAnswering, Window

TASK = QuestionAnswering(name="question-answering")
WORDS = ["who", "what", "sat", "cat", "mat", "on", "the", "dog", "and", "ran", "##ning", "##s", "run", "?", "."]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.BertTokenizer:
    return transformers.BertTokenizer(
        vocab={token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    )


def examples(*questions: tuple[str, str, str | None]) -> Examples[QuestionExample]:
    """Of (question, context, answer): the answer stands where the context first has it, "" is none."""
    items = []
    for number, (question, context, answer) in enumerate(questions):
        answers = None if answer is None else (Answer(answer, context.index(answer)),) if answer else ()
        items.append(QuestionExample(f"question {number}", f"q{number}", question, context, answers))
    return Examples("dev.json", items, {})


def long_examples(count: int, words: int, seed: int) -> Examples[QuestionExample]:
    """Random contexts with an answer of one to five words; where it stands several times, not always the first."""
    draw = random.Random(seed)
    items = []
    for number in range(count):
        context = draw.choices(["cat", "on", "mats", "running", "dog.", "and  ran"], k=draw.randint(1, words))
        first = draw.randrange(len(context))
        answer = " ".join(context[first : first + draw.randint(1, 5)])
        start = len(" ".join([*context[:first], ""]))
        items.append(QuestionExample(f"question {number}", f"q{number}", "Who ran?", " ".join(context), (Answer(answer, start),)))
    return Examples("train.json", items, {})


def oracle(features: Any) -> list[np.ndarray]:
    """Logits that are sure of the labels."""
    outputs = []
    for row in features.rows:
        logits = np.zeros((len(row["input_ids"]), 2), np.float32)
        if row["start_positions"]:
            logits[row["start_positions"], 0] = logits[row["end_positions"], 1] = 9
        outputs.append(logits)
    return outputs


# --- features --------------------------------------------------------------------------------------------------------------


def test_a_row_is_question_and_context_with_the_answers_tokens(tokenizer: Any) -> None:
    some = examples(("Who sat?", "The cat sat on mats.", "mats"), ("What?", "Cats ran.", ""), ("Who?", "The dog", "The dog"))
    features = TASK.features(some, tokenizer, 32, labelled=True)
    tokens = [" ".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) for row in features.rows]
    assert tokens[0] == "[CLS] who sat ? [SEP] the cat sat on mat ##s . [SEP]"
    assert [(row["start_positions"], row["end_positions"]) for row in features.rows] == [(9, 10), (0, 0), (4, 5)]
    assert features.rows[0]["token_type_ids"] == [0] * 5 + [1] * 8
    assert (features.example_of, features.truncated) == ([0, 1, 2], 0)
    window = features.notes[0]
    assert window.first == 5
    assert [some.items[0].context[start:end] for start, end in window.spans] == ["The", "cat", "sat", "on", "mat", "s", "."]
    assert set(TASK.features(some, tokenizer, 32, labelled=False).rows[0]) == {"input_ids", "token_type_ids"}


def test_an_answer_inside_of_a_token_or_with_blanks_around_it_is_its_tokens(tokenizer: Any) -> None:
    some = examples(("Who?", "The cats  ran", "ca"), ("Who?", "The cats  ran", " cats  "), ("Who?", "The cats  ran", "s  r"))
    features = TASK.features(some, tokenizer, 32, labelled=True)
    spans = [(row["start_positions"], row["end_positions"]) for row in features.rows]
    assert spans == [(5, 5), (5, 6), (6, 7)]
    assert [TASK.predictions(oracle(features), features, some)[number]["answer"] for number in range(3)] == [
        "cat",
        "cats",
        "s  ran",
    ]


@pytest.mark.parametrize(("length", "doc_stride", "shared"), [(24, 4, 4), (24, 0, 0), (24, 128, 5)])
def test_windows_of_a_long_context(tokenizer: Any, length: int, doc_stride: int, shared: int) -> None:
    task = replace(TASK, doc_stride=doc_stride)
    some = long_examples(40, 100, seed=1)
    features = task.features(some, tokenizer, length, labelled=True)
    assert len(features.rows) > 100 and max(len(row["input_ids"]) for row in features.rows) == length
    for number, example in enumerate(some):
        windows = [window for window, owner in zip(features.notes, features.example_of) if owner == number]
        for window, following in zip(windows, windows[1:]):
            assert (window.spans[len(window.spans) - shared :] == following.spans[:shared]).all()
            assert (
                (window.spans[-1] == following.spans[shared - 1]).all() if shared else following.spans[0, 0] >= window.spans[-1, 1]
            )
        assert example.context[: windows[0].spans[0, 0]].strip() == example.context[windows[-1].spans[-1, 1] :].strip() == ""
        rows = [row for row, owner in zip(features.rows, features.example_of) if owner == number]
        answer = example.answers[0]
        for row, window in zip(rows, windows):
            whole = window.spans[0, 0] <= answer.start and answer.start + len(answer.text) <= window.spans[-1, 1]
            assert (row["start_positions"] > 0) == whole
            if whole:
                first, last = row["start_positions"] - window.first, row["end_positions"] - window.first
                assert (window.spans[first, 0], window.spans[last, 1]) == (answer.start, answer.start + len(answer.text))


def test_questions_come_in_portions(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    some = long_examples(25, 60, seed=2)
    whole = TASK.features(some, tokenizer, 30, labelled=True)
    monkeypatch.setattr(questions, "_QUESTIONS_AT_ONCE", 7)
    portions = TASK.features(some, tokenizer, 30, labelled=True)
    assert (portions.rows, portions.example_of) == (whole.rows, whole.example_of)
    assert TASK.features(Examples("none", [], {}), tokenizer, 30, labelled=True).rows == []


def test_a_long_question_is_cut(tokenizer: Any) -> None:
    some = examples(("who " * 100, "cat sat", "cat"), ("who?", "cat sat", "cat"))
    for length, kept in ((200, 64), (43, 20)):
        features = TASK.features(some, tokenizer, length, labelled=True)
        assert features.truncated == 1
        assert features.rows[0]["input_ids"].count(5) == kept == features.notes[0].first - 2


# --- the best spans --------------------------------------------------------------------------------------------------------


def test_the_labels_as_logits_give_the_answers(tokenizer: Any) -> None:
    some = long_examples(60, 90, seed=3)
    features = TASK.features(some, tokenizer, 40, labelled=True)
    assert TASK.scores(oracle(features), features, some) == {"exact_match": 1.0, "f1": 1.0}
    for prediction, example in zip(TASK.predictions(oracle(features), features, some), some, strict=True):
        answer = example.answers[0]
        assert prediction["answer"] == answer.text == example.context[prediction["start"] : prediction["end"]]
        assert (prediction["id"], prediction["start"]) == (example.id, answer.start)


def test_byte_level_tokens(tmp_path: Path) -> None:
    """RoBERTa's: two [SEP] between the texts, blanks that belong to tokens, several tokens of one character."""
    some = long_examples(60, 90, seed=3)
    items = [
        replace(e, context="K\u00f6ln \U0001f600 " + e.context, answers=(Answer(a.text, a.start + 7),))
        for e in some
        for a in e.answers
    ]
    some = replace(some, items=items)
    backend = tokenizers.ByteLevelBPETokenizer(trim_offsets=True)
    backend.train_from_iterator(
        [e.context for e in some], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    backend.save_model(str(tmp_path))
    byte_level = transformers.RobertaTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    features = TASK.features(some, byte_level, 48, labelled=True)
    assert len(features.rows) > len(some)
    assert TASK.scores(oracle(features), features, some) == {"exact_match": 1.0, "f1": 1.0}
    assert all(row["input_ids"].count(byte_level.sep_token_id) == 3 for row in features.rows)


def by_hand(task: QuestionAnswering, outputs: list[np.ndarray], windows: list[Window]) -> list[tuple[float, int, int]]:
    """Every span of every window, one by one."""
    best: dict[tuple[int, int], float] = {}
    for logits, window in zip(outputs, windows):
        for i in range(len(window.spans)):
            for j in range(i, min(i + 30, len(window.spans))):
                span = (int(window.spans[i, 0]), int(window.spans[j, 1]))
                score = float(logits[window.first + i, 0]) + float(logits[window.first + j, 1])
                best[span] = max(score, best.get(span, -np.inf))
    if task.unanswerable:
        best[(-1, -1)] = min(float(logits[0, 0]) + float(logits[0, 1]) for logits in outputs)
    return sorted(((score, *span) for span, score in best.items()), reverse=True)[:20]


@pytest.mark.parametrize("unanswerable", [False, True])
def test_best_spans_are_those_of_all_spans(tokenizer: Any, unanswerable: bool) -> None:
    task = replace(TASK, unanswerable=unanswerable)
    some = long_examples(30, 120, seed=4)
    features = task.features(some, tokenizer, 60, labelled=False)
    rng = np.random.default_rng(5)
    outputs = [rng.normal(size=(len(row["input_ids"]), 2)).astype(np.float32) for row in features.rows]
    for logits, window in zip(outputs, features.notes):
        logits[0] += 1.5  # the first token competes
        logits[1 : window.first] += 50  # the question and what is between takes no part
        logits[window.first + len(window.spans) :] += 50
    found = list(task.candidates(outputs, features))
    without_answer = 0
    for number, candidates in enumerate(found):
        owned = [row for row, owner in enumerate(features.example_of) if owner == number]
        expected = by_hand(task, [outputs[row] for row in owned], [features.notes[row] for row in owned])
        assert candidates.scores.tolist() == pytest.approx([score for score, *_ in expected])
        assert list(zip(candidates.starts, candidates.ends)) == [tuple(span) for _, *span in expected]
        without_answer += int(candidates.starts[0] == -1)
    assert 0 < without_answer < len(found) if unanswerable else without_answer == 0


def test_no_answer_is_predicted_where_its_lowest_score_is_higher(tokenizer: Any) -> None:
    some = examples(("Who?", "cat sat on the mat " * 8, "cat"), ("Who?", "the dog ran", ""))
    task = TASK.with_labels_of(some)
    assert task.unanswerable and not TASK.with_labels_of(examples(("Who?", "the dog ran", "dog"))).unanswerable
    features = task.features(some, tokenizer, 24, labelled=True)
    outputs = oracle(features)
    assert len(outputs) > 3
    for logits in outputs:
        logits[0] = 5
    assert task.scores(outputs, features, some)["has_answer_exact_match"] == 1.0  # 9 + 9 against 5 + 5
    for logits in outputs[:-1]:
        logits[0] = 10
    outputs[1][0] = 8  # one window that is not sure is enough
    scores = task.scores(outputs, features, some)
    assert (scores["has_answer_exact_match"], scores["no_answer_accuracy"], scores["f1"]) == (1.0, 1.0, 1.0)
    first, second = task.predictions(outputs, features, some)
    assert first["answer"] == "cat" and first["alternatives"][0]["answer"] == ""
    assert (second["answer"], second["start"], second["end"]) == ("", None, None)
    outputs[1][0] = 10
    assert task.predictions(outputs, features, some)[0]["answer"] == ""
    assert TASK.predictions(outputs, features, some)[1]["answer"] != ""


def test_probabilities_of_the_alternatives(tokenizer: Any) -> None:
    some = examples(("Who?", "cat sat", "cat"))
    features = TASK.features(some, tokenizer, 24, labelled=True)
    outputs = [np.log(np.array([[9, 9], [9, 9], [9, 9], [9, 9], [3, 1], [2, 4], [9, 9]], np.float32))]
    (prediction,) = TASK.predictions(outputs, features, some)
    found = [prediction, *prediction["alternatives"]]
    assert [answer["answer"] for answer in found] == ["cat sat", "sat", "cat"]
    assert [answer["score"] for answer in found] == pytest.approx([12 / 23, 8 / 23, 3 / 23], abs=1e-6)
    assert {key: prediction[key] for key in ("id", "start", "end")} == {"id": "q0", "start": 0, "end": 7}


def test_packed_and_padded_rows_have_the_same_answers(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForQuestionAnswering(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # logits that differ
    some = long_examples(12, 80, seed=6)
    features = TASK.features(some, tokenizer, 40, labelled=True)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    padded = model_outputs(TaskModel(model, tokenizer, False, collate, ()), features.rows, family="questions", tokens_per_batch=200)
    accelerate(model)
    loaded = TaskModel(model, tokenizer, True, DataCollatorWithPacking(), ())
    packed = model_outputs(loaded, features.rows, family="questions", tokens_per_batch=200)
    assert TASK.scores(packed, features, some) == TASK.scores(padded, features, some)
    for ours, theirs in zip(TASK.candidates(packed, features), TASK.candidates(padded, features), strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=2e-4)
        assert (ours.starts[0], ours.ends[0]) == (theirs.starts[0], theirs.ends[0])


# --- reading and checking --------------------------------------------------------------------------------------------------


def test_reading_and_the_real_dev_set(data_folder: Path) -> None:
    some = TASK.read(Source(data_folder / "qa/squad_v1.1/dev-v1.1.json.gz"))
    assert len(some) == 10570
    task = TASK.with_labels_of(some)
    task.check(some, labelled=True)
    assert not task.unanswerable
    some = replace(some, items=some.items[::20])
    tokenizer = load_tokenizer(str(data_folder / "vocab/bert-base-uncased"))
    features = task.features(some, tokenizer, 384, labelled=True)
    assert len(features.rows) > len(some) and features.truncated == 0
    scores = task.scores(oracle(features), features, some)
    assert scores["exact_match"] > 0.985 and scores["f1"] > 0.995  # the others end inside of a word, or have over 30 tokens
    labelled = {number for row, number in zip(features.rows, features.example_of) if row["start_positions"]}
    assert labelled == set(range(len(some)))


def test_examples_from_python() -> None:
    some = TASK.examples_from([{"question": "Who?", "context": "Me.", "id": 7}, ("What?", "This.")])
    assert some.items == [
        QuestionExample("input 1", "7", "Who?", "Me.", None),
        QuestionExample("input 2", "2", "What?", "This.", None),
    ]
    for wrong in ({"question": "Who?"}, ("Who?", None), {"question": "Who?", "context": None}):
        with pytest.raises(DataError, match="inputs, input 1, column 'context': expected a text"):
            TASK.examples_from([wrong])
    with pytest.raises(DataError, match="inputs, input 1: expected a dict with question and context, or a pair of them"):
        TASK.examples_from(["Who?"])
    with pytest.raises(DataError, match="inputs, input 1: expected a dict with question and context, or a pair of them"):
        TASK.examples_from([("Who?", "Me.", "1")])


def test_answers_play_no_part_in_what_is_to_be_predicted(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "Who?", "context": "Me.", "answers": {"text": ["You"], "answer_start": [0]}}\n')
    assert TASK.read_unlabelled(Source(path)).items == [QuestionExample("line 1", "1", "Who?", "Me.")]
    with pytest.raises(DataError, match="line 1, column 'answers': answer_start 0: expected 'You'"):
        TASK.read(Source(path))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (QuestionExample("question 7", "7", " ", "Me.", ()), r"dev\.json, question 7, column 'question': is empty"),
        (QuestionExample("question 7", "7", "Who?", "\n", ()), "question 7, column 'context': is empty"),
        (QuestionExample("question 7", "7", "Who?", "Me."), "question 7, column 'answers': has no answers"),
        (
            QuestionExample("question 7", "7", "Who?", "Me.", (Answer("Me", 1),)),
            "'Me' does not stand in the context at character 1",
        ),
        (QuestionExample("question 7", "7", "Who?", "Me.", (Answer("", 1),)), "'' does not stand in the context"),
        (QuestionExample("question 7", "7", "Who?", "Me.", (Answer(".", -1),)), "'.' does not stand in the context"),
    ],
)
def test_a_bad_example_is_named(example: QuestionExample, message: str) -> None:
    good = QuestionExample("question 1", "1", "Who?", "Me.", (Answer("Me", 0),))
    some = Examples("dev.json", [good, example], {})
    with pytest.raises(DataError, match=message):
        TASK.check(some, labelled=True)
    if "is empty" not in message:
        TASK.check(some, labelled=False)


def test_what_nothing_can_be_learned_from() -> None:
    with pytest.raises(DataError, match="none of 1 questions has an answer: there is nothing to learn"):
        TASK.with_labels_of(examples(("Who?", "Me.", "")))
    with pytest.raises(DataError, match="question 1, column 'answers': has no answers"):
        TASK.with_labels_of(examples(("Who?", "Me.", "Me"), ("Who?", "Me.", None)))


def test_texts_of_which_the_tokenizer_keeps_nothing(tokenizer: Any) -> None:
    for question, context, message in (
        ("Who?", "\u200d\ufffd", "question 1, column 'context': holds '.*', of which the tokenizer keeps nothing"),
        ("\u200d", "Me.", "question 1, column 'question': holds '.*', of which the tokenizer keeps nothing"),
    ):
        some = examples(("Who?", "Me.", "Me"), (question, context, None))
        with pytest.raises(DataError, match=message):
            TASK.features(some, tokenizer, 24, labelled=False)


def test_settings_that_cannot_work() -> None:
    with pytest.raises(SettingsError, match="doc_stride is -1"):
        QuestionAnswering(name="question-answering", doc_stride=-1)
    with pytest.raises(SettingsError, match=r"--task question-answering reads columns .* takes no others \(body\)"):
        QuestionAnswering(name="question-answering", columns={"text": "body"})
    names = {0: "LABEL_0", 1: "LABEL_1"}
    assert TASK.config() == {
        "num_labels": 2, "id2label": names, "label2id": {name: number for number, name in names.items()}, "problem_type": None,
    }  # fmt: skip
