"""The command ``fastbert`` itself; each command adds itself, here or in a module of its own that ``main`` imports."""

from __future__ import annotations

from typing import Annotated

import typer

from fastbert import __version__

app = typer.Typer(
    help="The BERT of Hugging Face transformers, only faster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


@app.callback()
def fastbert(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options that stand before the command."""
