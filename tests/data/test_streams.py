from __future__ import annotations

from itertools import product

import pytest

from fastbert.data.streams import LARGEST_SEED, Stream, generator


def test_every_place_and_stream_has_numbers_of_its_own() -> None:
    places = [(seed, stream, *place) for seed in (0, 1) for stream in Stream for place in product(range(3), repeat=3)]
    drawn = {tuple(generator(*place).integers(0, 2**63, 4).tolist()) for place in places}
    assert len(drawn) == len(places)
    assert [generator(1, Stream.MASKS, 2, 3, 4).random() for _ in range(2)] == [generator(1, Stream.MASKS, 2, 3, 4).random()] * 2


def test_a_place_never_runs_into_the_next() -> None:
    """The numbers of a batch are counted in the lowest word: not even many of them are those of its neighbour."""
    many = set(generator(0, Stream.MASKS, 0, 0, 0).integers(0, 2**63, 100_000).tolist())
    for place in ((0, 0, 1), (0, 1, 0), (1, 0, 0)):
        assert not many & set(generator(0, Stream.MASKS, *place).integers(0, 2**63, 1000).tolist())


def test_known_numbers() -> None:
    """Philox's numbers are fixed by its paper; these two are from an implementation of it in plain Python."""
    state = generator(7, Stream.MASKS, 1, 2, 3).bit_generator
    assert [hex(number) for number in state.random_raw(2).tolist()] == ["0x3105133d42da4805", "0x8a9c0f99d805b4e8"]


def test_seeds_are_64_bits() -> None:
    assert 0 <= generator(LARGEST_SEED, Stream.ORDER, 0).random() < 1
    for seed in (-1, LARGEST_SEED + 1):
        with pytest.raises(ValueError, match=f"seed must lie between 0 and {LARGEST_SEED}, it is {seed}"):
            generator(seed, Stream.ORDER, 0)
