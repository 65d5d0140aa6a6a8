"""Which part an operator works for, by its name, its callers and, in a backward pass, by what it is the derivative of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.parts import (
    MEANING,
    PARTS,
    creators_of,
    fused,
    in_order,
    members,
    merged_rows,
    operator_of,
    part_of,
)

BACKWARD = 1
SDPA = ["aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math"]


class Recorder:
    """Events as torch.profiler has them, with the times of a clock that moves on by one with each event."""

    def __init__(self) -> None:
        self.events: list[SimpleNamespace] = []

    def __call__(self, *names: str, sequence_nr: int = -1, backward: tuple[str, int] | None = None) -> SimpleNamespace:
        """The innermost of events that lie in each other; backward: the node of autograd, with its number, that they run in."""
        event = None
        if backward is not None:
            node, number = backward
            event = self._add(f"autograd::engine::evaluate_function: {node}", None)
            event = self._add(node, event, scope=BACKWARD, sequence_nr=number)
        for name in names:
            event = self._add(name, event, sequence_nr=sequence_nr)
        return event

    def beside_node(self, name: str, node: str, number: int) -> SimpleNamespace:
        """What the engine itself does after a node."""
        return self._add(name, self(backward=(node, number)).cpu_parent)

    def _add(self, name, parent, scope=0, sequence_nr=-1):
        event = SimpleNamespace(
            name=name, scope=scope, sequence_nr=sequence_nr, thread=1, fwd_thread=1, cpu_parent=parent, cpu_children=[],
            time_range=SimpleNamespace(start=len(self.events)),
        )  # fmt: skip
        if parent is not None:
            parent.cpu_children.append(event)
        self.events.append(event)
        return event


def part(recorder: Recorder, event: SimpleNamespace) -> str:
    return part_of(event, creators_of(recorder.events))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["aten::linear", "aten::addmm"], "linear"),
        (["aten::linear"], "outside"),
        (["aten::linear", "aten::t"], "outside"),
        (["aten::linear", "aten::to", "aten::_to_copy", "aten::copy_"], "copies"),
        (["_QKVLinear", "mkldnn::_linear_pointwise"], "linear"),
        (["fastbert::feed_forward", "mkldnn::_linear_pointwise"], "linear"),
        (["fastbert::linear_gelu", "mkldnn::_linear_pointwise"], "linear + gelu"),
        (["fastbert::feed_forward"], "gelu"),
        (["fastbert::feed_forward_backward", "fastbert::matmul"], "linear"),
        (["fastbert::mlm_loss", "fastbert::matmul"], "linear"),
        (["fastbert::mlm_loss", "aten::log"], "loss"),
        (["fastbert::linear", "aten::contiguous", "aten::copy_"], "linear"),
        (["fastbert::attention"], "attention"),
        (["fastbert::attention_backward", "aten::mm"], "attention"),
        ([*SDPA, "aten::mul"], "attention"),
        ([*SDPA, "aten::dropout", "aten::mul"], "attention"),
        (["aten::bmm"], "attention"),
        (["aten::layer_norm", "aten::native_layer_norm"], "layer norm"),
        (["aten::dropout", "aten::bernoulli_"], "layer norm"),
        (["fastbert::add_layer_norm"], "layer norm"),
        (["aten::add"], "layer norm"),
        (["fastbert::embedding_layer_norm_backward", "aten::zero_"], "embeddings"),
        (["aten::embedding", "aten::index_select"], "embeddings"),
        (["aten::cross_entropy_loss", "aten::log_softmax", "aten::_log_softmax"], "loss"),
        (["Optimizer.step#AdamW.step", "aten::_fused_adamw_"], "optimizer"),
        (["Optimizer.step#AdamW.step"], "outside"),
        (["aten::index", "aten::copy_"], "copies"),
        (["aten::clone", "aten::copy_"], "copies"),
        (["aten::tanh"], "other"),
        (["fastbert::attention", "GeneratedBackwardFor_fastbert_attention_default"], "attention"),
        (["fastbert::linear", "GeneratedBackwardFor_fastbert_linear_default", "fastbert::matmul"], "linear"),
    ],
)  # fmt: skip
def test_by_name_and_callers(names, expected):
    recorder = Recorder()
    assert part(recorder, recorder(*names)) == expected


def test_of_a_derivative_by_what_it_is_the_derivative_of():
    recorder = Recorder()
    recorder("aten::dropout", "aten::mul", sequence_nr=7)
    recorder(*SDPA, "aten::mul", sequence_nr=8)
    recorder("aten::transpose", sequence_nr=9)
    recorder("aten::addmm", sequence_nr=10)
    recorder("aten::mul", sequence_nr=11)
    assert part(recorder, recorder("aten::mul", backward=("MulBackward0", 7))) == "layer norm"
    assert part(recorder, recorder("aten::mul", backward=("MulBackward0", 8))) == "attention"
    assert part(recorder, recorder("aten::copy_", backward=("TransposeBackward0", 9))) == "copies"
    assert part(recorder, recorder("aten::mm", backward=("AddmmBackward0", 10))) == "linear"
    assert part(recorder, recorder.beside_node("aten::sum", "AddmmBackward0", 10)) == "linear"
    assert part(recorder, recorder("aten::mul", backward=("MulBackward0", 11))) == "other"


def test_the_last_operator_with_a_number_made_the_node():
    recorder = Recorder()
    recorder("aten::gelu", sequence_nr=3)
    recorder("aten::tanh", sequence_nr=3)
    later = recorder("aten::mul", backward=("TanhBackward0", 3))
    assert part(recorder, later) == "other"
    # A backward pass makes no nodes, whatever number its operators show.
    recorder("aten::gelu", backward=("Other", 4), sequence_nr=3)
    assert part(recorder, later) == "other"


def test_gradients_that_meet_are_the_residuals_or_the_shared_tables():
    recorder = Recorder()
    recorder("aten::addmm", sequence_nr=1)
    recorder("aten::embedding", sequence_nr=2)
    ours = "GeneratedBackwardFor_fastbert_embedding_layer_norm_default"
    recorder("fastbert::embedding_layer_norm", ours, sequence_nr=3)
    assert part(recorder, recorder.beside_node("aten::add_", "AddmmBackward0", 1)) == "layer norm"
    assert part(recorder, recorder.beside_node("aten::add_", "EmbeddingBackward0", 2)) == "embeddings"
    assert part(recorder, recorder.beside_node("aten::add_", f"{ours}Backward", 3)) == "embeddings"
    assert part(recorder, recorder(backward=(f"{ours}Backward", 3))) == "outside"
    assert part(recorder, recorder("aten::add_", backward=("torch::autograd::AccumulateGrad", -1))) == "copies"


def test_an_operator_has_its_own_name_in_the_node_around_it():
    recorder = Recorder()
    node = "GeneratedBackwardFor_fastbert_attention_default"
    assert operator_of(recorder("fastbert::attention", node)) == "fastbert::attention"
    assert operator_of(recorder(backward=(f"{node}Backward", 1))) == f"{node}Backward"
    assert operator_of(recorder("aten::gelu")) == "aten::gelu"


def test_names_of_fused_parts():
    assert fused("gelu", "linear") == "linear + gelu" and members("linear + gelu") == ["linear", "gelu"]
    assert in_order({"gelu", "outside", "linear + gelu", "linear"}) == ["linear", "linear + gelu", "gelu", "outside"]
    assert merged_rows(["outside", "linear", "gelu", "attention"]) == ["linear", "attention", "gelu", "outside"]
    assert merged_rows(["linear", "linear + gelu", "attention", "gelu"]) == ["linear + gelu", "attention"]
    assert merged_rows(["gelu + copies", "copies", "linear + gelu"]) == ["linear + gelu + copies"]
    assert not any("+" in name for name in PARTS) and all(MEANING.values())
