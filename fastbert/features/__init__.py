"""Features of a BERT as it is: texts in, one file of embeddings out, for as many texts as there are.

``texts`` (input) -> ``embedder`` (packed batches, ``pooling``) -> ``parts`` (finished chunks on disk, by ``workers``) -> ``files``.
"""
