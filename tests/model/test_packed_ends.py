"""Embeddings and pooler natively, in calls without gradients: which calls take them, and that they are never those of yesterday."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.model import packed_ends
from fastbert.model.packing import Packing
from fastbert.ops import native
from fastbert.ops.native.inference import EmbeddingTables, PackedDense

from .helpers import LENGTH, VOCABULARY, inputs_for, mask, on_real_tokens, pair, small_config

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=str(native.unavailable_reason()))
NAME = "BertModel"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each end has run natively."""
    counts = {"embeddings": 0, "pooler": 0}

    def counted(name: str, function: Callable) -> Callable:
        def run(*args):
            result = function(*args)
            counts[name] += result is not None
            return result

        return run

    monkeypatch.setattr(EmbeddingTables, "embed", counted("embeddings", EmbeddingTables.embed))
    monkeypatch.setattr(PackedDense, "__call__", counted("pooler", PackedDense.__call__))
    return counts


def assert_same(ours: nn.Module, theirs: nn.Module, batch: dict[str, torch.Tensor], atol: float = 2e-5) -> None:
    with torch.no_grad():
        got, expected = ours(**batch), theirs(**batch)
    torch.testing.assert_close(on_real_tokens(got.last_hidden_state), on_real_tokens(expected.last_hidden_state), atol=atol, rtol=0)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=atol, rtol=0)


