"""Parts of a model that are not what transformers builds: parametrized and pruned weights, other submodules, other layers.

Each test does the same to a plain and to a fast model, and wants the same numbers and a word of ``explain``.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastbert

from ..model.helpers import inputs_for, small_config
from .helpers import DOORS, assert_same_on_real_tokens, assert_same_training_step, fast_pair, notes_of

NAME = "BertForSequenceClassification"
LAYER = "bert.encoder.layer.1"


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


LINEARS = [
    f"{LAYER}.{name}"
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
WEIGHTS = {
    "weight_norm": lambda module: parametrizations.weight_norm(module),
    "spectral_norm": lambda module: parametrizations.spectral_norm(module).eval(),
    "old weight_norm": lambda module: nn.utils.weight_norm(module),
    "prune": lambda module: prune.random_unstructured(module, "weight", 0.3),
    "prune the bias": lambda module: prune.l1_unstructured(module, "bias", 0.5),
    "parametrized bias": lambda module: parametrize.register_parametrization(module, "bias", nn.Tanh()),
}


def computed_weights() -> list[tuple[str, str]]:
    return [
        *((LINEARS[0], change) for change in WEIGHTS),
        *((path, "prune") for path in (*LINEARS[1:], f"{LAYER}.output.LayerNorm", "bert.embeddings.word_embeddings")),
        *((path, "parametrized bias") for path in (*LINEARS[1:], f"{LAYER}.output.LayerNorm", "bert.embeddings.LayerNorm")),
    ]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(("path", "change"), computed_weights())
@pytest.mark.parametrize("door", DOORS)
def test_computed_weights(door, path, change):
    theirs, ours = fast_pair(door, NAME)
    ours(**inputs_for(NAME))
    for model in (theirs, ours):
        torch.manual_seed(13)
        module = model.get_submodule(path)
        with torch.no_grad():  # of a new model, biases are 0
            if getattr(module, "bias", None) is not None:
                module.bias.normal_()
        WEIGHTS[change](module)
    for _ in range(2):
        assert_same_training_step(ours, theirs, NAME)
        for model in (theirs, ours):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert notes_of(ours)


@pytest.mark.parametrize("door", DOORS)
def test_a_parametrization_on_query_alone(door):
    theirs, ours = fast_pair(door, NAME)
    for model in (theirs, ours):
        parametrize.register_parametrization(model.get_submodule(f"{LAYER}.attention.self.query"), "weight", Symmetric())
    assert_same_training_step(ours, theirs, NAME)
    assert any("query is torch.nn.utils.parametrize.ParametrizedLinear" in note for note in notes_of(ours))
    for model in (theirs, ours):
        parametrize.remove_parametrizations(model.get_submodule(f"{LAYER}.attention.self.query"), "weight")
    assert_same_training_step(ours, theirs, NAME)
    assert notes_of(ours) == []


@pytest.mark.parametrize("door", DOORS)
def test_pruned_for_good(door):
    theirs, ours = fast_pair(door, NAME)
    for model in (theirs, ours):
        torch.manual_seed(13)
        for path in LINEARS:
            prune.random_unstructured(model.get_submodule(path), "weight", 0.3)
            prune.remove(model.get_submodule(path), "weight")
    assert_same_training_step(ours, theirs, NAME)
    assert notes_of(ours) == []


# --- other submodules ---------------------------------------------------------------------------------------------------------


class RootMeanSquare(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Centred(nn.LayerNorm):
    """A LayerNorm that is one, and more."""

    def forward(self, x):
        return super().forward(x) - 0.5


class Squared(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x).square()


class Gate(nn.Linear):
    """As wide as a Linear, but not one."""

    def forward(self, x):
        return super().forward(x) * torch.sigmoid(x.mean(-1, keepdim=True))


OTHERS = {
    "intermediate.intermediate_act_fn": [Squared, nn.ReLU, nn.Tanh, lambda: nn.GELU("tanh"), nn.SiLU],
    "output.LayerNorm": [
        RootMeanSquare, lambda: Centred(48), lambda: nn.LayerNorm(48, elementwise_affine=False),
        lambda: nn.LayerNorm(48, bias=False), lambda: nn.RMSNorm(48), nn.Identity,
    ],
    "attention.output.LayerNorm": [RootMeanSquare, lambda: nn.LayerNorm(48, elementwise_affine=False)],
    "attention.output.dropout": [nn.Identity, lambda: nn.AlphaDropout(0.0)],
    "attention.self.query": [lambda: Gate(48, 48), nn.Identity, lambda: nn.Linear(48, 48, bias=False)],
    "attention.output.dense": [lambda: Gate(48, 48), nn.Identity, lambda: nn.Linear(48, 48, bias=False)],
    "intermediate.dense": [lambda: Gate(48, 96), lambda: nn.Linear(48, 96, bias=False)],
    "output.dense": [lambda: Gate(96, 48), lambda: nn.Sequential(nn.Linear(96, 8), nn.Linear(8, 48))],
}  # fmt: skip
# As fast as the usual ones: a Linear without bias, GELU by another name.
UNNOTICED = [("attention.self.query", 2), ("attention.output.dense", 2), ("intermediate.dense", 1)]


@pytest.mark.parametrize(("path", "index"), [(path, i) for path, makers in OTHERS.items() for i in range(len(makers))])
@pytest.mark.parametrize("door", DOORS)
def test_swapped_submodules(door, path, index):
    theirs, ours = fast_pair(door, NAME)
    for model in (theirs, ours):
        torch.manual_seed(17)
        parent, _, name = f"{LAYER}.{path}".rpartition(".")
        setattr(model.get_submodule(parent), name, OTHERS[path][index]())
    assert_same_training_step(ours, theirs, NAME)
    if (path, index) not in UNNOTICED:
        notes = fastbert.explain(ours).layers[1]
        assert any(path.split(".")[-1] in note or "activation" in note for note in notes), notes


@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("LayerNorm", RootMeanSquare), ("LayerNorm", lambda: nn.LayerNorm(48, elementwise_affine=False)),
        ("LayerNorm", lambda: nn.LayerNorm(48, bias=False)), ("dropout", nn.Identity),
        ("word_embeddings", lambda: nn.Sequential(nn.Embedding(130, 8), nn.Linear(8, 48))),
        ("position_embeddings", lambda: nn.Embedding(64, 48, max_norm=1.0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("door", DOORS)
def test_swapped_parts_of_the_embeddings(door, path, make):
    theirs, ours = fast_pair(door, NAME)
    for model in (theirs, ours):
        torch.manual_seed(17)
        setattr(model.bert.embeddings, path, make())
    assert_same_training_step(ours, theirs, NAME)
    assert fastbert.explain(ours).embeddings


class Doubling(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, *args, **kwargs):
        return 2 * self.inner(hidden_states, *args, **kwargs)


@pytest.mark.parametrize("door", DOORS)
def test_a_wrapped_layer(door):
    theirs, ours = fast_pair(door, NAME)
    for model in (theirs, ours):
        model.bert.encoder.layer[1] = Doubling(model.bert.encoder.layer[1])
    assert_same_training_step(ours, theirs, NAME)
    assert any("Doubling" in note for note in notes_of(ours))


@pytest.mark.parametrize("door", DOORS)
def test_other_numbers_of_layers(door):
    """Layers taken out, doubled or put in another order, as in distillation and layer sharing."""
    theirs, ours = fast_pair(door, NAME)
    for order in ([0, 2], [2, 0], [0, 0]):
        for model in (theirs, ours):
            layers = model.bert.encoder.layer
            model.bert.encoder.layer = nn.ModuleList(layers[i] for i in order)
            model.config.num_hidden_layers = len(order)
        assert_same_training_step(ours, theirs, NAME)
        for model in (theirs, ours):
            model.bert.encoder.layer = nn.ModuleList([*model.bert.encoder.layer, model.bert.encoder.layer[0]])[:3]
    assert notes_of(ours) == []


class MeanPooler(nn.Module):
    """Looks at all tokens, where transformers' pooler looks at the first."""

    def forward(self, hidden_states):
        return hidden_states.sum(1) / 7


