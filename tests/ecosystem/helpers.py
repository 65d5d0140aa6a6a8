"""The two doors into fastbert, and a tokenizer with texts of very different lengths."""

from __future__ import annotations

import copy
import functools
import re

import torch
import transformers

import fastbert
from fastbert.data.tokenizer import train_wordpiece

from ..data.helpers import story
from ..model.helpers import assert_same_gradients, config_for, inputs_for, on_real_tokens

# "class": the model is built from fastbert's class; "accelerate": a live transformers model is made fast in place.
DOORS = ("class", "accelerate")


def fast(theirs: torch.nn.Module, door: str) -> torch.nn.Module:
    """A fast copy of a transformers model, with the same weights and in the same mode."""
    if door == "accelerate":
        return fastbert.accelerate(copy.deepcopy(theirs))
    ours = getattr(fastbert, type(theirs).__name__)(copy.deepcopy(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    return ours.train(theirs.training)


# Relatives of BERT that ``accelerate`` makes fast, a head of each.
RELATIVES = (
    "RobertaForSequenceClassification",
    "XLMRobertaForTokenClassification",
    "CamembertForMaskedLM",
    "ElectraForSequenceClassification",
)


def plain(name: str, **changes) -> torch.nn.Module:
    """transformers' class ``name``, of BERT or a relative, small, without dropout, in training mode."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config, cls = config_for(name, **{**no_dropout, **changes}), getattr(transformers, name)
    if cls.config_class is not transformers.BertConfig:
        settings = config.to_diff_dict()
        config = cls.config_class(**{key: settings[key] for key in settings.keys() - {"model_type", "transformers_version"}})
    return cls(config).train()


def batch_for(name: str) -> dict[str, torch.Tensor]:
    """The padded batch of :func:`inputs_for` for a class of BERT or a relative, by what follows the family in its name."""
    return inputs_for(re.sub(r"^.+?(?=Model$|For|LMHead)", "Bert", name))


def fast_pair(door: str, name: str, **changes) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(a plain model, a fast one) in eval mode with the same weights; ``changes`` are those of the small configuration."""
    theirs = plain(name, **changes).eval()
    return theirs, fast(theirs, door)


def assert_same_on_real_tokens(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """(batch, length, ...) within 2e-5, where the padding of ``inputs_for`` does not count."""
    torch.testing.assert_close(on_real_tokens(ours), on_real_tokens(theirs), atol=2e-5, rtol=2e-5)


def assert_same_training_step(ours: torch.nn.Module, theirs: torch.nn.Module, name: str) -> None:
    """The loss of the class ``name`` on a padded batch within 2e-5, gradients within a relative 1e-4."""
    batch, losses = inputs_for(name), []
    for model in (ours, theirs):
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, atol=2e-5, rtol=2e-5)
    assert_same_gradients(ours, theirs, 1e-4)


def notes_of(model: torch.nn.Module) -> list[str]:
    """All reasons that ``fastbert.explain`` gives for what is not fused, whichever backends this machine has."""
    facts = fastbert.explain(model)
    return [*facts.encoder, *facts.embeddings, *(note for notes in facts.layers.values() for note in notes), *(facts.head or [])]


@functools.cache
def small_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """WordPiece with a vocabulary of at most 300, trained on made-up English."""
    paragraphs = [paragraph for number in range(20) for paragraph in story(number, 3).paragraphs]
    tokenizer = train_wordpiece(paragraphs, 300)
    tokenizer.model_max_length = 64
    return tokenizer


TEXTS = (
    "a tall ship",
    "The lighthouse keeper remembered nothing at all near the pier. My neighbour painted the quiet sea again and again!",
    "gull",
    "Every sailor watched the north wind before dawn, and the old captain answered without a word.",
    "seven lanterns in the harbour",
    "The harbour forgot a letter from home for many years. A grey gull followed the north wind. The old captain carried a compass.",
    "?",
)
