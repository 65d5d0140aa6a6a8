"""What transformers calls a decoder's key-value cache: ``cache`` from 5.24 on, ``past_key_values`` before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from transformers.models.bert import modeling_bert as hf
from transformers.utils.deprecation import deprecate_kwarg

_OLD = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(hf.BertLayer.forward).parameters else _OLD


def takes_their_cache(forward: Callable) -> Callable:
    """``forward``, whose argument ``past_key_values`` callers give by transformers' name.

    Where that is another, the old name comes with transformers' FutureWarning, as it does there. Before 5.24 an argument ``cache``
    is something else, which attention gets (continuous batching), so the name in our source is the old one.
    """
    if CACHE == _OLD:
        return forward

    @functools.wraps(forward)
    def named(*args, **kwargs):
        if _OLD in kwargs:
            return warned(*args, **kwargs)
        if CACHE in kwargs:
            kwargs[_OLD] = kwargs.pop(CACHE)
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [p.replace(name=CACHE) if p.name == _OLD else p for p in signature.parameters.values()]
    named.__signature__ = signature.replace(parameters=parameters)
    # Only where it has something to say: going through it takes a short request some microseconds.
    warned = deprecate_kwarg(_OLD, "5.40.0", new_name=CACHE)(named)
    return named
