"""What all commands share: how they print, fail and exit.

Exit codes: 0 done, 1 failed (or nobody reads what is printed, as after ``| head``), 2 wrong usage, 130 interrupted. With ``--json``
the last line of stdout is one JSON document, ``{"command": ..., "exit_code": ..., ...}`` with ``"error"`` where the command failed,
and text for people goes to stderr; options that cannot be parsed end in exit code 2 and words on stderr alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

from fastbert.data.errors import DataError
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError, TrainingError

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class CommandFailure(Exception):
    """An expected end that is not success: a message for the user and the exit code."""

    def __init__(self, message: str, exit_code: int = FAILED):
        super().__init__(message)
        self.exit_code = exit_code


class NobodyReads(Exception):
    """What reads the command's output has ended, as ``head`` does: no error, and nothing that more words could mend."""


@dataclass(frozen=True)
class CommandResult:
    """``document``: what ``--json`` prints; ``exit_code``: :data:`DONE`, or :data:`FAILED` for a result that is bad news."""

    document: dict[str, Any]
    exit_code: int = DONE


class SeveralValuesCommand(TyperCommand):
    """A command whose repeatable options also take several values after one flag: ``--corpus a.txt b.txt``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        repeatable = {name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts}
        return super().parse_args(ctx, spread_values(args, repeatable))


def spread_values(args: list[str], repeatable: set[str]) -> list[str]:
    """``--corpus a b`` as ``--corpus a --corpus b``: words after a repeatable option belong to it, up to the next option."""
    spread: list[str] = []
    current = None
    for position, word in enumerate(args):
        if word == "--":
            return spread + args[position:]
        if word.startswith("-") and word != "-":
            name = word.partition("=")[0]
            current = name if name in repeatable else None
            spread.append(word)
        elif current is not None and spread[-1] != current:
            spread += [current, word]
        else:
            spread.append(word)
    return spread


def given_options(ctx: typer.Context) -> dict[str, Any]:
    """The options that stand on the command line, by parameter name, without those left at their default and those of all commands
    (``--json``, ``--debug``), which say how it prints."""
    return {
        name: value
        for name, value in ctx.params.items()
        if name not in ("json_output", "debug")
        and (source := ctx.get_parameter_source(name)) is not None
        and source.name == "COMMANDLINE"
    }


def prints_unicode() -> bool:
    """Whether stdout takes all characters: the terminal's encoding may be an old one, and LC_ALL may say so."""
    return sys.stdout is not None and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def run_command(name: str, body: Callable[[Say], CommandResult], *, json_output: bool, debug: bool) -> None:
    """Runs ``body`` with a function that prints for people, prints its document or its error, and exits with its code."""

    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: no work is lost for want of a character, nor by the name of a file that is no text.
        sys.stdout.reconfigure(errors="backslashreplace")

    def say(text: str) -> None:
        _print(text, sys.stderr if json_output else sys.stdout)

    try:
        _run(name, lambda: body(say), json_output, debug)
    except NobodyReads as gone:
        raise typer.Exit(FAILED) from gone


def _run(name: str, body: Callable[[], CommandResult], json_output: bool, debug: bool) -> None:
    try:
        result = body()
        if json_output:
            _print_document({"command": name, "exit_code": result.exit_code, **result.document})
    except NobodyReads:
        raise
    except CommandFailure as failure:
        _fail(name, str(failure), failure.exit_code, json_output, debug, failure)
    except SettingsError as error:
        _fail(name, str(error), WRONG_USAGE, json_output, debug, error)
    except (DataError, TrainingError, OSError) as error:
        _fail(name, str(error), FAILED, json_output, debug, error)
    except KeyboardInterrupt as interrupt:
        _fail(name, "interrupted", INTERRUPTED, json_output, debug, interrupt)
    except Exception as error:
        # Nothing that fastbert expects: the traceback is what a bug report needs, and --json still gets its document.
        if json_output:
            message = f"{type(error).__name__}: {error}"
            _print_document({"command": name, "exit_code": FAILED, "error": message})
        raise
    raise typer.Exit(result.exit_code)


def _fail(name: str, message: str, exit_code: int, json_output: bool, debug: bool, error: BaseException) -> None:
    _print(f"fastbert {name}: {message}", sys.stderr)
    if json_output:
        with contextlib.suppress(OSError):  # which may be the error
            _print_document({"command": name, "exit_code": exit_code, "error": message})
    if debug:
        raise error
    raise typer.Exit(exit_code)


def _print_document(document: dict[str, Any]) -> None:
    _print(json.dumps(document, allow_nan=False), sys.stdout)


def _print(text: str, stream: TextIO | None) -> None:
    """Nothing where the stream is closed. Raises :class:`NobodyReads`, and OSError where the stream cannot be written to; it then
    leads nowhere, so that nothing complains when Python flushes it at its end."""
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise NobodyReads from error
        name = "standard error" if stream is sys.stderr else "standard output"
        raise OSError(f"{name} cannot be written to: {error.strerror}") from error
