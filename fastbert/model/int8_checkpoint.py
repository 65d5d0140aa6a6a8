"""int8 models in transformers' checkpoints: ``save_pretrained`` and ``from_pretrained`` as for any model of theirs.

Through transformers' own extension points for quantization methods: config.json says ``quant_method: fastbert_int8``, the weights
are in safetensors, no code is stored or run. Importing this module, as every model class of fastbert does, makes the method known.

Without fastbert, transformers only warns of an unknown method, and would take the integers for the weights of its Linears, but for
their third dimension (:class:`fastbert.model.int8.Int8Linear`), which ends its loading with an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .int8 import Int8Linear
from .swap import use_fast_classes

METHOD = "fastbert_int8"


@register_quantization_config(METHOD)
@dataclass
class Int8Config(QuantizationConfigMixin):
    """What config.json says of an int8 model: which Linears of the encoder's layers are none ("layer.0.output.dense")."""

    modules_to_not_convert: list[str] = field(default_factory=list)
    quant_method: str = METHOD

    def __post_init__(self) -> None:
        kept = self.modules_to_not_convert
        if not isinstance(kept, (list, tuple)) or not all(isinstance(name, str) for name in kept):
            raise ValueError(f"modules_to_not_convert of {METHOD} is {kept!r}; it is a list of names, such as layer.0.output.dense")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Raises ValueError for what :data:`METHOD` knows nothing of: it would be another quantization than this one."""
        if unknown := sorted(config_dict.keys() - {"modules_to_not_convert", "quant_method"}):
            raise ValueError(f"quantization_config of {METHOD} has {', '.join(unknown)}; it knows modules_to_not_convert alone")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Builds the skeleton that an int8 checkpoint is loaded into."""

    quantization_config: Int8Config

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized:
            raise ValueError(f"{METHOD} quantizes no checkpoint while loading it: load it, then call fastbert.quantize(model)")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, linear in _linears(model):
            if _name_in_encoder(name) not in self.quantization_config.modules_to_not_convert:
                model.set_submodule(name, Int8Linear.of(linear))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        missing = []
        for name, module in _int8_modules(model).items():
            for buffer_name, buffer in module.named_buffers():
                if not getattr(buffer, "_is_hf_initialized", False):  # transformers marks what it has read
                    missing.append(f"{name}.{buffer_name}")
                # No views of what safetensors returned: the layer brings the projections together in memory that is theirs.
                setattr(module, buffer_name, buffer.data)
        if missing:
            raise ValueError(
                f"the checkpoint lacks parts of the int8 model that its config.json names: {', '.join(missing[:5])}, ..."
            )
        use_fast_classes(model)
        mark_as_int8(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def mark_as_int8(model: nn.Module) -> None:
    """Freezes the encoders that hold Int8Linears, and tells transformers what has become of the model and its parts."""
    from .quantize import encoders_of

    for encoder in encoders_of(model).values():
        if _int8_modules(encoder):
            encoder.requires_grad_(False)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and _int8_modules(part):
            kept = {_name_in_encoder(name) for name, linear in _linears(part) if not isinstance(linear, Int8Linear)}
            part.config.quantization_config = Int8Config(modules_to_not_convert=sorted(kept))
            part.hf_quantizer = Int8Quantizer(part.config.quantization_config, pre_quantized=True)
            part.is_quantized, part.quantization_method = True, METHOD


def _int8_modules(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def _linears(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    from .quantize import layer_linears  # which needs the model classes, and they this module

    return list(layer_linears(model))


def _name_in_encoder(name: str) -> str:
    """Of "bert.encoder.layer.0.output.dense" the part that is the same under every head: "layer.0.output.dense"."""
    return "layer." + name.rpartition("encoder.layer.")[2]