@pytest.mark.parametrize("door", DOORS)
def test_another_pooler_sees_all_tokens(door):
    theirs, ours = fast_pair(door, "BertModel")
    for model in (theirs, ours):
        model.pooler = MeanPooler()
    batch = inputs_for("BertModel")
    real = batch["attention_mask"].unsqueeze(-1)
    expected = MeanPooler()(theirs(**batch).last_hidden_state * real)
    torch.testing.assert_close(ours(**batch).pooler_output, expected, atol=2e-5, rtol=2e-5)


def test_another_classifier_of_a_relative_sees_all_tokens():
    class MeanClassifier(nn.Linear):
        def forward(self, features):
            return super().forward(MeanPooler()(features))

    torch.manual_seed(19)
    config = transformers.RobertaConfig(**small_config().to_diff_dict() | {"pad_token_id": 1, "max_position_embeddings": 60})
    theirs = transformers.RobertaForSequenceClassification(config).eval()
    theirs.classifier = MeanClassifier(48, 3)
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    batch = {"input_ids": torch.randint(2, 130, (4, 9))}
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-5, rtol=2e-5)


class OwnHead(nn.Module):
    """One Linear in the place of a language-model head."""

    def __init__(self, with_pair: bool = False):
        super().__init__()
        self.words, self.pair = nn.Linear(48, 130), nn.Linear(48, 2) if with_pair else None

    def forward(self, hidden_states, pooled=None):
        return self.words(hidden_states) if self.pair is None else (self.words(hidden_states), self.pair(pooled))


