"""``fastbert glue`` (Wang et al. 2019): nine tasks, from the folder as published to scores, a report and files for GLUE's server.

What the tasks differ in stands in :mod:`fastbert.tasks.glue_tasks`, how their files are read in :mod:`fastbert.tasks.glue_data`;
``run`` fine-tunes -> ``document`` -> ``report``, ``picture`` (beside ``published`` scores), ``submission``.
"""
