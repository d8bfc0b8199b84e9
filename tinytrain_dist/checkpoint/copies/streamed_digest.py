"""Compute the digest of a file of a checkpoint while it is copied, and compare it with the manifest.

Must not import torch: the process that copies is small. Must not know where the bytes come from.
"""

from __future__ import annotations

import math
import re
from typing import Any

from tinytrain_dist.checkpoint.file_digests import HASH_FUNCTIONS, file_digest
from tinytrain_dist.checkpoint.manifest import Manifest


class StreamedDigest:
    """Receive the bytes of one file in order; at the end, `problem` says how they differ from the manifest."""

    def __init__(self, name: str, manifest: Manifest) -> None:
        """`name`: of the file, one of those in the manifest."""
        self._name = name
        self._hashed = manifest.hashed
        self._entry = manifest.files[name]
        self._tensors = manifest.tensors.get(str(self._entry.get("kind")), {})
        self._of_tensors = self._hashed not in self._entry  # a file of tensors has a digest of digests
        self._header = b""
        self._received = 0
        self._parts = self._parts_of_file()  # (name of the tensor, or "" for header or file; bytes), reversed
        self._begin_part()
        self._problem = ""

    def _parts_of_file(self) -> list[tuple[str, int]]:
        """Return the parts with a digest of their own, the first one last."""
        if not self._of_tensors:
            return [("", self._entry["bytes"])]
        names = self._entry["tensors"]
        parts = [("", self._entry["header_bytes"]), *((name, tensor_bytes(self._tensors[name])) for name in names)]
        return parts[::-1]

    def _begin_part(self) -> None:
        self._digest = HASH_FUNCTIONS[self._hashed]()
        self._left = self._parts[-1][1] if self._parts else 0

    def update(self, block: bytes | memoryview) -> None:
        """Receive the next bytes."""
        self._received += len(block)
        view = memoryview(block)
        while view and self._parts:
            piece, view = view[: self._left], view[self._left :]
            self._left -= len(piece)
            self._digest.update(piece)
            if self._of_tensors and not self._parts[-1][0]:
                self._header += bytes(piece)
            self._end_parts()

    def _end_parts(self) -> None:
        """Compare the digests of the parts that are complete."""
        while self._parts and not self._left:
            tensor, _ = self._parts.pop()
            if tensor and self._digest.hexdigest() != self._tensors[tensor][self._hashed]:
                self._problem = self._problem or f"{tensor} in it differs from what was written"
            elif not self._of_tensors and self._digest.hexdigest() != self._entry[self._hashed]:
                self._problem = "it differs from what was written"
            self._begin_part()

    def problem(self) -> str:
        """Return how the bytes differ from the manifest, after all of them were received; "" if they do not."""
        self._end_parts()  # of empty files and tensors
        if self._received != self._entry["bytes"] or self._parts:
            return f"{self._name}: has {self._received:,} bytes, but {self._entry['bytes']:,} were written"
        if self._of_tensors and not self._problem:
            digest = file_digest(self._header, self._entry["tensors"], self._tensors, self._hashed)
            if digest != self._entry[f"{self._hashed}_of_digests"]:
                self._problem = "its header differs from what was written"
        return f"{self._name}: {self._problem}" if self._problem else ""


def tensor_bytes(entry: dict[str, Any]) -> int:
    """Return the size of a tensor by its entry in the manifest."""
    bits = re.search(r"\d+", entry["dtype"])  # such as BF16, F8_E4M3; BOOL has no number
    shape: list[int] = entry["shape"]
    return math.prod(shape) * (int(bits[0]) // 8 if bits else 1)
