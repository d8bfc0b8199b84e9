"""Turn token IDs into text for people, with the tokenizer beside token files; also without one.

A byte-level BPE needs no library: each character of its tokens stands for one byte. Others need `tokenizers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinytrain_dist.data.stored_tokenizer import META_FILE, TOKENIZER_FILE
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.json_files import is_whole_number, read_json_dict
from tinytrain_dist.utils.permissions import permission_problem

# Tokens that end a document in well-known tokenizers, for one that does not say which does.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class TokenTexts:
    """The text of token IDs."""

    def __init__(
        self, special: dict[int, str], size: int, pieces: dict[int, bytes] | None, library: Any = None
    ) -> None:
        """Describe a tokenizer.

        special: the names of special tokens. size: the largest ID and one more. pieces: the bytes of each other token,
        if they are known. library: a Tokenizer, if they are not.
        """
        self.special = special
        self.size = size
        self._pieces = pieces
        self._library = library

    @property
    def known(self) -> bool:
        """Whether IDs have texts."""
        return self._pieces is not None or self._library is not None

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of successive tokens, with the names of special tokens.

        Bytes that are not UTF-8 become \\xNN, and IDs that the tokenizer does not have become <id N>. Without a
        tokenizer the text is the numbers.
        """
        if not self.known:
            return " ".join(map(str, ids))
        if self._pieces is not None:
            return b"".join(map(self._bytes, ids)).decode("utf-8", "backslashreplace")
        parts: list[str] = []
        waiting: list[int] = []  # that the library decodes together
        for token in ids:
            if self._library is not None and 0 <= token < self.size and token not in self.special:
                waiting.append(token)
                continue
            parts += [self._decoded(waiting), self.special.get(token, f"<id {token}>")]
            waiting = []
        return "".join([*parts, self._decoded(waiting)])

    def _bytes(self, token: int) -> bytes:
        assert self._pieces is not None
        piece = self._pieces.get(token)
        return self.special.get(token, f"<id {token}>").encode() if piece is None else piece

    def _decoded(self, ids: list[int]) -> str:
        if not ids:
            return ""
        if len(ids) == 1:  # decoders drop the space before the first token of a text
            return str(self._library.id_to_token(ids[0])).replace("\u2581", " ")  # SentencePiece's mark of a space
        return str(self._library.decode(ids, skip_special_tokens=False))


def read_token_texts(folder: Path) -> tuple[TokenTexts, str]:
    """Return the texts of the tokenizer in a folder, and a sentence if they are not known.

    Errors: DataError if tokenizer.json cannot be used.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return TokenTexts({}, 0, None), f"no {TOKENIZER_FILE} in {folder}, so tokens are shown as numbers"
    try:
        tokenizer = read_json_dict(path)
        added = tokenizer.get("added_tokens") or []
        special = {int(token["id"]): str(token["content"]) for token in added if token.get("special")}
        vocabulary = tokenizer["model"]["vocab"]
        ids: Iterable[int] = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        size = max([*map(int, ids), *(int(token["id"]) for token in added), -1]) + 1
        pieces = _byte_level_pieces(tokenizer, added)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{path}: is not a tokenizer ({error}); put the original back, or remove it"
        raise DataError(permission_problem(error) or problem) from None
    if pieces is not None:
        return TokenTexts(special, size, {token: piece for token, piece in pieces.items() if token not in special}), ""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        note = (
            f"{path} needs the library tokenizers, so tokens are shown as numbers; pip install 'tinytrain_dist[prep]'"
        )
        return TokenTexts(special, size, None), note
    try:
        library = Tokenizer.from_file(str(path))
    except BaseException as error:  # bare Exception for whatever it cannot read, and it may panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{path}: is not a tokenizer ({error}); put the original back, or remove it") from None
    return TokenTexts(special, size, None, library), ""


def _byte_level_pieces(tokenizer: dict[str, Any], added: list[dict[str, Any]]) -> dict[int, bytes] | None:
    """Return the bytes of each token of a byte-level BPE; None for another kind of tokenizer."""
    model, decoder = tokenizer["model"], tokenizer.get("decoder") or {}
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel":
        return None
    of_character = _bytes_of_characters()
    pieces = {
        int(token_id): b"".join(of_character.get(letter, letter.encode("utf-8", "replace")) for letter in token)
        for token, token_id in model["vocab"].items()
    }
    return pieces | {int(token["id"]): str(token["content"]).encode("utf-8", "replace") for token in added}


def _bytes_of_characters() -> dict[str, bytes]:
    """Return the byte that each character of a byte-level token stands for, as GPT-2 defined it.

    Printable bytes of Latin-1 stand for themselves, and the others have the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + number): bytes([byte]) for number, byte in enumerate(others)}


def end_of_text_id(folder: Path, texts: TokenTexts) -> tuple[int | None, str]:
    """Return the ID of the token that ends a document, and the file that names it; (None, "") if there is none."""
    meta, config = _read_json(folder / META_FILE), _read_json(folder / "tokenizer_config.json")
    if is_whole_number(meta.get("eos_id")):
        return int(meta["eos_id"]), META_FILE
    ids = {name: token for token, name in texts.special.items()}
    named = config.get("eos_token")
    name = named.get("content") if isinstance(named, dict) else named
    if isinstance(name, str) and name in ids:
        return ids[name], "tokenizer_config.json"
    found = next((name for name in END_NAMES if name in ids), None)
    return (None, "") if found is None else (ids[found], f"its name in {TOKENIZER_FILE}")


def vocabulary_size(folder: Path, texts: TokenTexts) -> tuple[int | None, str]:
    """Return the size of the vocabulary, and the file that gives it; (None, "") if there is none."""
    size = _read_json(folder / META_FILE).get("vocab_size")
    if is_whole_number(size, 1):
        return size, META_FILE
    return (texts.size, TOKENIZER_FILE) if texts.size else (None, "")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none. Errors: DataError."""
    try:
        return read_json_dict(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be read ({error}); put the original back, or remove it"
        raise DataError(permission_problem(error) or problem) from None
