"""Write the same rows as JSON lines, Parquet, Arrow and a folder of `datasets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.prepared_text import story

pa = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS: list[dict[str, Any]] = [
    {
        "text": story(n),
        "language": "en" if n % 3 else "de",
        "score": n / 120,
        "id": n,
        "meta": {"n": n, "ok": n % 2 == 0},
    }
    for n in range(120)
]


def write_json_lines(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS, row_group_size: int = 17) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def write_arrow(path: Path, rows: list[dict[str, Any]] = ROWS, stream: bool = False) -> Path:
    table = pa.Table.from_pylist(rows)
    with (ipc.new_stream if stream else ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=13)
    return path


def save_with_datasets(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=3)
    return path
