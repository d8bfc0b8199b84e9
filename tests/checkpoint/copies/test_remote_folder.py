"""Large files on a real S3 server: their parts, checksums, interrupted uploads; and errors without secrets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.s3_server import S3Server, s3_server
from tinytrain_dist.checkpoint.copies import remote_folder
from tinytrain_dist.checkpoint.copies.remote_folder import CopyError, RemoteFolder

pytest.importorskip("moto")
pytestmark = pytest.mark.multiprocess

PART = 5 << 20  # the smallest that S3 takes


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        yield started


@pytest.fixture
def remote(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteFolder]:
    s3 = pytest.importorskip("s3fs").S3FileSystem
    for name, value in {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "the-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_ENDPOINT_URL": server.endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(remote_folder, "PART_BYTES", PART)
    monkeypatch.setattr(remote_folder, "RETRY_SECONDS", ())
    s3.clear_instance_cache()
    yield RemoteFolder("s3://bucket/large")
    s3.clear_instance_cache()


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize("size", [0, 10, PART - 1, PART, 2 * PART + 10])
def test_what_s3_says_of_a_file_is_compared_with_what_was_sent(
    remote: RemoteFolder, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path, name = tmp_path / "x", f"sizes/{size}"
    path.write_bytes(os.urandom(size))
    parts: list[int] = []
    sent = remote.send(path, name, lambda part: parts.append(len(part)), nothing)
    assert sum(parts) == size
    assert server.get(f"large/{name}") == path.read_bytes()

    def no_range(*_: Any) -> bytes:
        raise AssertionError("the checksum of the store is enough")

    monkeypatch.setattr(RemoteFolder, "_range", no_range)
    assert remote.matches(name, sent, path)
    monkeypatch.undo()
    if size:
        remote.write(name, bytes(size))  # other bytes of the same size
        assert not remote.matches(name, sent, path)


def test_an_upload_that_ends_early_leaves_nothing(remote: RemoteFolder, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(2 * PART + 10))
    system: Any = remote._system

    def damaged() -> None:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        remote.send(path, "early/a", nothing, damaged)
    assert not any(name.startswith("early/") for name in remote.list())
    assert system.list_multipart_uploads("bucket") == []

    for key in ("large/early/a", "large/early/other", "elsewhere/early/a"):  # as processes leave them that are killed
        system.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    remote.abort_uploads(lambda name: name == "early/a")
    left = sorted(upload["Key"] for upload in system.list_multipart_uploads("bucket"))
    assert left == ["elsewhere/early/a", "large/early/other"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://nobucket/x", "there is no such file or folder"),
        ("s3://bucket:the-password@nowhere/x", "."),
        ("nosuch://user:the-password@host/x", "protocol 'nosuch' is not known"),
        ("gs://bucket/x", "pip install 'gcsfs'"),
        ("/dev/null/x", "cannot be written"),
    ],
)
def test_errors_are_sentences_without_secrets(remote: RemoteFolder, place: str, message: str) -> None:
    with pytest.raises(CopyError, match=message) as caught:
        RemoteFolder(place).write("a", b"x")
    assert "the-password" not in str(caught.value)
    assert "the-secret-key" not in str(caught.value)
