"""The command ``fastbert``. Commands import what they need when they run, so ``fastbert --help`` waits for no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastbert.gpus import GPUS
from fastbert.train.settings import MODEL_PRESETS

from . import embed, finetune, glue, predict, prepare, pretrain  # noqa: F401 (they add themselves to the app)
from .app import app
from .command import DebugOption, JsonOption, SeveralValuesCommand, run_command


@app.command()
def doctor(json_output: JsonOption = False, debug: DebugOption = False) -> None:
    """Show versions, hardware, native builds, and which backend each op runs on and why not on others."""
    from .doctor import doctor as body

    run_command("doctor", body, json_output=json_output, debug=debug)


@app.command(cls=SeveralValuesCommand)
def bench(
    suite: Annotated[str, typer.Option(help="inference, finetune, pretrain or ops.")] = "inference",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32, bfloat16, int8 (inference only); several may follow. Left out: all of the suite.",
            metavar="DTYPE...",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, typer.Option(help=f"{', '.join(MODEL_PRESETS)}, or a checkpoint (folder or Hub name).")] = "base",
    batches: Annotated[
        list[str] | None,
        typer.Option(
            help="32x128 (sequences x tokens), mnli, squad, wikipedia, sst2, ... (32 of real lengths, padded), 64xmnli, "
            "mnli/longest; or standard, by-length, by-sequences, real; several may follow. Left out: those of the suite.",
            metavar="BATCH...",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Count real lengths in this folder (glue/, qa/, pretrain/) instead of taking the embedded ones."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Counts the tokens of --data; default: the checkpoint's own.")] = None,
    ops: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the suite ops: attention, linear_gelu, mlm_loss, ...; several may follow. Left out: all.",
            metavar="OP...",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of every contender on a batch.  [default: 5; of an op 30]", show_default=False),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds for a batch, after which 3 rounds are enough; of the suite ops for all, after which nothing new begins."
            "  [default: 60; ops 300]",
            show_default=False,
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            help="Who takes part beside fastbert: transformers, transformers-eager, transformers-compiled, transformers-sorted, "
            "transformers-flash; for inference also transformers-packed, flash-attn-bert, zentorch, onnxruntime, openvino, "
            "ctranslate2; for training transformers-liger; for ops torch-eager, torch-compile, torch-quantized, plain-linear, "
            "sdpa, varlen-attn, flash-attn, liger; several may follow. Left out: for inference and ops all that are installed, for "
            "training all but those that take minutes (eager, compiled).",
            metavar="PEER...",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every contender.  [default: torch's]", show_default=False)] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time goes, part by part, beside transformers.")
    ] = False,
    save: Annotated[str | None, typer.Option(help="Keep the document in benchmarks/results/FOLDER.", metavar="FOLDER")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write a report into this folder: JSON, Markdown and pictures.", metavar="FOLDER"),
    ] = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure fastbert beside the other engines that are installed, on the same weights, and beside the machine's ceilings."""
    from .bench import bench as body

    options = {
        "suite": suite, "device": device, "dtypes": tuple(dtype) if dtype else None, "model": model,
        "batches": tuple(batches) if batches else None, "data": data, "tokenizer": tokenizer, "rounds": rounds,
        "limit_s": limit, "peers": tuple(peers) if peers else None, "threads": threads, "profile": profile,
        "ops": tuple(ops) if ops else None,
    }  # fmt: skip
    command = " ".join(["fastbert", *sys.argv[1:]])
    run_command("bench", lambda say: body(options, save, output, command, say), json_output=json_output, debug=debug)


@app.command(cls=SeveralValuesCommand)
def warmup(
    model: Annotated[str, typer.Option(help=f"{', '.join(MODEL_PRESETS)}, or a checkpoint (folder or Hub name).")] = "base",
    dtype: Annotated[
        list[str],
        typer.Option(
            help="bfloat16, float16, float32, tf32 (float32 with TF32 products allowed); several may follow.", metavar="DTYPE..."
        ),
    ] = ("bfloat16",),
    max_seq_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a sequence at most; never more than the checkpoint has positions.")
    ] = 512,
    inference: Annotated[bool, typer.Option("--inference", help="Only what inference launches: no gradients, no dropout.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help=f"GPUs to compile for, there or not: {', '.join(GPUS)}; several may follow. Left out: this machine's.",
            metavar="GPU...",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile.  [default: one per core]", show_default=False)
    ] = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile the Triton kernels of a model ahead of its first step, also for GPUs that are not there (TRITON_CACHE_DIR)."""
    from .warmup import warmup as body

    run_command(
        "warmup",
        lambda say: body(model, list(dtype), max_seq_length, inference, list(target or ()), jobs, say),
        json_output=json_output,
        debug=debug,
    )


def main() -> None:
    """The console script."""
    if sys.stderr is None:  # closed, which is no reason for an error
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the end)
    app(prog_name="fastbert")
