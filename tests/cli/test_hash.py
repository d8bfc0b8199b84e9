"""`tinytrain hash`: equal bits have one digest, however they are divided into files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.tools import Cli, flip_bit, newest, weights_file
from tests.helpers.training import in_older_format
from tinytrain_dist.checkpoint import state_digests as digests
from tinytrain_dist.checkpoint.sharded_io import write_checkpoint
from tinytrain_dist.checkpoint.state_collection import collect_shards


def test_the_hash_does_not_depend_on_files(tinytrain: Cli, folder: Path) -> None:
    files = [len(list(newest(folder / name).glob("*.safetensors"))) for name in ("one", "split")]
    assert files[0] < files[1], "the second run must be cut into more files, or this proves nothing"
    one, split, other = (tinytrain("hash", folder / name) for name in ("one", "split", "other"))
    assert one[:2] == split[:2]
    assert [line.split()[0] for line in one[1].splitlines()] == ["weights", "optimizer"]
    for mine, theirs in zip(one[1].splitlines(), other[1].splitlines(), strict=True):
        assert mine != theirs
    assert tinytrain("hash", newest(folder / "one"))[1] == one[1]
    assert tinytrain("hash", "--recompute", folder / "one") == one


def test_recomputing_the_hash_does_not_trust_the_manifest(tinytrain: Cli, run: Path) -> None:
    before = tinytrain("hash", run)
    flip_bit(weights_file(newest(run)))
    assert tinytrain("hash", run) == before
    code, out, err = tinytrain("hash", "--recompute", run)
    assert code == 1
    assert out.splitlines()[0] != before[1].splitlines()[0]
    assert out.splitlines()[1] == before[1].splitlines()[1]
    assert "DAMAGED" in err


@pytest.mark.parametrize("number", [1, 2])
def test_an_older_manifest_is_no_difference(
    tinytrain: Cli, folder: Path, run: Path, tmp_path: Path, number: int
) -> None:
    in_older_format(newest(run), number)
    for options in ([], ["--recompute"]):
        assert tinytrain("hash", *options, run)[:2] == tinytrain("hash", folder / "one")[:2]
    for pair in ((run, folder / "one"), (folder / "split", run), (newest(run), newest(run))):
        code, out, _ = tinytrain("compare", *pair)
        assert (code, out.count("in every bit, ")) == (0, 2), out
    assert tinytrain("compare", run, folder / "other")[0] == 1
    assert tinytrain("export", run, run / "out", "--no-check")[0] == 0
    assert tinytrain("verify", run)[0] == 0
    flip_bit(weights_file(newest(run)))
    for command in (["hash", run], ["compare", run, newest(folder / "one")]):
        code, _, err = tinytrain(*command)
        assert code == 2
        assert "is not what manifest.json says" in err
    assert "is not what was saved" in tinytrain("export", run, run / "again", "--no-check")[2]
    assert "has sha256" in tinytrain("verify", run)[1]


def test_the_hash_includes_numbers_of_the_optimizer(tmp_path: Path) -> None:
    def digest(count: int) -> str:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[model.weight]["count"] = count
        pieces, values = collect_shards(model, optimizer)
        write_checkpoint(tmp_path / str(count), pieces, {"step": count, "optimizer": values})
        return digests.state_digest(digests.tensor_entries(tmp_path / str(count))["optimizer"])

    assert digest(3) != digest(4)
