"""``fastbert.refresh(model)``: forget what was made of the weights, for changes that nothing tells of."""

from __future__ import annotations

from torch import nn

from . import packed_ends, packed_layer


def refresh(model: nn.Module) -> nn.Module:
    """The next call without gradients on a CPU packs the weights of ``model`` anew, as they are then. Returns ``model``.

    Needed after a change of some elements (fewer than a fifth, say) that leaves no trace: in place through ``.data``
    (``layer.output.dense.weight.data[7] = 0``), through NumPy or a raw pointer, or of tensors made under
    ``torch.inference_mode()``. What torch counts (``with torch.no_grad(): weight[7] = 0``), another tensor, or other memory, in the
    place of the old, and changes of all elements are seen without it.
    """
    for module in model.modules():
        packed_layer.forget(module)
        packed_ends.forget(module)
    return model
