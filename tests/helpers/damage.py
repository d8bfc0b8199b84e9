"""Mutations of real files, as a crash, a disk or another program leaves them. Must not know who reads the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

DEEP = b"[" * 100_000
WHOLE_FILES = (
    b"",
    b"\0" * 200,
    b"null",
    b"3",
    b'"text"',
    b"[1]",
    b"{}",
    DEEP,
    b'{"a":' * 100_000,
    b"[" * 900 + b"]" * 900,
    b"\xff\xfe{\0}\0",
    b"\x80abc",
    b"1" * 5000,
)
# as text, because Python's json would not write all of them
VALUES = (
    *("null", "true", "-1", "0", "3", "1.5", "1e999", "NaN", "1" + "0" * 400, "9" * 25, '""', '"x"', '"../../x"'),
    *("[]", "{}", "[[1]]", '{"a": 1}', r'"\ud800"', r'"a\u0000b"', "[null]", "[-1, 1.5]"),
    *("[" * 150 + "]" * 150, "[" * 100_000),
)
MARK = "a mark that is replaced by a value as text"


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with bytes flipped, removed or inserted, or with other content altogether."""
    place = draw(st.integers(0, max(0, len(data) - 1)))
    match draw(st.sampled_from(["flip", "cut", "insert", "remove", "replace", "whole", "bracket"])):
        case "flip":
            return data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
        case "cut":
            return data[:place]
        case "insert":
            return data[:place] + draw(st.binary(min_size=1, max_size=20)) + data[place:]
        case "remove":
            return data[:place] + data[place + draw(st.integers(1, 50)) :]
        case "replace":
            return data[:place] + draw(st.sampled_from(VALUES)).encode() + data[place + 1 :]
        case "bracket":
            return data[:place] + DEEP + data[place:]
        case _:
            return draw(st.sampled_from(WHOLE_FILES))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON value, the first ones of long lists and objects."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in list(items)[:40] for inner in places(item, (*path, key)))]


@st.composite
def damaged_values(draw: st.DrawFn, text: str) -> str:
    """A JSON text in which one value has another type, is missing, or is there twice."""
    value = json.loads(text)
    path = draw(st.sampled_from(places(value)))
    if not path:
        return draw(st.sampled_from(VALUES))
    target = value
    for key in path[:-1]:
        target = target[key]
    how = draw(st.sampled_from(["other", "other", "other", "missing", "twice"]))
    if how == "missing":
        del target[path[-1]]
        return json.dumps(value)
    former, target[path[-1]] = target[path[-1]], MARK
    other = draw(st.sampled_from(VALUES))
    if how == "twice" and isinstance(path[-1], str):
        other = f"{json.dumps(former)}, {json.dumps(path[-1])}: {other}"
    return json.dumps(value).replace(json.dumps(MARK), other)


def damaged_json(data: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file with other bytes or other values."""
    return damaged_bytes(data) | damaged_values(data.decode()).map(str.encode)


@st.composite
def damaged_lines(draw: st.DrawFn, data: bytes) -> bytes:
    """A file of JSON lines with other bytes, or other values in one line."""
    if draw(st.booleans()):
        return draw(damaged_bytes(data))
    lines = data.decode().splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = draw(damaged_values(lines[number]))
    return "\n".join(lines).encode()


@st.composite
def damaged_manifest(draw: st.DrawFn, data: bytes) -> bytes:
    """A manifest with other bytes or other values, in half of the cases with a checksum that fits."""
    damaged = draw(damaged_json(data))
    try:
        content = json.loads(damaged)
        body = {key: content[key] for key in ("format", "files", "tensors")}
        checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError):
        return damaged
    return json.dumps({**body, "sha256": checksum}).encode() if draw(st.booleans()) else damaged


@st.composite
def damaged_safetensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with another header, another length of the header, or other bytes."""
    size = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + size], data[8 + size :]
    match draw(st.sampled_from(["bytes", "length", "header", "header"])):
        case "bytes":
            return draw(damaged_bytes(data[: 8 + size])) + values
        case "length":
            length = draw(st.sampled_from([0, 1, size - 1, size + 1, len(data), 2**31, 2**60, 2**64 - 1]))
            return length.to_bytes(8, "little") + header + values
    header = draw(damaged_values(header.decode())).encode()
    return len(header).to_bytes(8, "little") + header + values


@st.composite
def damaged_npy(draw: st.DrawFn, data: bytes) -> bytes:
    """A .npy file with another header, or other bytes in it."""
    if draw(st.booleans()):
        return draw(damaged_bytes(data[:128])) + data[128:]
    descr = draw(st.sampled_from(["<u2", ">u2", "|O", "<f4", "|V0", "|S3", "<u99", "[]", "<i8"]))
    shape = draw(st.sampled_from(["(10,)", "()", "(-1,)", "(2**62,)", f"({2**62},)", "(0,)", "5", "(3, 4)", "(1.5,)"]))
    order = draw(st.sampled_from(["True", "False", "0"]))
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    header = draw(st.sampled_from([header, header, header, DEEP, b"{" * 9000, header * 2]))
    version = draw(st.sampled_from([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\7"]))
    size_bytes = 2 if version == b"\1\0" else 4
    size = len(header).to_bytes(4, "little")[:size_bytes]
    return b"\x93NUMPY" + version + size + header + data[128:]


Damage = Callable[[bytes], st.SearchStrategy[bytes]]
