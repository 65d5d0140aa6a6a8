"""The parts of a step's time, and which of them an operator of torch or fastbert works for.

A profile (``profile``), its floors (``model_work``) and its table and picture (``reports.profile_plot``) have the same parts. What
does the work of two in one pass is no more split than it can be: its time stands under both names, :func:`fused`.

:func:`part_of` goes by an operator's own name where that says all (``aten::gelu``), by what called it where it does not (an
``aten::copy_`` of attention's is attention's), and in a backward pass by the operator of the forward pass whose derivative it
computes (an ``aten::mul`` may be dropout's). On BERT, with torch 2.13, this leaves little under ``other`` in both libraries:
tests/benchmarks/test_profile.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LINEAR, ATTENTION, LAYER_NORM, GELU, EMBEDDINGS = "linear", "attention", "layer norm", "gelu", "embeddings"
LOSS, OPTIMIZER, COPIES, OTHER, OUTSIDE = "loss", "optimizer", "copies", "other", "outside"
# In the order of tables and bars, each with what it is.
MEANING = {
    LINEAR: "products of activations and weights, the vocabulary's included, with their biases' gradients",
    ATTENTION: "everything between queries, keys, values and the context",
    LAYER_NORM: "LayerNorm with the residual sum and the dropout around it, both with their gradients; fastbert's in the masked-LM "
    "head includes that head's GELU, fastbert's of the embeddings is in embeddings",
    GELU: "and, where that is one pass, its bias",
    EMBEDDINGS: "rows of the tables; in fastbert with their sum, LayerNorm and dropout",
    LOSS: "softmax and cross-entropy, without the vocabulary's product",
    OPTIMIZER: "AdamW",
    COPIES: "copies, conversions of dtype, padding put in and taken out",
    OTHER: "arithmetic of no other part",
    OUTSIDE: "no operator's work: Python, dispatch, memory that is given back, threads or a GPU that wait",
}
PARTS = tuple(MEANING)
_JOINT = " + "
# The annotations around fastbert's own matmul, the one that GELU rides on, and the embeddings of calls without gradients, which are
# no operators.
OWN_MATMUL, OWN_MATMUL_AND_GELU, OWN_EMBEDDINGS = "fastbert::matmul", "fastbert::matmul_gelu", "fastbert::embedding_layer_norm"


def fused(*parts: str) -> str:
    """The name of work for several parts that is done, and timed, in one pass."""
    return _JOINT.join(sorted(parts, key=PARTS.index))


def members(name: str) -> list[str]:
    """The parts that a name of :func:`fused`, or of one part, stands for."""
    return name.split(_JOINT)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of parts, fused ones behind the first of theirs, as tables have them."""
    return sorted(names, key=lambda name: (PARTS.index(members(name)[0]), len(members(name))))


def merged_rows(names: Iterable[str]) -> list[str]:
    """The names that all of ``names`` can be summed up in: fused ones swallow the parts that they are made of."""
    groups: list[set[str]] = []
    for name in names:
        group = set(members(name))
        for other in [other for other in groups if other & group]:
            groups.remove(other)
            group |= other
        groups.append(group)
    return in_order(fused(*group) for group in groups)


def _named(part: str, names: str, namespace: str = "aten") -> dict[str, str]:
    return dict.fromkeys((f"{namespace}::{name}" for name in names.split()), part)


