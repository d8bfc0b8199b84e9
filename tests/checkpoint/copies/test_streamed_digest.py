"""The digest that is computed while a file is copied finds the same damage as `tinytrain verify`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.copies import flip_byte, write_checkpoint_folder
from tests.helpers.training import in_older_format
from tinytrain_dist.checkpoint.copies.streamed_digest import StreamedDigest
from tinytrain_dist.checkpoint.manifest import read_manifest
from tinytrain_dist.checkpoint.verify import find_damage


def problems_of(folder: Path, block_bytes: int) -> dict[str, str]:
    manifest = read_manifest(folder)
    found = {}
    for name in manifest.files:
        digest = StreamedDigest(name, manifest)
        data = (folder / name).read_bytes()
        for start in range(0, len(data), block_bytes):
            digest.update(data[start : start + block_bytes])
        found[name] = digest.problem()
    return found


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_changed_byte_is_found_in_every_format(tmp_path: Path, number: int) -> None:
    folder = write_checkpoint_folder(tmp_path, 3)
    if number < 3:
        in_older_format(folder, number)
    assert set(problems_of(folder, 7).values()) == set(problems_of(folder, 1 << 20).values()) == {""}
    model = sorted(folder.glob("model-*"))[0]
    whole = model.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 1):  # header and tensors
        model.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        bad = {name for name, problem in problems_of(folder, 64).items() if problem}
        assert bad == {model.name}
        assert find_damage(folder)
    for data in (whole[:-1], whole + b"x"):
        model.write_bytes(data)
        assert "bytes" in problems_of(folder, 64)[model.name]
    model.write_bytes(whole)
    flip_byte(folder / "trainer_state.json")
    assert "trainer_state.json: it differs" in problems_of(folder, 64)["trainer_state.json"]
