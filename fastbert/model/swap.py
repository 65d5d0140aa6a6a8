"""Which of our classes stands for which of transformers', and the change of a live model from one to the other.

Class and instance keep parameters, hooks and gradient checkpointing; binding a new ``forward`` on instances instead turns
checkpointing off without a word. Our classes therefore add methods, never state.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .plain import remember

_FAST: dict[type, type] = {}
_THEIRS: dict[type, type] = {}


def replaces(theirs: type) -> Callable[[type], type]:
    """Class decorator: live modules of exactly the class ``theirs`` can become the decorated class, and back."""

    remember(*(kind for kind in vars(sys.modules[theirs.__module__]).values() if _is_module_class(kind)))

    def register(ours: type) -> type:
        _FAST[theirs], _THEIRS[ours] = ours, theirs
        if issubclass(ours, PreTrainedModel):
            # What transformers' constructor does: without it, a model whose class was changed records no hidden states.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(ours), ours._can_record_outputs)
            # Which keyword arguments forward takes can be read off its signature; annotations in our files are strings.
            their_kwargs = inspect.signature(theirs.forward).parameters.get("kwargs")
            if their_kwargs is not None and ours.forward is not theirs.forward:
                _annotate_kwargs(ours.forward, their_kwargs.annotation)
        return ours

    return register


def _is_module_class(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _annotate_kwargs(forward: Callable, annotation: object) -> None:
    inspect.unwrap(forward).__annotations__["kwargs"] = annotation
    if "__signature__" in vars(forward):  # of a forward with an argument by another name than in our source
        parameters = forward.__signature__.parameters
        renamed = {**parameters, "kwargs": parameters["kwargs"].replace(annotation=annotation)}
        forward.__signature__ = forward.__signature__.replace(parameters=list(renamed.values()))


def use_fast_classes(model: nn.Module) -> list[nn.Module]:
    """Gives every module inside ``model`` that has a fast counterpart its class; returns those that changed."""
    return _swap(model, _FAST)


class FastParts:
    """Mixin in front of transformers' model class with a head, whose constructor builds transformers' encoder."""

    def __init__(self, config):
        super().__init__(config)
        use_fast_classes(self)


def use_their_classes(model: nn.Module) -> list[nn.Module]:
    """The inverse of :func:`use_fast_classes`."""
    return _swap(model, _THEIRS)


def is_of_fast_class(module: nn.Module) -> bool:
    """Whether ``module`` itself is of a class of ours, not of one that somebody has made of it."""
    return type(module) in _THEIRS


def is_fast(model: nn.Module) -> bool:
    """Whether anything inside ``model`` is of a class of ours."""
    return any(map(is_of_fast_class, model.modules()))


def counterparts() -> dict[type, type]:
    """transformers' class -> ours, of all modules that have been imported."""
    return dict(_FAST)


def _swap(model: nn.Module, classes: dict[type, type]) -> list[nn.Module]:
    changed = [module for module in model.modules() if type(module) in classes]
    for module in changed:
        module.__class__ = classes[type(module)]
    return changed
