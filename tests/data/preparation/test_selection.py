"""Check which documents --filter and --ids keep, and that JSON lines and tables are treated alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.prepared_text import all_documents, run_prepare
from tests.helpers.tables import ROWS, pa, write_json_lines, write_parquet
from tinytrain_dist.data.preparation.selection import Condition, Selection, parse_condition
from tinytrain_dist.errors import ConfigError, DataError

PARSED = {
    "language == en": Condition("language == en", "language", "==", ("en",)),
    "a.b>=0.5": Condition("a.b>=0.5", "a.b", ">=", ("0.5",)),
    "x != 'a == b'": Condition("x != 'a == b'", "x", "!=", ("a == b",)),
    'x in a, "b c",d': Condition('x in a, "b c",d', "x", "in", ("a", "b c", "d")),
    "x is  not null": Condition("x is  not null", "x", "is not null", ()),
    "is is null": Condition("is is null", "is", "is null", ()),
}


@pytest.mark.parametrize("text", PARSED)
def test_a_condition_is_parsed(text: str) -> None:
    assert parse_condition(text) == PARSED[text]


CONDITIONS = ["t == b", "t != b", "t < b", "t in a, c", "n >= 1", "n < 1.5", "n in 1, 2", "f > 0.5", "f == 1", "f != 0"]
CONDITIONS += ["o == true", "o != true", "o in false", "t is null", "n is not null", "d.n > 1", "d is null", "d.t == a"]
VALUES = st.fixed_dictionaries(
    {
        "t": st.none() | st.sampled_from(["a", "b", "c", "é", ""]),
        "n": st.none() | st.integers(-2, 3),
        "f": st.none() | st.sampled_from([-0.0, 0.5, 0.75, 1.0, 1e300]),
        "o": st.none() | st.booleans(),
        "d": st.none()
        | st.fixed_dictionaries({"n": st.none() | st.integers(0, 3), "t": st.none() | st.sampled_from(["a", "b"])}),
    }
)
NESTED = {"n": "int64", "t": "string"}


@given(rows=st.lists(VALUES, max_size=8), texts=st.lists(st.sampled_from(CONDITIONS), min_size=1, max_size=3))
def test_a_condition_keeps_the_same_json_lines_and_rows(rows: list[dict[str, Any]], texts: list[str]) -> None:
    selection = Selection(tuple(map(parse_condition, texts)))
    inner = pa.struct([(name, getattr(pa, kind)()) for name, kind in NESTED.items()])
    schema = pa.schema([("t", pa.string()), ("n", pa.int64()), ("f", pa.float64()), ("o", pa.bool_()), ("d", inner)])
    batch = pa.RecordBatch.from_pylist(rows, schema)
    assert selection.check_schema(schema) == []
    mask = selection.mask("here", batch)
    assert mask is not None
    assert mask.to_pylist() == [selection.keeps("here", row) for row in rows]


def test_only_documents_with_the_given_ids_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids").write_text("7\n 11\n13\nnowhere\n\n17\n")
    for path in (write_json_lines(tmp_path / "a.jsonl"), write_parquet(tmp_path / "a.parquet")):
        settings = {"id_field": "id", "ids": str(tmp_path / "ids"), "max_document_bytes": 5000}
        run_prepare(path, tmp_path / path.suffix, filter=("score > 0.07",), **settings)
        assert all_documents(tmp_path / path.suffix) == sorted(ROWS[n]["text"] for n in (11, 13, 17))
        assert "2 of 5 IDs belong to no document that is kept, such as '7'" in capsys.readouterr().err


def test_the_number_of_kept_documents_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids").write_text("".join(f"{n}\n" for n in range(60)))
    for path in (write_json_lines(tmp_path / "a.jsonl"), write_parquet(tmp_path / "a.parquet")):
        for number, (settings, said) in enumerate(
            [
                ({"filter": ("language == de",)}, "--filter: 40 of 120 documents"),
                ({"id_field": "id", "ids": str(tmp_path / "ids")}, "--ids: 60 of 120 documents"),
                (
                    {"filter": ("language == de",), "id_field": "id", "ids": str(tmp_path / "ids")},
                    "--filter and --ids: 20 of 120 documents",
                ),
            ]
        ):
            run_prepare(path, tmp_path / f"{path.suffix}{number}", max_document_bytes=5000, **settings)
            assert f"{said} (JSON lines or rows) are kept\n" in capsys.readouterr().err


def test_a_field_that_no_document_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [*ROWS, {**ROWS[0], "rare": 1}])
    for condition, remedy in {
        "langauge == en": "no document has the field 'langauge', .*; did you mean 'language'",
        "meta.zzz > 1": "no document has the field 'meta.zzz', .*; the first one has 'text', 'language', 'score',",
        "rare > 1": "keep no document of 1 files; relax them",
    }.items():
        with pytest.raises(DataError, match=remedy):
            run_prepare(path, tmp_path / "out", filter=("score > -1", condition))
    run_prepare(path, tmp_path / "out", filter=("langauge is null",))
    assert "WARNING: no document has the field 'langauge'" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('[1]\n{"text": "<|endoftext|>", "n": 1}\n')
    with pytest.raises(DataError, match="the 1 documents that --filter kept contain only white space"):
        run_prepare(tmp_path / "b.jsonl", tmp_path / "out2", filter=("n == 1",))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"filter": ("score = 3",)}, ConfigError, r"filter: 'score = 3' is no condition; write one of FIELD == VALUE, !="),
    (
        {"filter": ('language == "en',)},
        ConfigError,
        r"'language == \"en' has a quote \" before 'en' that is not",
    ),
    ({"filter": ("score == '",)}, ConfigError, r"has a quote ' before '' that is not closed; close it .* write \"'\"$"),
    ({"filter": ("source in 'a, b', c",)}, ConfigError, r"has a quote ' before 'a' that is not closed; .* a comma"),
    ({"ids": "x"}, ConfigError, "ids: x has no effect without id_field; set both, or neither"),
    ({"id_field": "x"}, ConfigError, "id_field: x has no effect without ids; set both, or neither"),
    ({"id_field": "id", "ids": "missing"}, DataError, r"--ids missing: cannot be read \(No such file"),
    ({"id_field": "score", "ids": "a.jsonl"}, DataError, r"line 1: the ID in the field 'score' is of type float"),
    ({"filter": ("meta == 3",)}, DataError, r"line 1: --filter 'meta == 3': the field is a dict; only text, numbers"),
    (
        {"filter": ("score > high",)},
        DataError,
        r"line 1: --filter 'score > high': the field is a number, and 'high' is",
    ),
    ({"filter": ("meta.ok > 1",)}, DataError, r"line 1: .*the field is true or false; write FIELD == true"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), BAD)
def test_a_selection_that_cannot_work_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json_lines(Path("a.jsonl"))
    with pytest.raises(kind, match=message):
        run_prepare(("a.jsonl",), tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_text_without_fields_cannot_be_filtered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt: is text without fields, so --filter and --ids cannot select in it"):
        run_prepare(tmp_path / "a.txt", tmp_path / "out", filter=("score > 1",))
