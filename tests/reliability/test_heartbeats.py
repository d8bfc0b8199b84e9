"""Check what is read from heartbeats: the newest one of each rank, and the rank that the others wait for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinytrain_dist.reliability.heartbeats import describe_progress, describe_waiting, read_heartbeats, write_heartbeat


def heartbeat(rank: int, step: int = 5, phase: str = "reduction", seen: float = 100.0) -> dict[str, Any]:
    who = {"rank": rank, "host": f"node{rank}", "pid": 100 + rank, "world_size": 3}
    return {**who, "step": step, "phase": phase, "seconds": 0.5, "seen": seen}


@pytest.mark.parametrize(
    ("heartbeats", "expected"),
    [
        ([heartbeat(0), heartbeat(1, phase="data"), heartbeat(2)], "all wait for rank 1 on node1 (data after step 5)"),
        (
            [heartbeat(0), heartbeat(1), heartbeat(2, step=4, phase="optimizer")],
            "all wait for rank 2 on node2 (optimizer",
        ),
        (
            [heartbeat(0, 6, "data"), heartbeat(1, 6, "reading"), heartbeat(2, 6, "checkpoint")],
            "all wait for rank 1 on node1 (reading",
        ),
        (
            [heartbeat(0), heartbeat(1, seen=9.0), heartbeat(2)],
            "all wait for rank 1 on node1 (reduction after step 5): no heartbeat since",
        ),
        ([heartbeat(0), heartbeat(2)], "rank(s) 1 of 3 never wrote a heartbeat"),
        ([heartbeat(0), heartbeat(1), heartbeat(2)], "all 3 rank(s) are in reduction after step 5"),
    ],
)
def test_who_is_waited_for(heartbeats: list[dict[str, Any]], expected: str) -> None:
    assert expected in describe_waiting(heartbeats, 3, since=50.0)


def progressing(*ranks: tuple[int, float, float]) -> str:
    """Describe ranks, each given as (step, age of its heartbeat, seconds without progress before it)."""
    beats = [
        {**heartbeat(rank, step, seen=100.0 - age), "seconds": seconds}
        for rank, (step, age, seconds) in enumerate(ranks)
    ]
    return describe_progress(beats, len(ranks), since=40.0)


def test_a_rank_of_a_healthy_run_is_not_named_because_its_heartbeat_is_some_seconds_older() -> None:
    nobody = "no rank has kept the others waiting"
    assert progressing((51, 0.1, 0.0), (50, 0.9, 0.0), (12, 9.9, 0.0)) == nobody
    assert progressing((51, 0.0, 0.4), (50, 0.0, 0.4), (50, 0.0, 0.4)) == nobody, "they take turns"
    assert progressing((51, 0.0, 9.0), (50, 9.5, 3.0), (51, 0.0, 9.0)) == nobody, "it may have moved on since"
    assert progressing((5, 0.0, 0.0), (5, 9.0, 0.0)).startswith("all 2 rank(s) are in reduction")


def test_a_rank_that_was_still_behind_when_others_had_waited_is_named() -> None:
    assert progressing((51, 0.0, 9.0), (50, 1.0, 8.0), (51, 5.0, 4.0)).startswith("all wait for rank 1 on node1")
    assert progressing((51, 9.0, 0.0), (50, 1.0, 30.0), (51, 9.0, 0.0)).startswith("all wait for rank 1 on node1")
    assert "no heartbeat since" in progressing((51, 0.0, 0.0), (50, 70.0, 0.0)), "whatever the others do"
    assert "never wrote" in describe_progress([heartbeat(0), heartbeat(1, 4)], 3, since=40.0)


def test_incomplete_heartbeats_and_those_of_an_earlier_larger_run_are_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "heartbeat"
    folder.mkdir(parents=True)
    for rank in (0, 1, 7):
        (folder / f"rank-{rank:05d}.json").write_text(json.dumps(heartbeat(rank)))
    (folder / "rank-00002.json").write_text('{"rank": 2, "pha')
    assert [found["rank"] for found in read_heartbeats(tmp_path)] == [0, 1]
    assert read_heartbeats(tmp_path / "gone") == []


def test_a_heartbeat_that_was_written_is_read_with_the_time_of_its_file(tmp_path: Path) -> None:
    written = heartbeat(1)
    del written["seen"]
    write_heartbeat(tmp_path, written)
    (found,) = read_heartbeats(tmp_path)
    path = tmp_path / "logs" / "heartbeat" / "rank-00001.json"
    assert found == {**written, "seen": path.stat().st_mtime}


def test_many_ranks_are_counted_and_not_named() -> None:
    behind = [{**heartbeat(rank, step=4), "world_size": 9} for rank in range(7)]
    ahead = [{**heartbeat(rank, step=5), "world_size": 9} for rank in (7, 8)]
    text = describe_waiting([*behind, *ahead], 9, since=50.0)
    assert text.count("after step 4") == 4
    assert text.endswith(" and 3 more")


def test_a_full_disk_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    write_heartbeat(tmp_path, heartbeat(0))
