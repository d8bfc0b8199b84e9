"""Check sources on a server: S3 and HTTP, connections that break, files that change, and secrets that stay secret."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.prepared_text import all_documents, content, run_prepare, story
from tests.helpers.s3_server import S3Server, breaking_proxy, s3_server
from tests.helpers.tables import ROWS, save_with_datasets, write_json_lines, write_parquet
from tinytrain_dist.data.preparation import remote_files
from tinytrain_dist.data.preparation.remote_errors import error_of, may_pass, shown
from tinytrain_dist.data.preparation.sources import find_sources
from tinytrain_dist.errors import DataError

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = pytest.mark.multiprocess

TOKEN_FILES = ["train.npy", "train.documents.npy", "val.npy", "val.documents.npy", "tokenizer.json"]
SECRET = "the-secret-key"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        yield started


@pytest.fixture(autouse=True)
def _access(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Credentials and the address of the server, without those of this machine, and no waiting."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(remote_files, "RETRY_SECONDS", (0.0,) * 6)
    monkeypatch.setattr(remote_files, "FIRST_RETRY_SECONDS", (0.0,) * 6)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def tokens(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name in TOKEN_FILES}


def long_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": story(seed, 300), "n": seed} for seed in range(count)]


def test_every_kind_of_source_on_s3_gives_the_tokens_of_the_same_file_here(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    lines, table = write_json_lines(tmp_path / "a.jsonl"), write_parquet(tmp_path / "a.parquet")
    run_prepare(lines, tmp_path / "here", max_document_bytes=5000)
    saved = save_with_datasets(tmp_path / "set")
    urls = [
        server.store("kinds/lines/a.jsonl.gz", gzip.compress(lines.read_bytes())),
        server.store("kinds/table/a.parquet", table.read_bytes()),
        server.store_folder(saved, "kinds/set"),
        server.store("kinds/glob/a-1.parquet", table.read_bytes()).replace("a-1", "a-*"),
    ]
    server.store("kinds/table/notes.pdf", b"%PDF-1.7")  # a folder gives only files with known endings
    for number, url in enumerate([*urls, "s3://bucket/kinds/table"]):
        out = tmp_path / str(number)
        meta = run_prepare((url,), out, max_document_bytes=5000)
        assert tokens(out) == tokens(tmp_path / "here"), url
        assert meta["sources"][0]["path"] == url
        assert SECRET.encode() not in b"".join(content(out).values())


def test_reading_goes_on_after_connections_break(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = long_rows(400)
    lines, table = write_json_lines(tmp_path / "b.jsonl", rows), write_parquet(tmp_path / "b.parquet", rows, 100)
    run_prepare(lines, tmp_path / "here", max_document_bytes=5000)
    run_with_breaks = functools.partial(_prepare_with_breaks, server, tmp_path, monkeypatch)
    run_with_breaks(lines, 120_000, None)  # every answer, so that smaller ranges are asked for
    for name in ("_MIN_RANGE_BYTES", "_FIRST_RANGE_BYTES", "_MAX_RANGE_BYTES"):
        monkeypatch.setattr(remote_files, name, 1 << 15)
    size = lines.stat().st_size
    message = "a file is read twice, and only what is missing is read again"
    assert run_with_breaks(lines, 20_000, 6) < 2.5 * size, message
    assert run_with_breaks(table, 20_000, 6) < 2.5 * size, message


def _prepare_with_breaks(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path, most_bytes: int, breaks: int | None
) -> int:
    """Prepare a file over connections that break; return how many bytes were sent."""
    url = server.store(f"breaks/{path.name}", path.read_bytes())
    with breaking_proxy(server.port, most_bytes, breaks) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        remote_files.file_system(url)[0].clear_instance_cache()
        run_prepare((url,), tmp_path / "broken", max_document_bytes=5000, overwrite=True)
        assert tokens(tmp_path / "broken") == tokens(tmp_path / "here")
        assert proxy.broken >= 3
        return proxy.passed_bytes


def test_a_network_that_stays_away_keeps_the_work_that_was_committed(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote_files, "_MAX_RANGE_BYTES", 1 << 17)
    lines = write_json_lines(tmp_path / "c.jsonl", long_rows(1500))
    url = server.store("away/c.jsonl", lines.read_bytes())
    settings = {"max_document_bytes": 5000, "shard_tokens": 100_000}
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    run_prepare((url,), tmp_path / "whole", **settings)
    with breaking_proxy(server.port, most_bytes=1 << 60) as proxy:
        proxy.most_in_all = lines.stat().st_size * 17 // 10  # in the second reading
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        remote_files.file_system(url)[0].clear_instance_cache()
        with pytest.raises(DataError, match=r"s3://bucket/away/c\.jsonl: .* after 7 tries"):
            run_prepare((url,), tmp_path / "out", **settings)
        assert "the work so far is kept in" in capsys.readouterr().err
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    remote_files.file_system(url)[0].clear_instance_cache()
    run_prepare((url,), tmp_path / "out", **settings)
    assert "shards of train" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_file_that_changes_between_two_connections_is_an_error(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_json_lines(tmp_path / "d.jsonl", long_rows(400)).read_bytes()
    url = server.store("changes/d.jsonl", data)
    with breaking_proxy(server.port, most_bytes=120_000, breaks=1) as proxy:
        proxy.on_break = lambda: server.store("changes/d.jsonl", data.replace(b"wolf", b"lamb")) and None
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(DataError, match=r"d\.jsonl: changed while it was read \(before: .*\); run again when noth"):
            run_prepare((url,), tmp_path / "out")
    assert not (tmp_path / "out").exists()


ABSENT = {
    "s3://": r"s3://: names no bucket; give s3://BUCKET/PATH",
    "s3://bucket/nowhere.parquet": r"s3://bucket/nowhere\.parquet: there is no such file or folder",
    "s3://no-such-bucket/a.parquet": r"there is no such file or folder",
    "s3://bucket/nowhere/*.parquet": r"no file matches",
    "s3://no-such-bucket/*.parquet": r"s3://no-such-bucket/\*\.parquet: there is no bucket 'no-such-bucket'",
    "http://user:{secret}@127.0.0.1:{port}/a.txt?X-Amz-Signature={secret}": r"http://127\.0\.0\.1:\d+/a\.txt: there is",
}


@pytest.mark.parametrize("url", ABSENT)
def test_a_url_without_a_file_is_an_error(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    with pytest.raises(DataError, match=ABSENT[url]) as caught:
        run_prepare((url.format(secret=SECRET, port=server.port),), tmp_path / "out")
    assert SECRET not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_credentials_and_a_server_that_refuses_are_errors_that_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with breaking_proxy(9, most_bytes=0) as proxy:
        refused = proxy.endpoint
    monkeypatch.setenv("AWS_ENDPOINT_URL", refused)
    with pytest.raises(DataError, match=r"cannot be reached after 7 tries \(.*; check the URL and AWS_E") as caught:
        run_prepare(("s3://bucket/a.txt",), tmp_path / "out")
    assert SECRET not in str(caught.value)
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:\d+/a: the server cannot be reached after 7 tries"):
        run_prepare((f"{refused}/a?X-Amz-Signature={SECRET}",), tmp_path / "out")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    remote_files.file_system("s3://b")[0].clear_instance_cache()
    with pytest.raises(
        DataError, match="no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
    ):
        run_prepare(("s3://bucket/a.txt",), tmp_path / "out")
    for variable in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):  # the latter counts if both are set
        monkeypatch.setenv(variable, f"value-of-{variable}")
        remote_files.file_system("s3://b")[0].clear_instance_cache()
        with pytest.raises(DataError, match=rf"a\.txt: {variable} is 'value-of-{variable}', but the AWS con"):
            run_prepare(("s3://bucket/a.txt",), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_endpoint_without_a_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    assert str(error_of("s3://b/a", ValueError("Invalid endpoint"))) == (
        "AWS_ENDPOINT_URL: 127.0.0.1:9000 has no protocol; set it to http://127.0.0.1:9000 or https://127.0.0.1:9000"
    )
    assert str(error_of("gs://b/a", ValueError("other"))).startswith("gs://b/a: cannot be read")


def test_a_server_that_refuses_to_connect_at_once_is_named(tmp_path: Path) -> None:
    with breaking_proxy(9, most_bytes=0) as proxy:
        address = proxy.endpoint.partition("://")[2]
    with pytest.raises(DataError, match=f"ftp://{address}/a.txt: the server cannot be reached"):
        run_prepare((f"ftp://{address}/a.txt",), tmp_path / "out")


def test_access_that_is_refused_is_not_tried_again() -> None:
    refused = PermissionError("https://host/a?X-Amz-Signature=" + SECRET)
    assert not may_pass(refused)
    assert str(error_of(f"s3://k:{SECRET}@b/a", refused)).startswith(
        "s3://b/a: access was refused; check the rights, or"
    )
    assert may_pass(ConnectionResetError())
    other = str(error_of("https://h/a", OSError(5, f"https://h/a?{SECRET}")))
    assert other == "https://h/a: cannot be read (OSError); check the URL and the network, and run again"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:pass@host:1/a/b.txt?sig=x#y", "https://host:1/a/b.txt"),
        ("s3://bucket/a?b", "s3://bucket/a"),
        ("/a/b?c", "/a/b?c"),
    ],
)
def test_a_url_is_shown_without_secrets(url: str, expected: str) -> None:
    assert shown(url) == expected


def test_a_web_server_without_ranges_is_read_from_the_start_again(tmp_path: Path) -> None:
    """The web server of Python ignores ranges."""
    (tmp_path / "site").mkdir()
    lines = write_json_lines(tmp_path / "site" / "a.jsonl", long_rows(400))
    write_parquet(tmp_path / "site" / "a.parquet")
    run_prepare(lines, tmp_path / "here", max_document_bytes=5000)
    handler = functools.partial(_QuietHandler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            with breaking_proxy(site.server_port, most_bytes=300_000, breaks=2) as proxy:
                run_prepare(
                    (f"{proxy.endpoint}/a.jsonl?X-Amz-Signature={SECRET}",), tmp_path / "out", max_document_bytes=5000
                )
                assert proxy.broken == 2
                assert tokens(tmp_path / "out") == tokens(tmp_path / "here")
                assert SECRET not in (tmp_path / "out" / "meta.json").read_text()
                run_prepare((f"{proxy.endpoint}/a.parquet",), tmp_path / "table", max_document_bytes=5000)
                assert all_documents(tmp_path / "table") == sorted(row["text"] for row in ROWS)
            _check_folders(f"http://127.0.0.1:{site.server_port}", tmp_path / "site")
        finally:
            site.shutdown()
            thread.join()
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["sources"][0]["bytes"] == lines.stat().st_size


def _check_folders(url: str, site: Path) -> None:
    """Check what is found in the folders of a web server, which it lists on pages."""
    (site / "texts" / "below").mkdir(parents=True)
    for name in ("a.txt", "a b.txt", ".hidden.txt", "c.pdf", "below/d.txt"):
        (site / "texts" / name).write_text("a text")
    for folder in ("texts", "texts/"):
        (source,) = find_sources([f"{url}/{folder}"], print)
        assert source.files == (f"{url}/texts/a%20b.txt", f"{url}/texts/a.txt")
    (site / "none").mkdir()
    with pytest.raises(DataError, match=r"/none/: no file matches, or the folder contains no \.txt"):
        find_sources([f"{url}/none/"], print)
    (site / "page.html").write_text("<html>a page is a file</html>")
    assert find_sources([f"{url}/page.html"], print)[0].files == (f"{url}/page.html",)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass
