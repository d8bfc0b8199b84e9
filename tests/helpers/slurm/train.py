"""Train like tinytrain_dist/train.py, but slow down or fail at a given step; tests put it in a copy of the checkout.

BRAKE="STEP:SECONDS" makes each step from STEP on take that much longer in the first attempt, so that a test can send
signals in time. CRASH="STEP" raises an exception on rank 0 at that step of every attempt. What is trained is unchanged.
"""

import os
import sys
import time

from tinytrain_dist.reliability import stop_requests

stop_requests.install_signal_handlers()

from tinytrain_dist.launch.rank_program import main  # noqa: E402
from tinytrain_dist.training.trainer import Trainer  # noqa: E402

original = Trainer.run_step
first, seconds = (os.environ.get("BRAKE") or "0:0").split(":")
crash = int(os.environ.get("CRASH") or -1)


def train_step(self, *args):
    if self.step >= crash >= 0 and self.context.is_main:
        raise RuntimeError(f"bomb at step {self.step}")
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and self.step >= int(first):
        time.sleep(float(seconds))
    return original(self, *args)


Trainer.run_step = train_step

if __name__ == "__main__":
    main(sys.argv[1:])
