"""What BERT is fine-tuned for: one module per family of tasks, which fine-tuning and prediction know by its ``task`` alone.

labelled data (:mod:`fastbert.data`) -> ``examples`` -> ``task``: features, scores, predictions (``sequence``, ``tokens``,
``questions``, ``choices``; ``registry`` has their names) -> ``model``, ``outputs`` -> ``predictor``.
"""
