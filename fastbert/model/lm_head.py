"""The head of a masked language model: Linear, GELU, LayerNorm and the matrix of the vocabulary, on the rows that somebody reads.

A masked-LM step predicts 15% of the tokens; transformers computes, stores and differentiates logits for all of them. Here the
labelled rows are gathered first, and their loss comes from ``ops.mlm_loss``, which never holds whole logits. Logits of all
tokens are computed when they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import gelu_layer_norm, mlm_loss
from ..ops.linear import linear
from ..ops.mlm_loss import IGNORE_INDEX
from ..ops.registration import at_least_float32, has_no_data, transform_reasons
from .outputs import Deferred, EncoderOutput
from .packing import Packing
from .plain import has_hooks, has_plain_parameters, is_exact_gelu, is_plain, is_plain_linear, lends_parameters


@dataclass(frozen=True)
class LanguageModelHead:
    """The parts of a model's head, whatever transformers calls them.

    whole: (..., hidden) -> (..., vocabulary), transformers' modules one after the other. containers: the modules that the fused
    path passes by, with the class that each must have. activation: None where transformers calls the function ``gelu``. A part that
    is missing in a container of another class is None.
    """

    whole: Callable[[Tensor], Tensor]
    containers: tuple[tuple[nn.Module, type], ...]
    dense: nn.Module | None
    activation: nn.Module | None
    norm: nn.Module | None
    decoder: nn.Module | None

    def notes(self) -> list[str]:
        """What runs unfused, and why; empty for a fully fused head."""
        if reasons := self.container_reasons():
            return [f"logits of all tokens come from transformers' modules: {'; '.join(reasons)}"]
        notes = []
        if not self._transform_is_plain():
            notes.append("Linear, activation and LayerNorm run one by one: they are not those of BERT (erf-GELU), or changed")
        if not is_plain_linear(self.decoder):
            notes.append("logits of the labelled rows are stored whole: the decoder is not a plain nn.Linear")
        return notes

    def loss(
        self, outputs: Any, labels: Tensor, reduction: str = "mean", labelled_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of an encoder's ``outputs`` against ``labels`` (batch, length); ``labelled_rows``: see ``RowSelection``.

        Returns the loss, and the telemetry of the labelled tokens: how many have the largest logit right, and how many there are.
        """
        if self.container_reasons():
            logits, row_labels = self.whole(outputs.last_hidden_state).flatten(0, 1), labels.flatten()
            loss, correct = _whole_loss(logits, row_labels, reduction)
        else:
            rows, row_labels = _labelled_rows(outputs, labels, labelled_rows)
            hidden, decoder = self._hidden(rows), self.decoder
            if is_plain_linear(decoder):
                loss, correct = mlm_loss(hidden, decoder.weight, decoder.bias, row_labels, reduction=reduction)
            else:
                loss, correct = _whole_loss(decoder(hidden), row_labels, reduction)
        return loss, correct.sum(), (row_labels != IGNORE_INDEX).sum()

    def logits(self, outputs: Any) -> Tensor:
        """(batch, length, vocabulary): logits of every token, 0 on padding where the encoder ran packed."""
        if not isinstance(outputs, EncoderOutput) or self.container_reasons():
            return self.whole(outputs.last_hidden_state)
        hidden, decoder = self._hidden(outputs.packed), self.decoder
        # On CPUs torch's own Linear takes the slower of its matmul libraries.
        rows = linear(hidden, decoder.weight, decoder.bias) if is_plain_linear(decoder) else decoder(hidden)
        return outputs.packing.pad(rows)

    def set_logits(self, output: Any, name: str, outputs: Any, *, deferred: bool) -> None:
        """Field ``name`` of ``output``: at once, or when it is read, which is an error once the head has changed.

        At once also where that is to be expected: parameters of this call alone (``torch.func.functional_call``), or, in calls
        without gradients, a head with adapters or hooks, which somebody may switch off again.
        """
        parts = [part for part in (self.containers[0][0], self.decoder) if part is not None]  # the others are in the first
        for_now = any(map(lends_parameters, parts)) or (not torch.is_grad_enabled() and self.notes())
        if not deferred or for_now or torch.compiler.is_compiling() or has_no_data():
            setattr(output, name, self.logits(outputs))
        else:
            modules = dict.fromkeys([*parts, *getattr(outputs, "computed_later", ())])
            output.defer(name, Deferred(lambda: self.logits(outputs), tuple(modules)))

    def container_reasons(self) -> list[str]:
        """Why transformers' modules are called, on all rows; empty where the fused path takes the rows that it needs."""
        reasons = transform_reasons()
        for module, expected in self.containers:
            if type(module) is not expected:
                reasons.append(f"the head has a {type(module).__module__}.{type(module).__qualname__}")
            elif not is_plain(module):
                reasons.append(f"{expected.__name__} has hooks, or another forward than its class had")
        for name in ("dense", "activation", "norm", "decoder"):
            part = getattr(self, name)
            if part is not None and any(map(has_hooks, part.modules())):
                reasons.append(f"the head's {name} has hooks")
        return reasons

    def _transform_is_plain(self) -> bool:
        return (
            is_plain_linear(self.dense)
            and (self.activation is None or is_exact_gelu(self.activation))
            and type(self.norm) is nn.LayerNorm
            and is_plain(self.norm)
            and has_plain_parameters(self.norm)
        )

    def _hidden(self, rows: Tensor) -> Tensor:
        """(rows, hidden) -> what the decoder takes."""
        norm = self.norm
        if not self._transform_is_plain():
            x = self.dense(rows)
            return norm(F.gelu(x) if self.activation is None else self.activation(x))
        x = linear(rows, self.dense.weight, None)
        return gelu_layer_norm(x, self.dense.bias, norm.weight, norm.bias, norm.eps)


def _whole_loss(logits: Tensor, labels: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(at_least_float32(logits), labels, ignore_index=IGNORE_INDEX, reduction=reduction)
    return loss, (logits.argmax(-1) == labels) & (labels != IGNORE_INDEX)


def _labelled_rows(outputs: Any, labels: Tensor, labelled: Tensor | None) -> tuple[Tensor, Tensor]:
    """The encoder's rows (n, hidden) that carry a label, and those labels (n,); ``labelled``: which they are, if that is known."""
    if isinstance(outputs, EncoderOutput) and outputs.selection is not None:
        return outputs.labelled_rows()
    if isinstance(outputs, EncoderOutput):
        packing: Packing = outputs.packing
        rows, row_labels = outputs.packed, packing.unpad(labels)
    else:
        rows, row_labels = outputs.last_hidden_state.flatten(0, 1), labels.flatten()
    if labelled is None and (torch.compiler.is_compiling() or has_no_data()):
        return rows, row_labels
    if labelled is None:
        labelled = (row_labels != IGNORE_INDEX).nonzero().squeeze(1)
    return rows.index_select(0, labelled), row_labels.index_select(0, labelled)
