"""The drop-in BertModel, and what every class that loads BERT checkpoints does."""

from __future__ import annotations

from transformers.models.bert import modeling_bert as hf

from . import int8_checkpoint  # noqa: F401 (so that an int8 checkpoint loads)
from .attention_interface import register_attention
from .encoder import PackedEncoder
from .swap import FastParts, replaces

# So that a checkpoint saved with attn_implementation="fastbert" loads.
register_attention()


class CheckedLoading:
    """Mixin: ``from_pretrained`` refuses checkpoints of another architecture instead of filling in random weights."""

    # Trainer scales the loss for gradient accumulation itself where a model says that it does not: transformers' classes do
    # not use num_items_in_batch but let Trainer believe so, which makes loss and gradients too large by the accumulation steps.
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        if pretrained_model_name_or_path is not None:
            found = config if config is not None and not isinstance(config, str) else None
            model_type = getattr(found, "model_type", None)
            if found is None:
                hub = {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs}
                model_type = hf.BertConfig.get_config_dict(config or pretrained_model_name_or_path, **hub)[0].get("model_type")
            own = cls.config_class.model_type  # of a class derived from ours, with a configuration of its own
            if model_type not in (None, "bert", own) and not isinstance(found, cls.config_class):
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a model of type {model_type!r}, {cls.__name__} loads {own!r}; "
                    f"its weights would not fit (transformers.AutoModel loads any type)"
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class PackedHead(FastParts, CheckedLoading):
    """Mixin of every head of BERT: whatever transformers' constructor built, its encoder works on packed rows."""


@replaces(hf.BertModel)
class BertModel(CheckedLoading, PackedEncoder, hf.BertModel):
    """transformers' BertModel; see :class:`fastbert.model.encoder.PackedEncoder` for what differs."""

    embeddings_class = hf.BertEmbeddings

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
