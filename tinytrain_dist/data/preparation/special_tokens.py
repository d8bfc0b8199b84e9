"""Decide what becomes of a tokenizer's special tokens, so that the data and the stored tokenizer agree.

What the model sees in training must be what the tokenizer beside the data makes of a text: the tokens before and after
it, special tokens that the text spells, and the names of tokens in tokenizer_config.json. Must not know token files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, processors

from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.json_files import read_json_dict
from tinytrain_dist.utils.regular_files import read_text

SEPARATOR_TOKEN = "<|endoftext|>"  # ends a document wherever a text spells it, so that no document has it
SpelledTokens = Literal["text", "ids"]
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE = "a b"


@dataclass(frozen=True)
class SpecialTokens:
    """What is done with the special tokens of a tokenizer."""

    before: tuple[int, ...]  # IDs before each document
    after: tuple[int, ...]  # IDs after each document; the last one ends it
    config: dict[str, Any]  # the content of tokenizer_config.json
    notes: tuple[str, ...]  # lines that say what is done with each


def read_settings(file: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json and its companions beside a tokenizer.json say.

    Errors: ValueError for a file that is no JSON object.
    """
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = file.with_name(name)
        content = read_json_dict(path) if path.exists() else {}
        settings |= {key: value for key, value in content.items() if value is not None}
    template = file.with_name("chat_template.jinja")
    if template.exists():
        settings["chat_template"] = read_text(template)
    return settings


def token_text(token: Any) -> str | None:
    """Return the text of a token, which is stored as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def settle(text: str, settings: dict[str, Any], eos_token: str, spelled: SpelledTokens) -> tuple[str, SpecialTokens]:
    """Return the tokenizer.json to store, the same text where nothing has to change, and what is done with its tokens.

    Args:
        text: tokenizer.json as it was loaded
        settings: of `read_settings`
        eos_token: ends every document
        spelled: whether special tokens that a text spells are encoded as text or as tokens

    Errors: DataError for an end-of-document token that text itself can produce, and for a tokenizer that does more to
    a text than to put tokens around it.
    """
    tokenizer = Tokenizer.from_str(text)
    eos_id = _id(tokenizer, eos_token)
    notes = [f"special tokens: {eos_token!r} ({eos_id}) ends every document"]
    cuts_or_pads = tokenizer.truncation is not None or tokenizer.padding is not None
    encode_as_in_training(tokenizer, "text")
    if eos_id in tokenizer.encode(eos_token, add_special_tokens=False).ids:
        raise DataError(
            f"{eos_token!r} is no special token of this tokenizer, so a text that contains it would end a document; "
            "name a special token by --eos-token"
        )
    roles = _roles(tokenizer, settings, eos_token, notes)
    if cuts_or_pads:
        notes.append("  its settings to cut and pad texts are left out: documents are neither cut nor padded by them")
    changed = _set_post_processor(tokenizer, settings, roles, notes)

    before, after = _tokens_around(tokenizer)
    notes.append(_note_on_beginning(tokenizer, before, roles))
    if after:
        notes.append(
            f"WARNING: this tokenizer puts {_names(tokenizer, after)} after every text, prompts too, as after every "
            'document here; to have prompts continued, set "add_eos_token": false in its tokenizer_config.json'
        )
    if after[-1:] != (eos_id,):
        after = (*after, eos_id)
    notes.append(_note_on_padding(roles))

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    config |= _spelled_tokens(tokenizer, settings, spelled, notes)
    stored = tokenizer.to_str(pretty=False) if changed or cuts_or_pads else text
    return stored, SpecialTokens(before, after, config, tuple(notes))


def names_of_special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens that a document may spell, longest first."""
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return sorted((token for token in tokens if token != SEPARATOR_TOKEN), key=len, reverse=True)


def count_spelled(tokenizer_json: str, texts: Iterable[str]) -> Counter[str]:
    """Return how many texts spell each special token; one that spells several counts for the first."""
    names = names_of_special_tokens(Tokenizer.from_str(tokenizer_json))
    if not names:
        return Counter()
    any_name = re.compile("|".join(map(re.escape, names)))
    return Counter(match[0] for text in texts if (match := any_name.search(text)))


