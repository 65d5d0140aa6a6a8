"""The model card (README.md) of a pretrained model: what it was trained on, how, how well, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import BertConfig

from .schedules import cycles
from .settings import PretrainSettings

if TYPE_CHECKING:
    from .pretrain import PretrainResult

OPTIMIZER_NAMES = {"adamw": "AdamW", "lamb": "LAMB"}
SCHEDULE_NAMES = {"linear": "linear decay", "polynomial": "decay by the square root", "one-cycle": "one cycle of cosines"}
MASKED_TOGETHER = {"token": "", "whole-word": ", whole words together", "span": ", spans of words together"}


def model_card(settings: PretrainSettings, result: PretrainResult, config: BertConfig) -> str:
    """Markdown with the metadata block that the Hugging Face Hub reads."""
    heads, model_class = "its two pretraining heads: masked words and next sentences", "BertForPreTraining"
    if settings.objective == "mlm":
        heads, model_class = "the pretraining head for masked words", "BertForMaskedLM"
    sections = [
        _metadata(),
        f"# BERT with {config.num_hidden_layers} layers and {config.hidden_size} hidden units, pretrained with fastbert",
        f"A BERT encoder with {heads}. transformers loads it:",
        f'```python\nfrom transformers import AutoTokenizer, {model_class}\n\nfolder = "PATH_OF_THIS_FOLDER"\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\nmodel = {model_class}.from_pretrained(folder)\n```",
        f"The same lines with `from fastbert import {model_class}` run it faster.",
        "## Data",
        _data(settings, result.data),
        "## Training",
        table(_training_rows(settings, result, config)),
        "## Scores on held-out text",
        _scores(result),
    ]
    if result.examples:
        sections += ["## Held-out words filled in", _examples(result)]
    if result.comparison is not None:
        sections += ["## Compared with transformers", _comparison(result.comparison)]
    sections += closing_sections(settings.command(), result.versions)
    return "\n\n".join(sections) + "\n"


def closing_sections(command: str, versions: Mapping[str, str]) -> list[str]:
    """What every card of fastbert ends with; ``versions``: of packages by their names."""
    return [
        "## How to repeat it",
        f"```\n{command}\n```",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "## License",
        "The terms of these weights follow from the texts that they were trained on; whoever publishes them names the "
        "license here. fastbert itself is under Apache-2.0.",
    ]


def table(rows: Sequence[tuple[str, str]]) -> str:
    """A table of Markdown with names on the left."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _metadata() -> str:
    lines = ["library_name: transformers", "license: other", "tags:", "- bert", "- fill-mask", "- fastbert"]
    return "\n".join(["---", *lines, "---"])


def _data(settings: PretrainSettings, data: dict[str, Any]) -> str:
    origin = "the English prose that comes with Python and its packages (docstrings and documentation)"
    if settings.corpus:
        origin = ", ".join(f"`{source}`" for source in settings.corpus)
    return (
        f"Source: {origin}.\n\n"
        f"{data['documents']:,} documents with {data['words']:,} words. {data['train_documents']:,} documents "
        f"({data['train_tokens']:,} tokens) were trained on, {data['held_out_documents']:,} "
        f"({data['held_out_tokens']:,} tokens) held out. The vocabulary has {data['vocab_size']:,} entries."
    )


def _training_rows(settings: PretrainSettings, result: PretrainResult, config: BertConfig) -> list[tuple[str, str]]:
    rows = [
        ("layers, hidden size, heads, intermediate size",
         f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}, {config.intermediate_size}"),
        ("parameters", f"{result.parameters:,}"),
        ("initial weights", f"`{settings.model}`" if settings.continues_checkpoint else f"random, seed {settings.seed}"),
        ("steps", f"{result.steps:,}" + (f", {len(result.skipped):,} of them left out" if result.skipped else "")),
        ("tokens", f"{result.tokens:,}"),
        ("batches", _batches(settings, result)),
        ("longest sequence", _lengths(result)),
        ("optimizer", f"{OPTIMIZER_NAMES[settings.optimizer]}, weight decay {settings.weight_decay:g}, gradient norm clipped to "
                      f"{settings.max_grad_norm:g}"),
        ("learning rate", _learning_rate(settings)),
        ("precision", "float32" if settings.dtype == "float32" else f"{settings.dtype} (autocast), weights in float32"),
        ("dropout", f"{settings.effective_dropout:g}"),
        ("masking", f"{100 * settings.mlm_probability:g}% of the tokens{MASKED_TOGETHER[settings.masking]}, drawn anew in every "
                    "batch: 80% [MASK], 10% a random token, 10% unchanged"),
        *_pairs(settings),
        ("device", result.device),
        ("speed", _speed(result)),
        *_waiting_and_memory(result.telemetry),
    ]  # fmt: skip
    return rows


