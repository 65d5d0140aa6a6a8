"""``fastbert finetune``: labelled data and a checkpoint in; a model, scores, pictures and a card out.

``settings`` -> ``prepared`` (read, checked, tokenized) -> ``modes`` (what trains; ``head_features``, ``head_model``) -> ``trainer``
-> ``run`` -> ``folder``, ``report``; ``adapt`` goes on with pretraining before.
"""
