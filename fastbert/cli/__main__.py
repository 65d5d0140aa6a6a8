"""``python -m fastbert.cli`` is ``fastbert``."""

from .main import main

main()