def _speed(result: PretrainResult) -> str:
    text, mfu, rate = f"{result.tokens_per_second:,.0f} real tokens/s", result.telemetry["mfu"], result.telemetry["matmul_rate"]
    if mfu is None:
        return text
    text += f", MFU {mfu:.1%}"
    return text if rate is None else f"{text} (matmul rate {rate / 1e9:,.0f} GFLOP/s)"


def _waiting_and_memory(telemetry: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of them."""
    wait = telemetry["loader_wait"]
    rows = [] if wait is None else [("waiting for batches", f"{wait:.1%} of the time")]
    peaks = (("peak memory of the process", "peak_rss_bytes"), ("peak memory on the GPU", "peak_cuda_bytes"))
    return rows + [(label, f"{telemetry[name] / 2**20:,.0f} MiB") for label, name in peaks if telemetry[name] is not None]


def _batches(settings: PretrainSettings, result: PretrainResult) -> str:
    """Their size, how full they were, and how many make a step."""
    text = f"at most {settings.tokens_per_batch:,} tokens, of which {result.fill:.1%} were used"
    return text if settings.batches_per_step == 1 else f"{settings.batches_per_step:,} a step, each of {text}"


def _lengths(result: PretrainResult) -> str:
    if len(result.phases) == 1:
        return f"{result.phases[0]['max_seq_length']} tokens"
    return ", then ".join(f"{phase['max_seq_length']} tokens for {phase['steps']:,} steps" for phase in result.phases)


def _learning_rate(settings: PretrainSettings) -> str:
    return ", then ".join(
        f"{cycle.peak:g}, {cycle.warmup_steps:,} steps of warmup, {SCHEDULE_NAMES[settings.schedule]}" for cycle in cycles(settings)
    )


def _pairs(settings: PretrainSettings) -> list[tuple[str, str]]:
    if settings.objective == "mlm":
        return []
    again = ", the same in every epoch" if settings.static_pairs else ""
    return [("sentence pairs", f"50% the true next, 50% from another document{again}")]


def _scores(result: PretrainResult) -> str:
    rows = [
        (label, f"{result.held_out_start[name]:.4f}", f"{result.held_out[name]:.4f}")
        for name, label in (
            ("mlm_loss", "masked LM loss (nats)"),
            ("mlm_accuracy", "masked LM accuracy"),
            ("nsp_loss", "next sentence loss (nats)"),
            ("nsp_accuracy", "next sentence accuracy"),
        )
        if name in result.held_out
    ]
    lines = ["| | before training | after training |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return (
        "\n".join(lines) + f"\n\nMeasured on {result.data['scored_tokens']:,} held-out tokens, with the same sentence pairs and "
        "masks each time. `loss.png` shows the way there, `metrics.jsonl` has the numbers."
    )


def _examples(result: PretrainResult) -> str:
    lines = []
    for example in result.examples:
        guesses = ", ".join(f"{token} ({probability:.0%})" for token, probability in example.predictions)
        lines.append(f"- {example.text}\n  - was: {example.truth}\n  - the model says: {guesses}")
    return "```\n" + "\n".join(lines) + "\n```"


def _comparison(summary: dict[str, Any]) -> str:
    return table(
        [
            ("compared steps", f"{summary['compared_steps']:,}, dropout 0 in both, float32, transformers with sdpa"),
            ("real tokens/s, fastbert", f"{summary['tokens_per_second']:,.0f}"),
            ("real tokens/s, transformers", f"{summary['transformers_tokens_per_second']:,.0f}"),
            ("ratio", f"{summary['speedup']:.2f}"),
            (
                f"largest relative difference of the losses, first {summary['agreement_steps']} steps",
                f"{summary['largest_relative_difference']:.1e}",
            ),
            ("held-out masked LM loss, fastbert", f"{summary['held_out']['fastbert']['mlm_loss']:.4f}"),
            ("held-out masked LM loss, transformers", f"{summary['held_out']['transformers']['mlm_loss']:.4f}"),
        ]
    )
