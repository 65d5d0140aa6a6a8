"""GLUE (Wang et al. 2019): its nine tasks, from the folder as published to scores, a report and files for its server.

``tasks`` (the table of what they differ in) -> ``data`` -> :mod:`fastbert.tasks.sequence` -> ``run`` -> ``report``, ``submission``.
"""