HEADS = {
    "the head": ("BertForMaskedLM", "cls", OwnHead),
    "the head of pretraining": ("BertForPreTraining", "cls", lambda: OwnHead(with_pair=True)),
    "its predictions": ("BertForPreTraining", "cls.predictions", OwnHead),
    "its transform": ("BertForMaskedLM", "cls.predictions.transform", lambda: nn.Sequential(nn.Linear(48, 48), nn.Tanh())),
    "its activation": ("BertForMaskedLM", "cls.predictions.transform.transform_act_fn", nn.Tanh),
    "its LayerNorm": ("BertForMaskedLM", "cls.predictions.transform.LayerNorm", lambda: nn.LayerNorm(48, bias=False)),
    "its decoder": ("BertForMaskedLM", "cls.predictions.decoder", lambda: Gate(48, 130)),
}


@pytest.mark.parametrize("swapped", HEADS)
@pytest.mark.parametrize("door", DOORS)
def test_swapped_parts_of_a_language_model_head(door, swapped):
    name, path, make = HEADS[swapped]
    theirs, ours = fast_pair(door, name)
    for model in (theirs, ours):
        torch.manual_seed(17)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, make())
    assert_same_training_step(ours, theirs, name)
    assert fastbert.explain(ours).head
    batch = inputs_for(name)
    logits = [next(value for key, value in model(**batch).items() if key.endswith("logits")) for model in (ours, theirs)]
    assert_same_on_real_tokens(*logits)


def test_another_head_of_a_relative():
    config = transformers.RobertaConfig(**small_config().to_diff_dict() | {"pad_token_id": 1, "max_position_embeddings": 60})
    theirs = transformers.RobertaForMaskedLM(config).eval()
    theirs.lm_head = OwnHead()
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    ids = torch.randint(2, 130, (4, 9))
    losses = [model(input_ids=ids, labels=ids).loss for model in (theirs, ours)]
    torch.testing.assert_close(*losses, atol=2e-5, rtol=2e-5)
    assert any("OwnHead" in note for note in fastbert.explain(ours).head)
