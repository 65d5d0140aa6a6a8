"""``fastbert prepare``: a corpus of any size to token shards on disk, once, for as many pretraining runs as are wanted.

``reader`` (documents, without duplicates, in batches) -> ``workers`` (``encode``: sentences, WordPiece ids, on all cores) ->
``writer`` (shards, in the order of the corpus) -> ``folder`` (what is complete, and where a run that was stopped goes on).
``fastbert.data.shards`` has the format and reads it.
"""
