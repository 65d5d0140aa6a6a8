"""``fastbert pretrain`` under torchrun with an accident: ``python -m tests.train.torchrun_worker ACCIDENT RANK STEP pretrain ...``.

In the first life of process RANK, step number STEP begins with the accident: ``raises``, ``kill`` (SIGKILL) or ``stop`` (SIGTERM).
"""

from __future__ import annotations

import os
import signal
import sys

from fastbert.cli.main import app
from fastbert.runs.errors import TrainingError
from fastbert.train.loop import TrainingLoop


def main(accident: str, rank: str, step: str) -> None:
    take_step = TrainingLoop._take_step

    def happens(loop, batches):
        if loop.state.step + 1 == int(step) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if accident == "raises":
                raise TrainingError("an accident")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[accident])
        take_step(loop, batches)

    if os.environ["RANK"] == rank:
        TrainingLoop._take_step = happens
    app()


if __name__ == "__main__":
    accident, rank, step = sys.argv[1:4]
    del sys.argv[1:4]
    main(accident, rank, step)
