"""Check the record of what a run ran on: versions, ranks, and no variable that may hold a secret."""

import json

import numpy as np
import torch

from tinytrain_dist import __version__
from tinytrain_dist.metrics.environment import environment_record, library_versions


def test_the_record_has_versions_ranks_and_allowed_variables_only(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    record = environment_record([("node1", "cpu", 7), ("node2", "cpu", 8)])
    assert record["tinytrain_dist"] == __version__
    assert record["ranks"][1] == {"host": "node2", "device": "cpu", "pid": 8}
    assert record["variables"]["OMP_NUM_THREADS"] == "3"
    assert "a-secret" not in json.dumps(record)


def test_versions_are_those_of_the_libraries_that_compute():
    versions = library_versions()
    assert (versions["torch"], versions["numpy"]) == (torch.__version__, np.__version__)
    assert ("NCCL" in versions) == torch.cuda.is_available()
