"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tinytrain_dist.distributed import fake_backend
from tinytrain_dist.distributed.context import DistributedContext, shutdown


@pytest.fixture
def world() -> Iterator[DistributedContext]:
    """Rank 0 of 2 nodes x 2 devices that are not there."""
    yield fake_backend.fake_context(4, 2)
    shutdown()
