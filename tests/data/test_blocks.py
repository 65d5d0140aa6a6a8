from __future__ import annotations

import numpy as np
import pytest

from fastbert.data.blocks import CorpusBlocks
from fastbert.data.errors import CorpusError
from fastbert.data.tokens import concatenate

from .helpers import numbered_corpus, random_lengths

# Shard n has n + 1 documents of one sentence of ten tokens each.
SHARDS = [numbered_corpus([[10]] * (number + 1)) for number in range(12)]


def sizes(blocks: CorpusBlocks, epoch: int) -> list[list[int]]:
    """The documents of each shard of each block, told by the counts that only that shard has."""
    return [[number + 1 for number in blocks.shards(epoch, block)] for block in range(blocks.count(epoch))]


def test_an_epoch_goes_through_all_shards_once_in_an_order_of_its_own() -> None:
    blocks = CorpusBlocks(SHARDS, seed=1, block_tokens=200)
    orders = []
    for epoch in range(4):
        order = [documents for block in sizes(blocks, epoch) for documents in block]
        assert sorted(order) == list(range(1, 13))
        orders.append(tuple(order))
        assert sizes(CorpusBlocks(SHARDS, seed=1, block_tokens=200), epoch) == sizes(blocks, epoch)
    assert len(set(orders)) == 4
    assert sizes(CorpusBlocks(SHARDS, seed=2, block_tokens=200), 0) != sizes(blocks, 0)


def test_a_block_has_as_many_shards_as_fit_and_at_least_one() -> None:
    blocks = CorpusBlocks(SHARDS, seed=1, block_tokens=100)
    for epoch in range(4):
        found = sizes(blocks, epoch)
        for block, following in zip(found, found[1:]):
            assert sum(block) <= 10 or len(block) == 1
            assert sum(block) + following[0] > 10, "the next shard would have fitted"


def test_a_block_of_too_few_documents_is_joined_with_the_next_one() -> None:
    single = [numbered_corpus([[50]]) for _ in range(7)]
    blocks = CorpusBlocks(single, seed=0, block_tokens=10, least_documents=2)
    for epoch in range(5):
        assert sorted(len(blocks.shards(epoch, block)) for block in range(blocks.count(epoch))) == [2, 2, 3]
    assert CorpusBlocks(single, seed=0, block_tokens=10).count(0) == 7
    with pytest.raises(CorpusError, match="the corpus has 1 documents, at least 2 are needed"):
        CorpusBlocks(single[:1], seed=0, least_documents=2)
    with pytest.raises(CorpusError, match="the corpus has 0 documents, at least 1 are needed"):
        CorpusBlocks([], seed=0)


def test_fixed_blocks_come_in_another_order() -> None:
    blocks = CorpusBlocks(SHARDS, seed=1, block_tokens=200, fixed=True)
    first = sizes(blocks, 0)
    assert [blocks.place(0, block) for block in range(len(first))] == [(0, block) for block in range(len(first))]
    orders = set()
    for epoch in range(1, 5):
        assert sorted(sizes(blocks, epoch)) == sorted(first)
        places = [blocks.place(epoch, block) for block in range(blocks.count(epoch))]
        assert [first[block] for _, block in places] == sizes(blocks, epoch) and {epoch for epoch, _ in places} == {0}
        orders.add(tuple(places))
    assert len(orders) > 1


def test_a_block_is_its_shards_as_one_corpus() -> None:
    shards = [numbered_corpus(random_lengths(documents, seed=documents)) for documents in (3, 5, 2)]
    blocks = CorpusBlocks(shards, seed=0)
    order, corpus = blocks.shards(0, 0), blocks.load(0, 0)
    assert sorted(order) == [0, 1, 2] and blocks.count(0) == 1
    assert corpus.num_tokens == blocks.num_tokens == sum(shard.num_tokens for shard in shards)
    token = document = 0
    for number in order:
        shard = shards[number]
        assert np.array_equal(corpus.ids[token : token + shard.num_tokens], shard.ids)
        starts = corpus.sentence_offsets[corpus.document_offsets[document : document + shard.num_documents]]
        assert np.array_equal(starts - token, shard.sentence_offsets[shard.document_offsets[:-1]])
        token, document = token + shard.num_tokens, document + shard.num_documents
    assert concatenate([shards[0]]) is shards[0], "one shard is not copied"


def test_only_the_shards_of_a_block_are_opened() -> None:
    class Opened(list):
        asked: list[int] = []

        def __getitem__(self, number: int):
            self.asked.append(number)
            return super().__getitem__(number)

    shards = Opened(SHARDS)
    blocks = CorpusBlocks(shards, seed=1, block_tokens=200)
    shards.asked.clear()
    blocks.load(3, 1)
    assert shards.asked == blocks.shards(3, 1)
