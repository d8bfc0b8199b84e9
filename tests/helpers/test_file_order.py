"""Check that the processes of pytest-xdist begin with the files that take longest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.conftest import pytest_collection_modifyitems


def item(file: str, *markers: str) -> Any:
    return SimpleNamespace(path=Path(file), get_closest_marker=lambda name: name if name in markers else None)


def test_the_longest_files_come_first_and_stay_whole() -> None:
    collected = [item("unit"), item("a", "multiprocess"), item("a"), item("b"), item("b", "slurm", "slow"), item("c")]
    collected += [item("c"), item("slow", "slow"), *(item("d", "multiprocess") for _ in range(3))]
    in_one_process, sorted_items = list(collected), list(collected)
    pytest_collection_modifyitems(SimpleNamespace(), in_one_process)  # type: ignore[arg-type]
    assert in_one_process == collected
    pytest_collection_modifyitems(SimpleNamespace(workerinput={}), sorted_items)  # type: ignore[arg-type]
    assert "".join(str(each.path)[0] for each in sorted_items) == "bb" + "ddd" + "aa" + "s" + "cc" + "u"
    assert sorted_items[0] is collected[3], "the tests of a file keep their order"
