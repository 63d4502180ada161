"""Run the main job and hold it after its second unit until it is killed or asked to stop: ``held.py ...``.

A test that interrupts a run must meet it in the middle of its work, however fast the machine is. A job that SLURM
has put into the queue again is not held any more.
"""

import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.cli import distill_main  # noqa: E402
from engine.cluster import StopWatch  # noqa: E402
from engine.pool import Pool  # noqa: E402

publish, check = Pool.publish, StopWatch.check
published = []


def counting_publish(self, unit, images):
    publish(self, unit, images)
    published.append(unit.index)


def holding_check(self):
    while len(published) >= 2 and "SLURM_RESTART_COUNT" not in os.environ and not self.requested():
        time.sleep(0.02)
    check(self)


if __name__ == "__main__":
    Pool.publish, StopWatch.check = counting_publish, holding_check
    sys.exit(distill_main())
