"""Start and supervise the ranks of this machine: `torchrun`, extended so that stop signals make the run save.

    python -m tinytrain_dist.agent --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml

It takes the options of torchrun. `tinytrain_dist/launch/elastic_agent.py` describes what it adds.
"""

from __future__ import annotations

import sys

from tinytrain_dist.launch.elastic_agent import main
from tinytrain_dist.utils.lost_output import keep_output_from_failing

if __name__ == "__main__":
    keep_output_from_failing()
    sys.exit(main(sys.argv[1:]))
