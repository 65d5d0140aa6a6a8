"""Model outputs whose expensive parts are computed when somebody reads them.

A training step reads the loss; the padded hidden states and the logits of every token (batch x length x vocabulary, 4 GB in
bfloat16 at 65,536 tokens) are there for whoever asks. They behave like transformers' outputs in every other way: attribute,
key, index, iteration, tuple, pickling and pytrees all give the same tensors.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput as HFBertForPreTrainingOutput

from .packing import Packing
from .row_selection import RowSelection, SelectedRows


@dataclass
class Deferred:
    """A tensor that is computed on first use, by ``compute``, under the modes (gradients, inference, autocast) of the forward pass
    that it belongs to.

    ``modules``: what ``compute`` reads or calls. Where one of them, or what is in it, has been changed since (an optimizer step,
    other weights, hooks, an adapter that was switched), the result would not be that of this forward pass, and asking for it is an
    error.
    """

    compute: Callable[[], Tensor]
    modules: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        self._grad_enabled, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast, self._states = {}, _states(self.modules)
        if self.modules:
            types = {p.device.type for module in self.modules for p in module.parameters()} & {"cpu", "cuda"}
            self._autocast = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in types}

    def is_current(self) -> bool:
        """Whether the modules are still as they were in the forward pass."""
        return self._states == _states(self.modules)

    def __call__(self, name: str) -> Tensor:
        if not self.is_current():
            raise RuntimeError(
                f"outputs.{name} is computed when it is first read, and the model's parameters or modules have changed since the "
                f"forward pass; read outputs.{name} before the optimizer step, or whatever else changes them"
            )
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled() != self._inference:  # before the grad mode, which it sets as well
                modes.enter_context(torch.inference_mode(self._inference))
            modes.enter_context(torch.set_grad_enabled(self._grad_enabled))
            for device_type, (enabled, dtype) in self._autocast.items():
                modes.enter_context(torch.autocast(device_type, dtype, enabled))
            return self.compute()

    def without_half_precision(self) -> Deferred:
        """The same tensor, computed as this one would be, and in float32 where that is of half precision."""

        def compute() -> Tensor:
            value = self.compute()
            return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

        converted = copy.copy(self)
        converted.compute = compute
        return converted


# What every module has; of these attributes the dicts in _HELD are compared, where something is in them.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HELD = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Same:
    """An object, equal to itself alone, which lives as long as this: another one may have its address afterwards."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of

    __hash__ = None


def _states(modules: tuple[nn.Module, ...]) -> list[Any]:
    """What is in modules and in all modules in them, by identity, and of tensors also how often they were changed."""
    states = []
    for part in dict.fromkeys(part for module in modules for part in module.modules()):
        held = vars(part)
        is_torchs = type(part).__module__.startswith("torch.nn.")  # sizes and rates: of a Dropout a forward pass keeps its own
        own = [] if is_torchs else [(name, _Same(value)) for name, value in held.items() if name not in _OF_EVERY_MODULE]
        inside = [(key, _state(value)) for name in _HELD for key, value in held[name].items()]
        states.append((type(part), own, inside))
    return states


def _state(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return _Same(value)
    # Those made under inference_mode count no versions; nothing trains them either.
    return _Same(value), value.dtype, value.shape, None if value.is_inference() else value._version


class LazyOutput:
    """Mixin for a ModelOutput: fields set with :meth:`defer` hold their place and are computed when read.

    Two callers go through the outputs of every training step without reading them: accelerate's mixed precision (and with it
    Trainer's), which makes half precision float32, and DistributedDataParallel with ``find_unused_parameters``, Trainer's default,
    which looks for tensors. They alone get nothing computed.
    """

    @classmethod
    def empty(cls) -> LazyOutput:
        """What ``cls()`` makes. transformers' constructor goes through the fields for each of them, which a short request would
        notice."""
        if cls not in _EMPTY:
            _EMPTY[cls] = vars(cls())
        output = cls.__new__(cls)
        vars(output).update(_EMPTY[cls])
        return output

    def defer(self, name: str, deferred: Deferred) -> None:
        """Makes ``deferred`` the value of field ``name``; fields come out in the order in which they were set."""
        OrderedDict.__setitem__(self, name, deferred)
        object.__setattr__(self, name, deferred)

    def _compute(self, name: str, deferred: Deferred) -> Tensor:
        value = deferred(name)
        self[name] = value
        return value

    def _compute_all(self) -> None:
        for name in OrderedDict.keys(self):
            getattr(self, name)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return self._compute(name, value) if isinstance(value, Deferred) else value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if not OrderedDict.__contains__(self, key):  # transformers may know the old name of a field
                return super().__getitem__(key)
            value = OrderedDict.__getitem__(self, key)
            return self._compute(key, value) if isinstance(value, Deferred) else value
        if isinstance(key, int):
            return self[list(self.keys())[key]]
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (this is get)

    def items(self):
        caller = sys._getframe(1)
        if _is(caller, *_CONVERSION) and getattr(caller.f_locals.get("func"), "__name__", None) == _CONVERTS:
            waiting = ((name, OrderedDict.__getitem__(self, name)) for name in OrderedDict.keys(self))
            return [(name, value.without_half_precision() if isinstance(value, Deferred) else value) for name, value in waiting]
        self._compute_all()
        return super().items()

    def values(self):
        if _is(sys._getframe(1), *_SEARCH):
            found = (OrderedDict.__getitem__(self, name) for name in OrderedDict.keys(self))
            return [value for value in found if not isinstance(value, Deferred)]
        self._compute_all()
        return super().values()

    def copy(self):
        self._compute_all()
        return super().copy()

    def __reduce__(self):
        self._compute_all()
        return super().__reduce__()

    def __repr__(self) -> str:
        """As a dataclass has it, but of a field that can no longer be computed: a log or a debugger may print any output."""
        values = {field.name: object.__getattribute__(self, field.name) for field in fields(self)}
        gone = {name for name, value in values.items() if isinstance(value, Deferred) and not value.is_current()}
        shown = (f"{name}={_GONE if name in gone else repr(getattr(self, name))}" for name in values)
        return f"{type(self).__qualname__}({', '.join(shown)})"


_EMPTY: dict[type, dict[str, Any]] = {}  # the attributes of an output without fields
_GONE = "<not computed before the model changed>"

# Module and function of the two callers that :class:`LazyOutput` speaks of; what the first one then applies to tensors.
_CONVERSION, _CONVERTS = ("accelerate.utils.operations", "recursively_apply"), "_convert_to_fp32"
_SEARCH = ("torch.nn.parallel.distributed", "_find_tensors")


def _is(frame: FrameType, module: str, function: str) -> bool:
    return frame.f_code.co_name == function and frame.f_globals.get("__name__") == module


class EncoderOutput(LazyOutput):
    """Beside transformers' fields: ``packed`` (total, hidden), the encoder's rows before padding, and their ``packing``.

    ``selection``: the rows that a masked-LM head reads, where it said so; ``computed_later``: the modules that ``packed``
    depends on from now on, where the encoder has computed those rows alone.
    """

    selection: RowSelection | None
    computed_later: tuple[nn.Module, ...]

    def set_rows(self, rows: Tensor, packing: Packing, selection: RowSelection | None = None) -> None:
        """Makes ``rows`` (total, hidden) the result, and ``last_hidden_state`` what they are with padding."""
        self._set(_rows=rows, _selected=None, packing=packing, selection=selection, computed_later=())
        self.defer("last_hidden_state", Deferred(lambda: packing.pad(rows)))

    def set_selected_rows(self, selected: SelectedRows, last_layer: nn.Module) -> None:
        """:meth:`set_rows` where the last layer has computed some rows and does the others when read."""
        packing = selected.selection.packing
        self._set(_selected=selected, packing=packing, selection=selected.selection, computed_later=(last_layer,))
        self.defer("last_hidden_state", Deferred(lambda: packing.pad(selected.all()), (last_layer,)))

    def _set(self, **attributes: Any) -> None:
        """Attributes that are no fields, which transformers' ``__setattr__`` would look for among these."""
        vars(self).update(attributes)

    def _all_rows(self) -> Tensor:
        return self._rows if self._selected is None else self._selected.all()

    def first_rows(self) -> Tensor:
        """(num_sequences, hidden): the first row of each sequence, of what was computed for ``selection``."""
        return self.selection.first_positions(self._selected.rows)

    def labelled_rows(self) -> tuple[Tensor, Tensor]:
        """The rows (n, hidden) of ``selection`` that carry a label, and those labels (n,)."""
        selection, selected = self.selection, self._selected
        rows = selection.labelled_among_all(self.packed) if selected is None else selection.labelled_of(selected.rows)
        return rows, selection.labels

    def _compute(self, name: str, deferred: Deferred) -> Tensor:
        value = super()._compute(name, deferred)
        if name == "last_hidden_state" and not value.is_inference():
            self._padded = (value, value._version)
        return value

    @property
    def packed(self) -> Tensor:
        """A hook may have changed ``last_hidden_state``, by another tensor or in place: then they are the rows of that."""
        state = object.__getattribute__(self, "last_hidden_state")
        if isinstance(state, Deferred):
            return self._all_rows()
        padded, version = vars(self).get("_padded", (None, None))
        return self._all_rows() if state is padded and state._version == version else self.packing.unpad(state)


@dataclass(repr=False)
class PooledEncoderOutput(EncoderOutput, BaseModelOutputWithPoolingAndCrossAttentions):
    """The output of an encoder that may have a pooler."""


@dataclass(repr=False)
class PlainEncoderOutput(EncoderOutput, BaseModelOutputWithPastAndCrossAttentions):
    """The output of an encoder that never has one (ELECTRA)."""


@dataclass(repr=False)
class MaskedLMOutput(LazyOutput, modeling_outputs.MaskedLMOutput):
    """Beside transformers' fields: ``mlm_correct`` and ``mlm_count``, as in :class:`BertForPreTrainingOutput`."""


@dataclass(repr=False)
class BertLMHeadOutput(LazyOutput, CausalLMOutputWithCrossAttentions):
    """transformers' fields, the logits deferred where labels are given."""


@dataclass(repr=False)
class BertForPreTrainingOutput(LazyOutput, HFBertForPreTrainingOutput):
    """Beside transformers' fields, for telemetry: ``mlm_loss`` and ``next_sentence_loss`` (0-d, whose sum is ``loss``),
    ``mlm_correct`` and ``mlm_count`` (0-d int64: labelled tokens whose label has the largest logit, and labelled tokens).
    """
