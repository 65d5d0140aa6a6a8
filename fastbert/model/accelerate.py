"""``fastbert.accelerate(model)``: a live transformers model becomes fast where it stands, and ``fastbert.restore`` undoes it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers import Pipeline

from . import heads, lm_heads, relative_heads, relatives  # noqa: F401 (they say which class stands for which)
from .encoder import PackedEncoder
from .refresh import refresh
from .swap import counterparts, is_fast, use_fast_classes, use_their_classes

Model = TypeVar("Model")


def accelerate(model: Model) -> Model:
    """Makes every BERT (RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA) inside ``model`` fast, in place, and returns ``model``.

    ``model`` is any module: an encoder, a task head, one wrapped by PEFT, a SentenceTransformer, a model of your own with a BERT in
    it, or a pipeline. Only classes change: parameters, hooks, adapters, gradient checkpointing and training mode stay as they
    are, and ``fastbert.explain(model)`` says what runs fused now. A model that is fast already is left as it is.

    Raises TypeError for what is no module, and where nothing in it has a fast counterpart.
    """
    module = module_of(model)
    if not use_fast_classes(module) and not is_fast(module):
        known = [theirs.__name__ for theirs in encoder_classes()]
        raise TypeError(
            f"{type(module).__qualname__} contains nothing that fastbert can accelerate: it knows transformers' "
            f"{', '.join(known)}, not classes derived from them"
        )
    return model


def restore(model: Model) -> Model:
    """Gives everything that :func:`accelerate` changed inside ``model`` its class of transformers back; returns ``model``.

    Models that were made from fastbert's own classes become transformers' too. Raises TypeError for what is no module.
    """
    module = module_of(model)
    refresh(module)  # what was packed of it serves no call any more
    use_their_classes(module)
    return model


def encoder_classes() -> tuple[type, ...]:
    """transformers' encoders that have a fast counterpart."""
    return tuple(theirs for theirs, ours in counterparts().items() if issubclass(ours, PackedEncoder))


def module_of(model: object) -> nn.Module:
    """The module in a pipeline, and a module itself; raises TypeError for anything else."""
    module = model.model if isinstance(model, Pipeline) else model
    if not isinstance(module, nn.Module):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"expected a torch.nn.Module or a transformers pipeline, got {kind}")
    return module
