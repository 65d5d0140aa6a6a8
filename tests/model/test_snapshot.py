"""Whether a module is what it was: every change is seen, and none that is taken back."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastbert.model import snapshot as snapshot_module
from fastbert.model.snapshot import Snapshot
from fastbert.ops import native
from fastbert.ops.encoder_layer import EncoderLayerWeights, LayerNormWeights, LinearWeights
from fastbert.ops.native.encoder_layer import PackedEncoderLayer, PackedEncoderLayers, run_layers, run_layers_if_unchanged

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=f"the native extension is not built: {native.unavailable_reason()}")


def module() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(4)))
    made[0].register_forward_hook(_hook)
    return made


def _hook(*_) -> None: ...


def _other_hook(*_) -> None: ...


def _set(path: str, value):
    def change(root: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, value)

    return change


def _hook_in_the_same_place(root: nn.Module) -> None:
    (key,) = root[0]._forward_hooks
    root[0]._forward_hooks[key] = _other_hook


CHANGES = {
    "a submodule": _set("0", nn.Linear(3, 4)),
    "a submodule inside": _set("1.1", nn.BatchNorm1d(4)),
    "a class": lambda root: setattr(root[1][0], "__class__", nn.AlphaDropout),
    "a parameter": _set("0.weight", nn.Parameter(torch.zeros(4, 3))),
    "no parameter": _set("0.bias", None),
    "a buffer": _set("1.1.running_mean", torch.ones(4)),
    "one hook more": lambda root: root[1].register_forward_pre_hook(_hook),
    "a hook of the module itself": lambda root: root.register_full_backward_hook(_hook),
    "no hook": lambda root: root[0]._forward_hooks.clear(),
    "another hook": _hook_in_the_same_place,
    "other dicts of hooks": lambda root: setattr(root[0], "_forward_hooks", OrderedDict(root[0]._forward_hooks)),
    "another state": lambda root: root.__setstate__(root.__getstate__() | {"_forward_hooks": OrderedDict()}),
    "another forward": lambda root: setattr(root[1], "forward", lambda x: x),
    "a mode": lambda root: root.train(),
    "a probability": _set("1.0.p", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    root = module().eval()
    snapshot = Snapshot(root.modules(), {root[1][0]: ("training", "p")})
    assert snapshot.unchanged()
    root[0].weight.data.add_(1)  # what is in a tensor is somebody else's business
    assert snapshot.unchanged()
    change(root)
    assert not snapshot.unchanged()


@pytest.mark.parametrize("kind", [nn.Linear, nn.Sequential, nn.BatchNorm1d.__base__])
def test_another_forward_of_a_class_is_seen(monkeypatch, kind):
    """Of the root's, of a module's inside, and of a class that it has its forward from."""
    root = module()
    snapshot = Snapshot(root.modules(), {})
    assert snapshot.unchanged()
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    assert not snapshot.unchanged()
    monkeypatch.undo()
    assert snapshot.unchanged()


def test_what_is_taken_back_is_no_change():
    root = module()
    snapshot = Snapshot(root.modules(), {})
    weight, handle = root[0].weight, root[1].register_forward_hook(_hook)
    root[0].weight = nn.Parameter(torch.zeros(4, 3))
    assert not snapshot.unchanged()
    handle.remove()
    root[0].weight = weight
    assert snapshot.unchanged()


def test_an_attribute_that_comes_or_goes():
    root = module()
    snapshot = Snapshot(root.modules(), {root: ("eps",)})
    root.eps = 1e-12
    assert not snapshot.unchanged()
    del root.eps
    assert snapshot.unchanged()


def _in_place(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def _elsewhere(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


def _past_the_counters(tensor: torch.Tensor) -> None:
    tensor.data.add_(1)


def _its_last_word(tensor: torch.Tensor) -> None:
    tensor.data.view(-1)[-1] += 1


def _transposed(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.t()


def _a_part(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data[:-3]


def _one_row_for_all(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data[:1].expand_as(tensor)


CHANGES_OF_A_TENSOR = [_in_place, _elsewhere, _past_the_counters, _its_last_word, _transposed, _a_part, _one_row_for_all]


@pytest.mark.parametrize("change", CHANGES_OF_A_TENSOR)
@pytest.mark.parametrize("inference", [False, True])
def test_a_change_of_a_tensor_is_seen(change, inference):
    with torch.inference_mode(inference):
        root = nn.Linear(30, 40).requires_grad_(False)
        snapshot = Snapshot(root.modules(), {}, [root.weight, root.bias])
        assert snapshot.unchanged()
        change(root.bias if change is _its_last_word else root.weight)
        assert not snapshot.unchanged()


def test_several_at_once():
    roots = [module() for _ in range(3)]
    snapshots = [Snapshot(root.modules(), {}).handle for root in roots]
    assert native.EXTENSION.all_unchanged([])
    assert native.EXTENSION.all_unchanged(snapshots)
    for changed in range(3):
        roots[changed][1].register_forward_hook(_hook)
        assert not native.EXTENSION.all_unchanged(snapshots[changed:])
        assert native.EXTENSION.all_unchanged(snapshots[changed + 1 :])


def _snapshot(objects, attributes, dicts=(), counted=(), tensors=(), storages=(), arrays=()):
    tensors, storages = list(tensors), list(storages)
    return native.EXTENSION.Snapshot(objects, attributes, list(dicts), list(counted), tensors, storages, False, list(arrays), [])


class Thing:
    """What has attributes and may be referred to weakly."""


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="objects and attributes differ in length"):
        _snapshot([Thing()], [])
    with pytest.raises(ValueError, match="tensors and arrays differ in length"):
        _snapshot([], [], tensors=[torch.ones(2)])
    with pytest.raises(AttributeError, match="__dict__"):
        _snapshot([()], [[]])
    for names in ({"dicts": ["missing"]}, {"counted": ["missing"]}):
        with pytest.raises(ValueError, match="not a dict"):
            _snapshot([Thing()], [[]], **names)
    with pytest.raises(TypeError, match="unhashable"):
        _snapshot([Thing()], [[[]]])
    with pytest.raises(ValueError, match="tensors and storages differ in length"):
        _snapshot([], [], tensors=[torch.ones(2)], arrays=[(0, 0)])
    storage = StorageWeakRef(torch.ones(2).untyped_storage())
    with pytest.raises(ValueError, match="a tensor is in none of the objects' dicts"):
        _snapshot([], [], tensors=[torch.ones(2)], storages=[storage], arrays=[(0, 0)])
    thing = Thing()
    thing.entries = {"tensor": Thing()}
    with pytest.raises(AttributeError, match="dim"):
        _snapshot([thing], [[]], ["entries"], tensors=thing.entries.values(), storages=[storage], arrays=[(0, 0)])


def test_what_comparing_keys_raises_is_raised():
    class Key:
        fails = False

        def __hash__(self) -> int:
            return 1

        def __eq__(self, other) -> bool:
            if self.fails:
                raise ArithmeticError("no")
            return False

    thing = Thing()
    thing.entries = {Key(): None}
    snapshot = _snapshot([thing], [[Key()]], ["entries"])
    thing.__dict__[Key()] = None
    layers, x, cu_seqlens = _layers()
    assert native.EXTENSION.all_unchanged([snapshot])
    assert run_layers_if_unchanged(layers, x, cu_seqlens, [snapshot]) is not None
    Key.fails = True
    with pytest.raises(ArithmeticError):
        native.EXTENSION.all_unchanged([snapshot])
    with pytest.raises(ArithmeticError):
        run_layers_if_unchanged(layers, x, cu_seqlens, [snapshot])


def _layers() -> tuple[PackedEncoderLayers, torch.Tensor, torch.Tensor]:
    qkv, out, wide, back = (
        LinearWeights(torch.randn(shape) / 10, None) for shape in ((384, 128), (128, 128), (512, 128), (128, 512))
    )
    norm = LayerNormWeights(torch.ones(128), torch.zeros(128), 1e-12)
    layer = PackedEncoderLayer(EncoderLayerWeights(qkv, out, norm, wide, back, norm, 2, 0.125), torch.float32)
    return PackedEncoderLayers([layer] * 3), torch.randn(40, 128), torch.tensor([0, 7, 40], dtype=torch.int32)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layers_run_where_nothing_has_changed(threads):
    """The comparison happens while other threads are at work: they stop, and the next call is as if nothing had been."""
    roots = [module() for _ in range(3)]
    snapshots = [Snapshot(root.modules(), {}).handle for root in roots]
    layers, x, cu_seqlens = _layers()
    expected, before = run_layers(layers, x, cu_seqlens), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(run_layers_if_unchanged(layers, x, cu_seqlens, snapshots), expected)
            hook = roots[2][1].register_forward_hook(_hook)
            assert run_layers_if_unchanged(layers, x, cu_seqlens, snapshots) is None
            hook.remove()
    finally:
        torch.set_num_threads(before)


def test_a_snapshot_keeps_nothing_alive():
    """Not even what leads to the module from inside of it: a hook, another forward, an attribute of it or of a parameter."""
    root = module()
    leads_back = nn.Module()
    leads_back.__dict__["root"] = root
    root[1].register_forward_hook(leads_back.forward)
    root[1][0].forward = functools.partial(root[1].forward)
    root[0].__dict__["owner"] = root
    root[0].weight.owner = root
    snapshot, gone = Snapshot(root.modules(), {root[0]: ("owner",)}, list(root.parameters())), weakref.ref(root)
    assert snapshot.unchanged()
    del root, leads_back
    gc.collect()
    assert gone() is None
    assert not snapshot.unchanged()


def test_another_object_at_the_same_address_is_another_one():
    thing = Thing()
    for _ in range(100):
        thing.value, thing.entries = Thing(), {}
        snapshot = _snapshot([thing], [["value"]], ["entries"])
        before = id(thing.value)
        del thing.value
        thing.value = Thing()
        assert not native.EXTENSION.all_unchanged([snapshot])
        if id(thing.value) == before:
            return
    pytest.skip("no object came to lie where another one had been")


def test_memory_that_rows_of_a_tensor_share_or_leave_out():
    tensor = torch.zeros(6, 8)
    assert [snapshot_module._extent(t) for t in (tensor, tensor[:, :4], tensor[:1].expand(6, 8), tensor[:0], tensor.t())] == [
        192, 176, 32, 0, 192,
    ]  # fmt: skip
