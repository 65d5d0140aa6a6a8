"""Text to packed pretraining batches, one module a step, and labelled data for fine-tuning.

``corpus`` (documents of paragraphs) -> ``sentences`` -> ``tokenizer`` (WordPiece) -> ``tokens`` (the corpus as numpy arrays), kept
on disk as ``shards`` -> ``blocks`` (a few shards at a time) -> ``pairs`` (sentence pairs for next sentence prediction) or
``passages`` (the masked language model alone), both ``sequences`` -> ``packing`` (which of them make a batch) -> ``masking`` ->
``batches`` -> ``loader`` (the batches of a step, of a process, by workers). Everything random is drawn from the seed and the place
(epoch, block, batch) and nothing else (``streams``), so a run can be repeated, divided and resumed. ``collator`` packs the batches
of transformers' Trainer.

Labelled data: ``splits`` finds the ``sources`` of training, dev and test data; ``tables``, ``conll`` and ``squad`` read them,
checked row by row. Everything that is wrong with what was read is a DataError (``errors``) that names the place.
"""
