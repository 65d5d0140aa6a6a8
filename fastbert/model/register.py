"""``fastbert.register()``: transformers' Auto classes, and so pipelines, Trainer scripts and other libraries, build our classes."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..fork_safe import lock
from . import accelerate  # noqa: F401 (imports every module that says which class stands for which)
from .attention_interface import register_attention
from .swap import counterparts

_lock = lock()
_replaced: dict[tuple[type, type], tuple[type, type]] = {}


def register() -> None:
    """From now on transformers' Auto classes build our class wherever there is one for the class that they would build.

    ``AutoModel``, ``AutoModelForMaskedLM`` and all others, hence also ``pipeline(...)`` and libraries that load models through
    them; models that exist already stay what they are (:func:`fastbert.accelerate` is for those). Also makes
    ``attn_implementation="fastbert"`` known. A class that somebody else registered stays. Calling it again changes nothing;
    :func:`unregister` undoes it. For the process, all threads.

    transformers takes a registered class before code that a checkpoint brings along: a repository of a BERT with code of its own
    (``trust_remote_code=True``) needs :func:`unregister` first.
    """
    register_attention()
    with _lock:
        for auto_class, config_class, theirs, ours in _found():
            _replaced[auto_class, config_class] = theirs, ours
            auto_class.register(config_class, ours, exist_ok=True)


def unregister() -> None:
    """The Auto classes build transformers' own classes again; without :func:`register` before, nothing happens.

    ``attn_implementation="fastbert"`` stays known: models that use it may be alive.
    """
    with _lock:
        for (auto_class, config_class), (theirs, ours) in _replaced.items():
            if auto_class._model_mapping[config_class] is ours:
                auto_class.register(config_class, theirs, exist_ok=True)
        _replaced.clear()


def _found() -> Iterator[tuple[type, type, type, type]]:
    """(Auto class, configuration class, transformers' model class, ours) for all that have a fast counterpart."""
    fast = {theirs: ours for theirs, ours in counterparts().items() if issubclass(theirs, PreTrainedModel)}
    config_classes = {theirs.config_class for theirs in fast}
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not isinstance(auto_class, type) or mapping is None:
            continue
        for config_class in config_classes:
            theirs = mapping.get(config_class, None)
            if theirs in fast:
                yield auto_class, config_class, theirs, fast[theirs]
