"""Fine-tuning and what comes after it: one module per family of tasks.

labelled data (:mod:`fastbert.data`) -> ``examples`` -> a ``task`` (features, scores, predictions) -> ``trainer`` -> a folder that
``predictor`` and transformers load.
"""
