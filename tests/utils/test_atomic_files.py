"""Check that small files are replaced as a whole, and that reading one never fails."""

import json
import os

import pytest

from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically


def test_texts_are_written_as_they_are_and_values_as_json(tmp_path):
    write_atomically(tmp_path / "a", "text ü\n")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "text ü\n"
    write_atomically(tmp_path / "a", {"x": [1, None]})
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{"x": [1, null]}\n'
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a", {"not JSON": object()})
    assert (tmp_path / "a").read_text() == "old"


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with open(tmp_path / "a", encoding="utf-8") as reader:
        write_atomically(tmp_path / "a", "new")
        assert reader.read() == "old"  # another file has the name now; a write in place would show here
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"3", b"\xff\xfe"])
def test_anything_but_an_object_reads_as_empty(tmp_path, content):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    assert read_json_object(tmp_path / "a") == {}


def test_an_object_is_read(tmp_path):
    (tmp_path / "a").write_text(json.dumps({"x": 1}))
    assert read_json_object(tmp_path / "a") == {"x": 1}
