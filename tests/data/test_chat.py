"""Chat: the template's own text, and only the assistant's answers counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tinytrain_dist.data.preparation.chat import BadChatError, ChatEncoder
from tinytrain_dist.data.preparation.tokenizer import train_bpe
from tinytrain_dist.errors import DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A: {% generation %}{{ message['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}U: {{ message['content'] }}\n{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must be first') }}{% endif %}"
# drops the reasoning of all answers but the last, as some templates do
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "How much is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6, naïve human 👍"},
]


@pytest.fixture(scope="module")
def tokenizer_text() -> str:
    vocabulary = train_bpe(["How much is it? It is short. user assistant system naïve human Be And"], 320)
    tokenizer = Tokenizer.from_str(vocabulary.text)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer.to_str()


def folder_with(tmp_path: Path, tokenizer_text: str, template: str | None) -> Path:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template:
        config["chat_template"] = template
    (tmp_path / "tokenizer.json").write_text(tokenizer_text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def counted_text(encoder: ChatEncoder, messages: list[dict[str, str]]) -> tuple[str, str]:
    """Return the whole text, and the counted tokens with the others as one `_` for each run of them."""
    encoded = encoder.encode({"messages": messages})
    runs: list[list[int]] = []
    kept = []
    for token, counts in zip(encoded.ids.tolist(), encoded.counted.tolist(), strict=True):
        if counts:
            if not kept or not kept[-1]:
                runs.append([])
            runs[-1].append(token)
        kept.append(counts)
    decode = encoder.tokenizer.decode
    return decode(encoded.ids.tolist()), "|".join(decode(run) for run in runs)


def test_only_answers_count_and_the_text_is_the_templates(tmp_path: Path, tokenizer_text: str) -> None:
    encoder = ChatEncoder(folder_with(tmp_path, tokenizer_text, CHATML))
    text, counted = counted_text(encoder, MESSAGES)
    assert text == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES)
    assert counted == "It is 4.<|im_end|>\n|6, naïve human 👍<|im_end|>\n"


def test_blocks_in_the_template_decide_where_it_has_them(tmp_path: Path, tokenizer_text: str) -> None:
    encoder = ChatEncoder(folder_with(tmp_path, tokenizer_text, MARKED))
    text, counted = counted_text(encoder, MESSAGES[1:])
    assert text == "U: How much is 2 + 2?\nA: It is 4.<|im_end|>U: And 3 + 3?\nA: 6, naïve human 👍<|im_end|>"
    assert counted == "It is 4.<|im_end|>|6, naïve human 👍<|im_end|>"


def test_a_conversation_without_an_answer_counts_nothing(tmp_path: Path, tokenizer_text: str) -> None:
    encoder = ChatEncoder(folder_with(tmp_path, tokenizer_text, CHATML))
    encoded = encoder.encode({"messages": MESSAGES[:2]})
    assert encoded.counted.sum() == 0
    assert len(encoded.counted) == len(encoded.ids) > 10


def test_a_template_that_rewrites_earlier_answers_is_refused(tmp_path: Path, tokenizer_text: str) -> None:
    encoder = ChatEncoder(folder_with(tmp_path, tokenizer_text, FORGETFUL))
    think = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "y</think>d"},
    ]
    assert counted_text(encoder, think[:2])[1] == "x</think>b<|im_end|>\n"
    with pytest.raises(BadChatError, match="message 2: the template writes this answer"):
        encoder.encode({"messages": think})


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "a"}, "has no list \"messages\" (found: 'text')"),
        ([], 'has no list "messages" (found: list)'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": [{"content": "a"}]}, 'message 1 has no "role"'),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, 'message 2 has no "content"'),
    ],
)
def test_records_of_another_form(tmp_path: Path, tokenizer_text: str, record: Any, problem: str) -> None:
    encoder = ChatEncoder(folder_with(tmp_path, tokenizer_text, CHATML))
    with pytest.raises(BadChatError) as caught:
        encoder.encode(record)
    assert problem in str(caught.value)


def test_a_template_that_fails_says_why(tmp_path: Path, tokenizer_text: str) -> None:
    encoder = ChatEncoder(folder_with(tmp_path, tokenizer_text, STRICT))
    with pytest.raises(BadChatError, match="the user must be first"):
        encoder.encode({"messages": MESSAGES})


def test_a_tokenizer_without_a_template(tmp_path: Path, tokenizer_text: str) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        ChatEncoder(folder_with(tmp_path, tokenizer_text, None))
    with pytest.raises(DataError, match="cannot load it"):
        ChatEncoder(tmp_path / "nowhere")
