"""Which sequences go into a batch together, under a budget of tokens: for evaluation, prediction and feature extraction, where the
order of the work is free."""

from __future__ import annotations

from collections.abc import Sequence


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int, *, padded: bool = False) -> list[list[int]]:
    """Batches of sequences, given by their numbers in ``lengths``: all of them, each once, the longest first.

    Neighbours in length share a batch, which is what saves padding where there is any, and gives threads even work where there is
    none. The tokens of a batch, sum(lengths) or with ``padded`` rows x longest, are at most ``tokens_per_batch``; a sequence that
    is longer than that is a batch of its own. Equal lengths keep their order, so that the batches depend on the arguments alone.
    The longest come first, so that what does not fit into memory fails at the start.

    Raises ValueError where ``tokens_per_batch`` is below 1 or a length is negative.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, not {tokens_per_batch}")
    if (shortest := min(lengths, default=0)) < 0:
        raise ValueError(f"lengths must not be negative, and one of them is {shortest}")
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches:
            batch = batches[-1]
            after = lengths[batch[0]] * (len(batch) + 1) if padded else tokens + lengths[index]
            if after <= tokens_per_batch:
                batch.append(index)
                tokens = after
                continue
        batches.append([index])
        tokens = lengths[index]
    return batches
