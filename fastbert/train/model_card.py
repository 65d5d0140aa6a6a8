"""The model card (README.md) of a pretrained model: what it was trained on, how, how well, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import BertConfig

from .settings import PretrainSettings

if TYPE_CHECKING:
    from .pretrain import PretrainResult


def model_card(settings: PretrainSettings, result: PretrainResult, config: BertConfig) -> str:
    """Markdown with the metadata block that the Hugging Face Hub reads."""
    sections = [
        _metadata(),
        f"# BERT with {config.num_hidden_layers} layers and {config.hidden_size} hidden units, pretrained with fastbert",
        "A BERT encoder with its two pretraining heads: masked words and next sentences. transformers loads it:",
        '```python\nfrom transformers import AutoTokenizer, BertForPreTraining\n\nfolder = "PATH_OF_THIS_FOLDER"\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\nmodel = BertForPreTraining.from_pretrained(folder)\n```",
        "The same lines with `from fastbert import BertForPreTraining` run it faster.",
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
        ("steps", f"{result.steps:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("tokens per batch", f"at most {settings.tokens_per_batch:,}"),
        ("longest sequence", f"{settings.max_seq_length} tokens"),
        ("optimizer", f"AdamW, weight decay {settings.weight_decay:g}, gradient norm clipped to {settings.max_grad_norm:g}"),
        ("learning rate", f"{settings.learning_rate:g}, {settings.effective_warmup_steps:,} steps of warmup, linear decay"),
        ("dropout", f"{settings.effective_dropout:g}"),
        ("masking", "15% of the tokens, drawn anew in every batch: 80% [MASK], 10% a random token, 10% unchanged"),
        ("sentence pairs", "50% the true next, 50% from another document"),
        ("device", result.device),
        ("speed", f"{result.tokens_per_second:,.0f} real tokens/s"),
    ]  # fmt: skip
    return rows


def _scores(result: PretrainResult) -> str:
    rows = [
        (label, f"{result.held_out_start[name]:.4f}", f"{result.held_out[name]:.4f}")
        for name, label in (
            ("mlm_loss", "masked LM loss (nats)"),
            ("mlm_accuracy", "masked LM accuracy"),
            ("nsp_loss", "next sentence loss (nats)"),
            ("nsp_accuracy", "next sentence accuracy"),
        )
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