def test_both_are_native_and_right(calls):
    theirs, ours = pair(NAME)
    for count in (1, 2, 3):
        assert_same(ours, theirs, inputs_for(NAME))
        assert calls == {"embeddings": count, "pooler": count}
    ids = torch.randint(VOCABULARY, (6, LENGTH))
    for batch in ({"input_ids": ids}, {"input_ids": ids[:1, :5]}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        assert_same(ours, theirs, batch)
    assert calls == {"embeddings": 6, "pooler": 6}


def test_padding_behind_and_empty_sequences(calls):
    theirs, ours = pair(NAME)
    padded = mask()
    padded[-1] = 0
    batch = {**inputs_for(NAME), "attention_mask": padded}
    with torch.no_grad():
        got, expected = ours(**batch), theirs(**batch)
        zeros = ours.pooler(torch.zeros(1, 1, ours.config.hidden_size))
    torch.testing.assert_close(got.pooler_output[:-1], expected.pooler_output[:-1], atol=2e-5, rtol=0)
    torch.testing.assert_close(got.pooler_output[-1:], zeros, atol=1e-6, rtol=0)
    assert calls == {"embeddings": 1, "pooler": 1}


def test_positions_ids_of_other_kinds_and_packed_rows(calls):
    theirs, ours = pair(NAME)
    batch = inputs_for(NAME)
    positions = torch.arange(LENGTH).flip(0).expand(6, LENGTH)
    assert_same(ours, theirs, {**batch, "position_ids": positions})  # no memory of its own for each row
    assert calls["embeddings"] == 0
    assert_same(ours, theirs, {**batch, "position_ids": positions.contiguous()})
    assert calls["embeddings"] == 1
    assert_same(ours, theirs, {**batch, "input_ids": batch["input_ids"].int()})
    assert calls["embeddings"] == 1
    row = torch.cat([ids[:n] for ids, n in zip(batch["input_ids"], mask().sum(1), strict=True)]).unsqueeze(0)
    bounds = torch.tensor([0, *mask().sum(1).cumsum(0)], dtype=torch.int32)
    with torch.no_grad():
        packed = ours(row, cu_seq_lens_q=bounds).pooler_output
        padded = ours(batch["input_ids"], batch["attention_mask"]).pooler_output
    torch.testing.assert_close(packed, padded, atol=2e-6, rtol=0)
    assert calls["embeddings"] == 3


def test_gradients_and_dropout_take_the_ops_and_drop_the_pooler(calls):
    _, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        ours(**batch)
    assert ours.pooler in packed_ends._entries
    ours(**batch).pooler_output.sum().backward()
    assert ours.pooler not in packed_ends._entries
    assert ours.embeddings.word_embeddings.weight.grad is not None
    assert calls == {"embeddings": 1, "pooler": 1}
    with torch.no_grad():
        ours.train()
        first, second = (ours(**batch).pooler_output for _ in range(2))
    assert calls["embeddings"] == 1
    assert not torch.equal(first, second)


def _changed(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter(path).mul_(1.5).add_(0.1)

    return change


def _replaced(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        old = model.get_parameter(path)
        setattr(model.get_submodule(parent), name, nn.Parameter(old.detach() * 1.5))

    return change


def _resized(model: nn.Module) -> None:
    with torch.no_grad():
        model.resize_token_embeddings(VOCABULARY + 7)
        model.embeddings.word_embeddings.weight.mul_(1.5)


def _loaded(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 1.01 for name, tensor in model.state_dict().items()})


CHANGES = {
    **{f"{path} in place": _changed(path) for path in (
        "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "embeddings.LayerNorm.bias",
        "pooler.dense.weight", "pooler.dense.bias",
    )},
    **{f"another {path}": _replaced(path) for path in (
        "embeddings.token_type_embeddings.weight", "embeddings.LayerNorm.weight", "pooler.dense.weight",
    )},
    "more tokens": _resized,
    "loaded": _loaded,
    "eps": lambda model: setattr(model.embeddings.LayerNorm, "eps", 0.5),
    "a pooler's hook": lambda model: model.pooler.register_forward_hook(lambda *args: args[-1] * 2),
    "a hook inside": lambda model: model.pooler.dense.register_forward_hook(lambda *args: args[-1] * 2),
    "an activation": lambda model: setattr(model.pooler, "activation", nn.ReLU()),
    "embeddings' hook": lambda model: model.embeddings.register_forward_hook(lambda *args: args[-1] * 2),
    "a table's hook": lambda model: model.embeddings.word_embeddings.register_forward_hook(lambda *args: args[-1] * 2),
    "a norm that a table keeps": lambda model: setattr(model.embeddings.word_embeddings, "max_norm", 0.1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change, dtype):
    theirs, ours = pair(NAME)
    ours, batch = ours.to(dtype), inputs_for(NAME)
    with torch.no_grad():
        before = [ours(**batch) for _ in range(2)][-1]
    change(theirs)
    change(ours)
    with torch.no_grad():
        copied = copy.deepcopy(ours)  # first: a table that keeps a norm changes when it is read
        after, fresh = ours(**batch), copied(**batch)
        expected = theirs(**batch)
    states = [(x.last_hidden_state * mask().unsqueeze(-1), x.pooler_output) for x in (before, after, fresh, expected)]
    assert not all(map(torch.equal, states[0], states[1]))
    assert all(map(torch.equal, states[1], states[2]))
    for got, wanted in zip(states[1], states[3], strict=True):
        torch.testing.assert_close(got.float(), wanted, atol=2e-5 if dtype == torch.float32 else 0.2, rtol=0)


def test_ids_outside_their_tables_are_named():
    _, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        ours(**batch)
        batch["input_ids"][1, 1] = VOCABULARY
        with pytest.raises(ValueError, match=f"input_ids holds {VOCABULARY}, expected 0 to {VOCABULARY - 1} .config.vocab_size"):
            ours(**batch)
        batch["input_ids"][1, 1] = 0
        batch["token_type_ids"][0, 3] = -2
        with pytest.raises(ValueError, match="token_type_ids holds -2, expected 0 to 1"):
            ours(**batch)


@pytest.mark.parametrize("family", ["Roberta", "Electra"])
def test_relatives(calls, family):
    changes = {"pad_token_id": 1} if family == "Roberta" else {"embedding_size": 24}
    config = getattr(transformers, f"{family}Config")(**{**small_config().to_dict(), "model_type": family.lower(), **changes})
    theirs = getattr(transformers, f"{family}Model")(config).eval()
    ours, batch = fastbert.accelerate(copy.deepcopy(theirs)), inputs_for(NAME)
    batch["input_ids"] = torch.where(mask() == 1, batch["input_ids"].clamp(min=2), 1)
    with torch.no_grad():
        got, expected = ours(**batch).last_hidden_state, theirs(**batch).last_hidden_state
    torch.testing.assert_close(on_real_tokens(got), on_real_tokens(expected), atol=2e-5, rtol=0)
    assert calls == {"embeddings": 1, "pooler": 1 if family == "Roberta" else 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_about_dtypes_as_in_transformers(calls, dtype):
    theirs, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        ours(**batch)
        with torch.autocast("cpu", dtype):
            got, expected = ours(**batch), theirs(**batch)
    assert got.pooler_output.dtype == expected.pooler_output.dtype == dtype
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=0.05, rtol=0)
    assert calls == {"embeddings": 2, "pooler": 1}


def test_dtypes_without_kernels_take_the_module(calls):
    theirs, ours = pair(NAME)
    assert_same(ours.double(), theirs.double(), inputs_for(NAME), atol=1e-12)
    assert calls == {"embeddings": 0, "pooler": 0}


def test_an_empty_batch_and_one_without_tokens(calls):
    _, ours = pair(NAME)
    with torch.no_grad():
        empty = ours(torch.zeros(0, 7, dtype=torch.int64))
        assert empty.pooler_output.shape == (0, 48)
        nothing = ours(torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64))
        assert nothing.last_hidden_state.abs().max() == 0
        assert nothing.pooler_output.shape == (2, 48)


def test_a_model_that_is_gone_leaves_nothing():
    _, ours = pair(NAME)
    with torch.no_grad():
        ours(**inputs_for(NAME))
    before = len(packed_ends._entries)
    assert {ours.embeddings, ours.pooler} <= set(packed_ends._entries)
    del ours
    assert len(packed_ends._entries) == before - 2


def test_tables_that_were_replaced_do_not_outlive_a_step_of_training():
    _, ours = pair(NAME)
    batch, old = inputs_for(NAME), weakref.ref(ours.embeddings.word_embeddings.weight)
    with torch.no_grad():
        ours(**batch)
    ours.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()}, assign=True)
    ours(**batch).pooler_output.sum().backward()
    assert old() is None


