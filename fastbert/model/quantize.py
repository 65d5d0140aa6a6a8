"""``fastbert.quantize(model)``: the Linears of the encoder layers become int8, in place, for inference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from .accelerate import accelerate, encoder_classes, module_of
from .int8 import Int8Linear
from .int8_calibration import hurt_by_int8
from .int8_checkpoint import mark_as_int8
from .plain import has_hooks, has_own_forward

Model = TypeVar("Model")

LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def quantize(model: Model, *, calibration: Iterable[Mapping[str, Any]] | None = None, skip: Iterable[str] = ()) -> Model:
    """Makes the Linears of every encoder layer inside ``model`` int8, in place, and returns ``model``.

    ``model`` is what :func:`fastbert.accelerate` takes, in evaluation mode and on the CPU; it is accelerated, too. Embeddings,
    LayerNorms, pooler and heads stay as they are. Weights get a step per output channel; activations are rounded row by row as
    they come (dynamic), so that nothing has to be calibrated. The encoders' remaining parameters are frozen: int8 has no
    gradient (a head on top may still be trained). ``save_pretrained`` and ``from_pretrained`` keep all of it.

    calibration: batches of real inputs (the encoder's arguments: input_ids, attention_mask, ...; a few hundred texts), on which
    each Linear is compared with its int8 form: those that it would hurt, because of channels far larger than the others, are
    left as they are. skip: Linears to leave as they are, by their names or whole parts of them: "encoder.layer.0.output.dense",
    "layer.11", "query". A part that occurs in several names leaves all of those: "output.dense" is attention's, too.

    Raises TypeError for what holds no encoder that fastbert knows, ValueError with all reasons where it cannot be quantized, and
    both for calibration that is none; no Linear has changed then. ``explain(model)`` lists what is int8. See
    :class:`fastbert.model.int8.Int8Linear` for the arithmetic.
    """
    module, skip = module_of(model), (skip,) if isinstance(skip, str) else tuple(skip)
    encoders = encoders_of(module)
    linears = dict(layer_linears(module))
    for part in skip:
        if not any(_is_part(part, name) for name in linears):
            raise ValueError(
                f"skip names {part!r}, which is in no name of a Linear; they are such as {next(iter(linears), None)!r}"
            )
    wanted = {name: linear for name, linear in linears.items() if not any(_is_part(part, name) for part in skip)}
    reasons = [
        *_model_reasons(encoders),
        *(f"{name} {why}" for name, linear in wanted.items() if (why := _why_not(linear))),
    ]
    if reasons:
        shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
        raise ValueError(f"this {type(module).__qualname__} cannot be quantized: {shown}")
    rounded = {}
    for name, linear in wanted.items():
        try:
            rounded[name] = Int8Linear.of(linear)
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantized: {error}") from error

    accelerate(module)
    hurt = set() if calibration is None else hurt_by_int8(module, encoders.values(), rounded, calibration)
    for name in rounded.keys() - hurt:
        module.set_submodule(name, rounded[name])
    mark_as_int8(module)
    return model


def encoders_of(module: nn.Module) -> dict[str, nn.Module]:
    """The encoders of ``module`` that fastbert knows, fast or not, by name."""
    known = encoder_classes()
    return {name: part for name, part in module.named_modules() if isinstance(part, known)}


def layer_linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name in ``module``, submodule) of everything in the place of an encoder layer's Linear."""
    for encoder_name, encoder in encoders_of(module).items():
        prefix = f"{encoder_name}." if encoder_name else ""
        for index, layer in enumerate(encoder.encoder.layer):
            for name in LINEARS:
                yield f"{prefix}encoder.layer.{index}.{name}", layer.get_submodule(name)


def _is_part(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def _model_reasons(encoders: dict[str, nn.Module]) -> Iterator[str]:
    if any(encoder.training for encoder in encoders.values()):
        yield "it is in training mode, and int8 is for inference (model.eval())"
    if any(encoder.config.is_decoder for encoder in encoders.values()):
        yield "it is a decoder; fastbert is fast for encoders"
    devices = {str(p.device) for encoder in encoders.values() for p in encoder.parameters() if p.device.type != "cpu"}
    if devices:
        yield f"it is on {', '.join(sorted(devices))}; int8 is fast on CPUs (model.cpu())"


def _why_not(linear: nn.Module) -> str | None:
    """Why this submodule cannot become an Int8Linear, None where it can."""
    kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
    if isinstance(linear, Int8Linear):
        return "is int8 already"
    if kind.startswith("peft."):
        return f"is {kind}: merge the adapters first (model.merge_and_unload())"
    if type(linear) is not nn.Linear:
        return f"is {kind}, not torch.nn.Linear"
    if type(linear.weight) is not nn.Parameter:
        return f"has a weight of type {type(linear.weight).__module__}.{type(linear.weight).__qualname__}: it is quantized already"
    if has_hooks(linear) or has_own_forward(linear):
        return "has hooks or another forward than its class, which would be lost"
    return None
