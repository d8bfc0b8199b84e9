"""The program that starts and watches the ranks of this machine: `torchrun`, with saving on stop signals.

    python -m tinytrain_dist.agent --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml

It takes torchrun's own options. See `tinytrain_dist/launch/elastic_agent.py` for what it adds to torchrun.
"""

from __future__ import annotations

import sys

from tinytrain_dist.launch.elastic_agent import main
from tinytrain_dist.utils.output import keep_output_from_failing

if __name__ == "__main__":
    keep_output_from_failing()
    sys.exit(main(sys.argv[1:]))
