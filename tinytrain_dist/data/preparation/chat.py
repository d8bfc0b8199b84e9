"""Turn conversations into token IDs with a tokenizer's own chat template, and mark the assistant's answers.

Must not know where conversations come from or where token IDs go.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinytrain_dist.errors import DataError

ANSWERING_ROLE = "assistant"
_MARKED_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # such blocks surround what the assistant writes


class EncodedChat(NamedTuple):
    """A conversation: token IDs [n], and which of them the assistant has written, uint8 [n]."""

    ids: NDArray[np.int64]
    counted: NDArray[np.uint8]


class BadChatError(Exception):
    """What is wrong with one conversation, and what to do: the end of a sentence."""


class ChatEncoder:
    """Encode conversations with the chat template and the tokenizer in a Hugging Face folder.

    The answers are found in one of two ways:

    * If the template has `{% generation %}` blocks, they are what is inside.
    * Otherwise an answer is what the template adds to the prompt for it when the answer is given. It includes the
      token that ends the turn, so that a model learns to stop.
    """

    def __init__(self, folder: str | Path, tokenizer_class: Any = None) -> None:
        """Load the tokenizer. Errors: DataError if the folder has no tokenizer, or no chat template.

        tokenizer_class: what `simple_class` returned for this folder in another process; saves an import of torch.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # encoding runs in several processes already
        try:
            if tokenizer_class is None:
                from transformers import AutoTokenizer as tokenizer_class
        except ImportError as error:
            raise DataError(
                "--chat: the package that applies chat templates is missing; pip install 'tinytrain_dist[hf]'"
            ) from error
        folder = Path(folder).expanduser()
        self.folder = folder.parent if folder.is_file() else folder
        try:
            self.tokenizer: Any = tokenizer_class.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # of many types, by what the files contain
            raise DataError(
                f"--tokenizer {folder}: transformers cannot load it ({error}); give a folder with tokenizer.json and "
                "tokenizer_config.json"
            ) from error
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise DataError(
                f"--tokenizer {folder}: has no chat template, which --chat needs; give the folder of a chat model, or "
                "add a chat_template.jinja to this one"
            )
        if not self.tokenizer.is_fast:
            raise DataError(f"--tokenizer {folder}: has no tokenizer.json, which says where each token begins; add one")
        self.template: str = template
        if not self._writes_roles():
            raise DataError(
                f"--tokenizer {folder}: its chat template writes the same text for the user and for the assistant, so "
                "a model cannot learn who speaks; let it write message.role, or the tokens that stand for it"
            )
        self.marks_answers = _MARKED_ANSWERS.search(template) is not None

    def _writes_roles(self) -> bool:
        """Return whether the template writes the user's messages in another way than the assistant's.

        A template that refuses such a short conversation looks at roles.
        """
        texts = []
        for role in ("user", ANSWERING_ROLE):
            try:
                texts.append(self.render({"messages": [{"role": role, "content": "x"}]}))
            except BadChatError:  # also where the template is at fault; the first conversation names it
                return True
        return texts[0] != texts[1]

    def simple_class(self) -> Any:
        """Return a class that loads this tokenizer as AutoTokenizer does; None if there is none.

        AutoTokenizer imports torch, which the class does not.
        measured (2-core VM, transformers 5.23, 2026-11-28): with AutoTokenizer 2.4 s, with the class 0.7 s
        """
        kind = type(self.tokenizer)
        if not kind.__module__.startswith("transformers."):
            return None
        try:
            other = ChatEncoder(self.folder, kind)
        except DataError:  # it needs what only AutoTokenizer knows
            return None
        return kind if self._identity() == other._identity() else None

    def _identity(self) -> tuple[Any, ...]:
        """Return what decides how conversations are written and encoded."""
        tokenizer = self.tokenizer
        return self.template, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.is_fast

    def encode(self, record: dict[str, Any]) -> EncodedChat:
        """Encode a conversation: {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}.

        record: its form was checked, see conversations.py; "tools" may be missing. Errors: BadChatError.
        """
        messages, tools = record["messages"], record.get("tools")
        if self.marks_answers:
            encoded = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return EncodedChat(np.array(encoded["input_ids"], np.int64), np.array(encoded["assistant_masks"], np.uint8))
        text = self.render(record)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins = np.array([begin for begin, _ in encoded["offset_mapping"]], np.int64)
        counted = np.zeros(len(begins), np.uint8)
        for begin, end in self._answers(messages, tools, text):
            # A token that begins in the prompt is part of the prompt when the model is used.
            counted[(begins >= begin) & (begins < end)] = 1
        return EncodedChat(np.array(encoded["input_ids"], np.int64), counted)

    def render(self, record: dict[str, Any]) -> str:
        """Return the text of a conversation as the template writes it; record: as of `encode`. Errors: BadChatError."""
        text: str = self._apply(record["messages"], record.get("tools"), tokenize=False)
        return text

    def _answers(self, messages: list[Any], tools: Any, text: str) -> Iterator[tuple[int, int]]:
        """Yield where each answer begins and ends in the text of the whole conversation, in characters."""
        for number, message in enumerate(messages):
            if message["role"] != ANSWERING_ROLE:
                continue
            prompt = self._apply(messages[:number], tools, tokenize=False, add_generation_prompt=True)
            answered = self._apply(messages[: number + 1], tools, tokenize=False)
            if not (text.startswith(prompt) and text.startswith(answered)):
                raise BadChatError(
                    f"message {number + 1}: the template writes this answer, or what precedes it, in another way when "
                    "more follows, so an answer in the text is not what the model would write; make a record of its "
                    "own for each answer, or surround answers in the template by {% generation %} and "
                    "{% endgeneration %}"
                )
            yield len(prompt), len(answered)

    def _apply(self, messages: list[Any], tools: Any, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=self.template, **how)
        except Exception as error:  # whatever the template does; TemplateError is what it raises on purpose
            reason = " ".join(str(error).split())
            name = type(error).__name__
            faulty = "template" if name == "TemplateSyntaxError" else "messages"  # by name: jinja2 may be missing
            raise BadChatError(
                f"the chat template of {self.folder} fails ({name}: {reason}); correct the {faulty}"
            ) from error