def test_tables_are_read_where_they_were_when_another_thread_casts_them():
    _, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        ours(**batch)
        tables, packing = packed_ends.tables_of(ours), Packing.from_mask(None, batch["input_ids"].shape, torch.device("cpu"))
        expected = packed_ends.embed_at_once(tables, ours, packing, batch["input_ids"], None, None)
        places = [table.data_ptr() for table in tables._tables]
        ours.bfloat16()
        again = [torch.full_like(table, float("nan")) for table in tables._tables]  # where memory was freed, it is taken again
        got = packed_ends.embed_at_once(tables, ours, packing, batch["input_ids"], None, None)
    assert [table.data_ptr() for table in tables._tables] == places
    assert not set(places) & {table.data_ptr() for table in again}
    assert torch.equal(got, expected)


@pytest.mark.parametrize("end", ["embeddings", "pooler"])
def test_an_end_that_another_thread_casts_meanwhile_is_not_kept(monkeypatch, end):
    _, ours = pair(NAME)

    class CastFirst(packed_ends.Snapshot):
        def __init__(self, modules, *rest):
            root, *others = modules
            root.bfloat16()
            super().__init__([root, *others], *rest)

    monkeypatch.setattr(packed_ends, "Snapshot", CastFirst)
    with torch.no_grad():
        made = packed_ends.keep_tables(ours) if end == "embeddings" else packed_ends._keep_dense(ours.pooler)
    assert made is None
    assert not {ours.embeddings, ours.pooler} & set(packed_ends._entries)


def test_an_end_that_no_longer_runs_natively_keeps_no_old_weights():
    _, ours = pair(NAME)
    with torch.no_grad():
        ours(**inputs_for(NAME))
        ours.double()(**inputs_for(NAME))
    assert ours.embeddings not in packed_ends._entries
    assert ours.pooler not in packed_ends._entries


def test_bfloat16_under_autocast_whatever_ran_before(calls):
    theirs, ours = (model.bfloat16() for model in pair(NAME))
    batch = inputs_for(NAME)
    with torch.no_grad():
        ours(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = (model(**batch, output_hidden_states=True).hidden_states[0] for model in (ours, theirs))
    assert calls["embeddings"] == 1
    assert got.dtype == expected.dtype
    assert torch.equal(on_real_tokens(got), on_real_tokens(expected))


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("embeddings.position_embeddings.weight", (40, 32)),
        ("embeddings.token_type_embeddings.weight", (2, 1)),
        ("embeddings.LayerNorm.weight", (3,)),
        ("pooler.dense.bias", (3,)),
    ],
)
def test_shapes_that_do_not_fit_are_errors(calls, path, shape):
    _, ours = pair(NAME)
    parent, _, name = path.rpartition(".")
    setattr(ours.get_submodule(parent), name, nn.Parameter(torch.ones(shape)))
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        ours(**inputs_for(NAME))
    assert calls["pooler"] == 0


def test_modes_that_watch_operators_see_them():
    _, ours = pair(NAME)
    batch, seen = inputs_for(NAME), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = ours(**batch).pooler_output
        with Watching():
            got = ours(**batch).pooler_output
    assert {"fastbert.embedding_layer_norm.default", "aten.tanh.default"} <= set(seen)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("gradients", [False, True])
def test_what_is_not_finite_stays_with_its_text(gradients):
    """The pooler reads a row of zeros for a text without tokens, not a neighbour's times 0."""
    model = fastbert.BertModel(small_config()).eval()
    model.embeddings.word_embeddings.weight.data[7] = torch.nan
    ids, mask = torch.tensor([[5, 6, 8], [7, 7, 9], [6, 7, 7]]), torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0]])
    with torch.set_grad_enabled(gradients):
        assert model(ids, attention_mask=mask).pooler_output.isnan().any(1).tolist() == [False, True, False]
