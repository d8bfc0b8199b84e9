"""Check what is read from torchrun's command line."""

from __future__ import annotations

import pytest

from tinytrain_dist.launch.torchrun_options import address_arguments, is_single_node, parse_torchrun_options


@pytest.mark.parametrize(
    ("args", "single_node", "adds_address"),
    [
        (["--standalone", "--nproc-per-node", "2", "train.py"], True, True),
        (["--nnodes=1", "train.py", "--standalone"], True, True),
        (["--nnodes", "1:2", "--rdzv-endpoint", "a:1", "train.py"], False, False),
        (["--nnodes=2", "train.py"], False, False),
        (["--standalone", "--local-addr", "10.0.0.7", "train.py"], True, False),
    ],
)
def test_one_machine_is_known_by_its_loopback_address(args: list[str], single_node: bool, adds_address: bool) -> None:
    options = parse_torchrun_options(args)
    assert is_single_node(options) == single_node
    assert address_arguments(options) == (["--local-addr=127.0.0.1"] if adds_address else [])
