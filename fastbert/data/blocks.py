"""A corpus of any size, a block of its shards at a time: what an epoch goes through, in which order."""

from __future__ import annotations

from collections.abc import Sequence

from fastbert.data.errors import CorpusError
from fastbert.data.shards import TokenShards
from fastbert.data.streams import Stream, generator
from fastbert.data.tokens import TokenizedCorpus, concatenate

# Four shards of fastbert prepare (2**24 tokens and the rest of a document each): planned within two seconds, and tens of thousands
# of documents to draw random segments from.
BLOCK_TOKENS = 80_000_000


class CorpusBlocks:
    """The blocks of each epoch: shards in an order drawn from (seed, epoch), as many together as have at most ``block_tokens``
    tokens, but at least one shard and ``least_documents`` documents.

    ``fixed``: every epoch has the blocks of epoch 0, in another order. Only one block is in memory at a time, and nothing but the
    counts of the shards is read to find it.

    Raises CorpusError where all shards together have fewer than ``least_documents`` documents.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus | Sequence[TokenizedCorpus],
        *,
        seed: int,
        block_tokens: int = BLOCK_TOKENS,
        least_documents: int = 1,
        fixed: bool = False,
    ) -> None:
        self._shards = [corpus] if isinstance(corpus, TokenizedCorpus) else corpus
        if isinstance(corpus, TokenShards):  # whose manifest has the counts, so that no file need be opened
            self._tokens = [shard.tokens for shard in corpus.shards]
            self._documents = [shard.documents for shard in corpus.shards]
        else:
            self._tokens = [shard.num_tokens for shard in self._shards]
            self._documents = [shard.num_documents for shard in self._shards]
        if sum(self._documents) < least_documents:
            raise CorpusError(f"the corpus has {sum(self._documents)} documents, at least {least_documents} are needed")
        self._seed = seed
        self._block_tokens = block_tokens
        self._least_documents = least_documents
        self._fixed = fixed
        self._drawn: tuple[int, list[tuple[int, list[int]]]] | None = None

    @property
    def num_tokens(self) -> int:
        """Of all shards."""
        return sum(self._tokens)

    @property
    def mean_document_tokens(self) -> float:
        """Of all shards; 1 where there are none."""
        return max(1.0, self.num_tokens / max(1, sum(self._documents)))

    def count(self, epoch: int) -> int:
        """Blocks in an epoch."""
        return len(self._blocks(epoch))

    def load(self, epoch: int, block: int) -> TokenizedCorpus:
        """The shards of a block, as one corpus."""
        return concatenate([self._shards[shard] for shard in self.shards(epoch, block)])

    def shards(self, epoch: int, block: int) -> list[int]:
        """The numbers of a block's shards."""
        return self._blocks(epoch)[block][1]

    def place(self, epoch: int, block: int) -> tuple[int, int]:
        """(epoch, block) whose shards these are: of epoch 0 where the blocks are fixed, else the same."""
        return (0 if self._fixed else epoch), self._blocks(epoch)[block][0]

    def _blocks(self, epoch: int) -> list[tuple[int, list[int]]]:
        """The blocks of an epoch in order: the number of each in the epoch that it was made for, and its shards."""
        if self._drawn is None or self._drawn[0] != epoch:
            blocks = list(enumerate(self._group(0 if self._fixed else epoch)))
            if self._fixed and epoch > 0:
                order = generator(self._seed, Stream.SHARDS, epoch).permutation(len(blocks))
                blocks = [blocks[block] for block in order]
            self._drawn = epoch, blocks
        return self._drawn[1]

    def _group(self, epoch: int) -> list[list[int]]:
        blocks: list[list[int]] = []
        tokens = documents = 0
        for shard in generator(self._seed, Stream.SHARDS, epoch).permutation(len(self._tokens)).tolist():
            full = tokens + self._tokens[shard] > self._block_tokens and documents >= self._least_documents
            if not blocks or full:
                blocks.append([])
                tokens = documents = 0
            blocks[-1].append(shard)
            tokens += self._tokens[shard]
            documents += self._documents[shard]
        if documents < self._least_documents and len(blocks) > 1:
            last = blocks.pop()
            blocks[-1] += last
        return blocks