def encode_as_in_training(tokenizer: Tokenizer, spelled: SpelledTokens) -> None:
    """Set up a tokenizer to encode documents: nothing is cut or padded."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = spelled == "text"


def _roles(tokenizer: Tokenizer, settings: dict[str, Any], eos_token: str, notes: list[str]) -> dict[str, str]:
    """Return the tokens that have a role (bos_token, ...); note those that tokenizer.json does not list."""
    given = {role: text for role in _ROLES if (text := token_text(settings.get(role))) is not None}
    if given.get("eos_token", eos_token) != eos_token:
        notes.append(f"  its tokenizer_config.json says eos_token = {given['eos_token']!r}; here it is {eos_token!r}")
    given["eos_token"] = eos_token
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    lost = [f"{role} {text!r}" for role, text in given.items() if text not in added]
    entries = settings.get("added_tokens_decoder")
    others = [token_text(entry) for entry in entries.values()] if isinstance(entries, dict) else []
    lost += [repr(text) for text in others if text is not None and text not in added | set(given.values())]
    if lost:
        notes.append(
            "WARNING: left out, because tokenizer.json does not list it among its added tokens: "
            f"{', '.join(lost)}; add it there first if the model is to know it"
        )
    return {role: text for role, text in given.items() if text in added}


def _set_post_processor(
    tokenizer: Tokenizer, settings: dict[str, Any], roles: dict[str, str], notes: list[str]
) -> bool:
    """Obey add_bos_token and add_eos_token of tokenizer_config.json, and return whether that changed the tokenizer."""
    before, after = now = _tokens_around(tokenizer)
    needed = {role: settings.get(f"add_{role}") for role in ("bos_token", "eos_token")}
    if needed["bos_token"] is not None:
        before = (_id(tokenizer, roles["bos_token"]),) if needed["bos_token"] and "bos_token" in roles else ()
    if needed["eos_token"] is not None:
        after = (_id(tokenizer, roles["eos_token"]),) if needed["eos_token"] else ()
    if (before, after) == now:
        return False
    said = " and ".join(f"add_{role} = {str(value).lower()}" for role, value in needed.items() if value is not None)
    notes.append(
        f"  its tokenizer_config.json says {said}, and its tokenizer.json does otherwise; this obeys the former, and "
        "the stored tokenizer.json does the same"
    )
    first, last = ([tokenizer.id_to_token(number) for number in numbers] for numbers in (before, after))
    one, other = ([*first, part, *last] for part in ("$A", "$B"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=one,
        pair=[*one, *other],
        special_tokens=[(tokenizer.id_to_token(number), number) for number in dict.fromkeys([*before, *after])],
    )
    return True


def _tokens_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the IDs that the post-processor puts before and after a text. Errors: DataError if it does more."""
    found = tokenizer.encode(_PROBE)
    inside = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    start = [*found.special_tokens_mask, 0].index(0)
    before, after = found.ids[:start], found.ids[start + len(inside) :]
    if [*before, *inside, *after] != found.ids or tokenizer.encode("").ids != [*before, *after]:
        raise DataError(
            "the tokenizer's post-processor does more than to put tokens before and after a text, so training data "
            "cannot be made as it would; remove the post-processor from tokenizer.json"
        )
    return tuple(before), tuple(after)


def _note_on_beginning(tokenizer: Tokenizer, before: tuple[int, ...], roles: dict[str, str]) -> str:
    bos = roles.get("bos_token")
    if before:
        return f"  {_names(tokenizer, before)} begins every document, as this tokenizer puts it before every text"
    if bos is None or bos == roles["eos_token"]:
        return "  no token begins a document"
    return (
        f"  no token begins a document, as this tokenizer puts none before a text; for {bos!r} there, set "
        '"add_bos_token": true in its tokenizer_config.json'
    )


def _note_on_padding(roles: dict[str, str]) -> str:
    pad = roles.get("pad_token")
    if pad is None:
        return "  no token pads"
    if pad == roles["eos_token"]:
        return f"  {pad!r} also pads, but nothing is padded in the data"
    return f"  {pad!r} pads; nothing is padded in the data, so the model never sees it"


def _spelled_tokens(
    tokenizer: Tokenizer, settings: dict[str, Any], spelled: SpelledTokens, notes: list[str]
) -> dict[str, Any]:
    """Return the entries of tokenizer_config.json on special tokens in a text, and on the chat template."""
    names = names_of_special_tokens(tokenizer)
    config: dict[str, Any] = {}
    if names:
        example = f"{names[0]!r} and {len(names) - 1} others" if len(names) > 1 else repr(names[0])
        config["split_special_tokens"] = spelled == "text"
        way = "encoded as ordinary text" if spelled == "text" else "encoded as these tokens"
        flag = " (--special-tokens ids: as tokens)" if spelled == "text" else ""
        notes.append(f"  special tokens that a text spells ({example}) are {way}, also by the stored tokenizer{flag}")
    if "chat_template" in settings:
        if spelled == "ids" or not names:
            config["chat_template"] = settings["chat_template"]
            notes.append("  its chat template is kept; the model knows it only if the text is written in it")
        else:
            notes.append(
                "WARNING: its chat template is left out: its tokens are never in the data, because special tokens that "
                "a text spells are ordinary text; --special-tokens ids keeps it"
            )
    return config


def _id(tokenizer: Tokenizer, token: str) -> int:
    number: int | None = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def _names(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return ", ".join(f"{tokenizer.id_to_token(number)!r} ({number})" for number in ids)
