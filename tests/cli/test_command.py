"""Exit codes, the JSON line, several values after one option, and a start that imports nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer

from fastbert.cli.command import (
    CommandFailure,
    CommandResult,
    run_command,
    spread_values,
)


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        ("--corpus a b --steps 3", "--corpus a --corpus b --steps 3"),
        ("--corpus a --corpus b", "--corpus a --corpus b"),
        ("--corpus=a b", "--corpus=a --corpus b"),
        ("--steps 3 --corpus a", "--steps 3 --corpus a"),
        ("--compare x", "--compare x"),
        ("--corpus a -- b c", "--corpus a -- b c"),
        ("--corpus", "--corpus"),
        ("--corpus a - b", "--corpus a --corpus - --corpus b"),
    ],
)
def test_several_values_after_one_option(words, spread):
    assert spread_values(words.split(), {"--corpus"}) == spread.split()


def run(body, *, json_output=True, debug=False) -> int:
    with pytest.raises(typer.Exit) as exit_:
        run_command("test", body, json_output=json_output, debug=debug)
    return exit_.value.exit_code


def raises(error):
    def body(say):
        say("text for people")
        raise error

    return body


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_result_is_the_last_line_of_stdout(capsys, exit_code):
    def body(say):
        say("text for people")
        return CommandResult({"answer": 42}, exit_code)

    assert run(body) == exit_code
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"command": "test", "exit_code": exit_code, "answer": 42}
    assert captured.err == "text for people\n"
    assert run(body, json_output=False) == exit_code
    assert capsys.readouterr().out == "text for people\n"


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (CommandFailure("no good"), 1, "no good"),
        (CommandFailure("no such option", 2), 2, "no such option"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "a.txt"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_expected_errors_are_one_message(capsys, error, exit_code, message):
    assert run(raises(error)) == exit_code
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["exit_code"] == exit_code and message in document["error"]
    assert message in captured.err and "Traceback" not in captured.err


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(CommandFailure):
        run_command("test", raises(CommandFailure("no good")), json_output=False, debug=True)


def test_other_errors_are_not_hidden(capsys):
    with pytest.raises(ZeroDivisionError):
        run_command("test", raises(ZeroDivisionError("a bug")), json_output=True, debug=False)
    assert json.loads(capsys.readouterr().out) == {"command": "test", "exit_code": 1, "error": "ZeroDivisionError: a bug"}


@pytest.mark.parametrize("json_output", [False, True])
def test_a_full_standard_output_is_named(capsys, monkeypatch, json_output):
    def body(say):
        say("text for people")
        return CommandResult({})

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(body, json_output=json_output) == 1
    message = "fastbert test: standard output cannot be written to: No space left on device\n"
    assert capsys.readouterr().err == ("text for people\n" if json_output else "") + message


def test_a_closed_standard_output_takes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run(lambda say: CommandResult({})) == 0
    assert run(raises(OSError("a place"))) == 1
    assert capsys.readouterr().err == "text for people\nfastbert test: a place\n"


@pytest.mark.parametrize("json_output", [False, True])
def test_a_reader_that_has_ended_ends_the_command_without_a_word(capsys, monkeypatch, json_output):
    reading, writing = os.pipe()
    os.close(reading)

    def body(say):
        say("text for people")
        return CommandResult({})

    with os.fdopen(writing, "w") as pipe:  # which flushes what is left, as Python does at its end
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(body, json_output=json_output) == 1
    assert capsys.readouterr().err == ("text for people\n" if json_output else "")


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, fastbert.cli.main; print(sorted({'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
