"""Text to packed pretraining batches, one module a step.

``corpus`` (documents of paragraphs) -> ``sentences`` -> ``tokenizer`` (WordPiece) -> ``tokens`` (the corpus as numpy arrays)
-> ``pairs`` (sentence pairs for next sentence prediction) -> ``masking`` (masked language model) -> ``batches``.
Everything random is drawn from (seed, epoch, batch) and nothing else, so a run can be repeated and resumed.
"""