# Everything below these is theirs, whatever it is called; by the beginnings of names.
_WHOLE = {
    "fastbert::attention": ATTENTION,
    "aten::scaled_dot_product": ATTENTION,
    "aten::_scaled_dot_product": ATTENTION,
    "fastbert::embedding_layer_norm": EMBEDDINGS,
    "aten::embedding": EMBEDDINGS,
    "Optimizer.": OPTIMIZER,  # the annotations that torch.optim puts around step() and zero_grad()
}
# The nearest of these, from an operator up through its callers, decides.
_STRONG = {
    **_named(LINEAR, "addmm addmm_ mm _int_mm _scaled_mm mkldnn_linear _addmm_activation"),
    "mkldnn::_linear_pointwise": LINEAR,
    "mkl::_mkl_linear": LINEAR,
    OWN_MATMUL: LINEAR,
    OWN_MATMUL_AND_GELU: fused(LINEAR, GELU),
    "fastbert::linear": LINEAR,
    "fastbert::int8_linear": LINEAR,
    "_QKVLinear": LINEAR,
    "_QKVLinearBackward": LINEAR,
    # What is no kernel of an op in there: sums of gradients.
    "_TrainedLayer": LINEAR,
    "_TrainedLayerBackward": LINEAR,
    **_named(ATTENTION, "bmm baddbmm baddbmm_ softmax _softmax _softmax_backward_data _safe_softmax"),
    **_named(LAYER_NORM, "layer_norm native_layer_norm native_layer_norm_backward"),
    **_named(LAYER_NORM, "dropout native_dropout native_dropout_backward"),
    **_named(LAYER_NORM, "add_layer_norm add_layer_norm_backward gelu_layer_norm gelu_layer_norm_backward", "fastbert"),
    **_named(LAYER_NORM, "add_layer_norm_mixed add_layer_norm_mixed_backward", "fastbert"),
    **_named(GELU, "gelu gelu_backward"),
    **_named(GELU, "linear_gelu linear_gelu_backward feed_forward feed_forward_backward", "fastbert"),
    **_named(LOSS, "cross_entropy_loss nll_loss nll_loss_nd nll_loss_forward nll_loss_backward"),
    **_named(LOSS, "log_softmax _log_softmax _log_softmax_backward_data"),
    **_named(LOSS, "mlm_loss mlm_loss_backward", "fastbert"),
    **_named(
        COPIES, "to _to_copy pad constant_pad_nd index index_select index_put index_put_ _index_put_impl_ index_copy index_copy_"
    ),
    **_named(COPIES, "index_add index_add_ gather nonzero masked_select cat slice_backward select_backward index_select_backward"),
    "torch::autograd::AccumulateGrad": COPIES,
}
# Who calls these, or whose derivative they compute, decides; else this.
_WEAK = {
    **_named(LAYER_NORM, "add add_"),  # residuals, and where their gradients meet
    **_named(COPIES, "copy_ clone contiguous zero_ fill_ zeros zeros_like new_zeros"),
}
# Views, memory and the outer halves of operators: there is only dispatch in their own time.
_DISPATCH = {
    **_named(
        OUTSIDE, "view reshape _unsafe_view _reshape_alias as_strided slice select t transpose expand expand_as unsqueeze squeeze"
    ),
    **_named(OUTSIDE, "detach detach_ alias flatten unbind chunk split narrow view_as permute lift_fresh set_"),
    **_named(OUTSIDE, "empty empty_like empty_strided new_empty new_empty_strided resize_ item _local_scalar_dense is_nonzero"),
    **_named(OUTSIDE, "resolve_conj resolve_neg result_type can_cast linear matmul to"),
    "fastbert::linear": OUTSIDE,
}
_AROUND_OPERATOR = "GeneratedBackwardFor_fastbert_"
_ENGINE = "autograd::engine::evaluate_function: "
_BACKWARD_SCOPE = 1  # torch's RecordScope::BACKWARD_FUNCTION

Event = Any  # torch.autograd.profiler_util.FunctionEvent: name, scope, cpu_parent, cpu_children, sequence_nr, thread, fwd_thread
Creators = Mapping[tuple[int, int], Event]


def creators_of(events: Iterable[Event]) -> Creators:
    """By forward thread and sequence number, which nodes of autograd keep, the operators that made the nodes.

    An operator's number is the one that the next node gets: of several with the same, the last to start made it.
    """
    found: dict[tuple[int, int], Event] = {}
    for event in events:
        if event.sequence_nr >= 0 and event.scope != _BACKWARD_SCOPE and not any(map(_node, _callers(event))):
            key = (event.thread, event.sequence_nr)
            if key not in found or event.time_range.start >= found[key].time_range.start:
                found[key] = event
    return found


def part_of(event: Event, creators: Creators) -> str:
    """The part that an operator works for in its own time, without those that it calls."""
    return OUTSIDE if _is_dispatch(event) else work_of(event, creators)


def operator_of(event: Event) -> str:
    """The name of an operator, also where a node around it runs its forward pass."""
    return event.cpu_parent.name if event.name.startswith(_AROUND_OPERATOR) and not _is_dispatch(event) else event.name


def work_of(event: Event, creators: Creators) -> str:
    """The part that the work of an operator belongs to, whatever it does itself."""
    chain = list(_callers(event))
    for caller in reversed(chain):
        for beginning, part in _WHOLE.items():
            if caller.name.startswith(beginning):
                return part
    for caller in chain:
        if caller.name in _STRONG:
            if caller.name == "mkldnn::_linear_pointwise" and any(c.name == "fastbert::linear_gelu" for c in chain):
                return fused(LINEAR, GELU)  # oneDNN applies GELU as it stores
            return _STRONG[caller.name]
        node = _node(caller)
        if node is None:
            continue
        made_by = creators.get((node.fwd_thread, node.sequence_nr))
        theirs = _STRONG.get(node.name)
        if theirs is None and made_by is not None and not _is_dispatch(made_by):
            theirs = work_of(made_by, creators)
        # Where gradients meet, the engine adds the second to the first as it comes from its node: a residual's, or where the
        # vocabulary's product and the embeddings share a table, that table's.
        meeting = caller.name.startswith(_ENGINE) and event.name in ("aten::add", "aten::add_")
        if theirs is not None and (not meeting or theirs == EMBEDDINGS):
            return theirs
        break
    return _WEAK.get(event.name, OTHER)


def _is_dispatch(event: Event) -> bool:
    """Names without a namespace are nodes of autograd and annotations. One node works: what torch.library makes around an operator
    that is defined in Python runs its forward pass, without a further event."""
    if event.name.startswith(_AROUND_OPERATOR):
        return event.scope == _BACKWARD_SCOPE
    return event.name in _DISPATCH or "::" not in event.name or event.name.startswith(("autograd::", "torch::autograd::"))


def _callers(event: Event) -> Iterator[Event]:
    """The event and what it runs in, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _node(event: Event) -> Event | None:
    """The node of autograd that an event is, or that the engine runs in it."""
    if event.scope == _BACKWARD_SCOPE:
        return event
    if event.name.startswith(_ENGINE):
        return next((child for child in event.cpu_children if child.scope == _BACKWARD_SCOPE), None)
    return None
