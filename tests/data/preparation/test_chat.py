"""Chat: the template's own text, and only the assistant's answers counted."""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import Tokenizer

from tests.helpers.ranks import REPOSITORY
from tests.helpers.tokenizers import write_tokenizer
from tinytrain_dist.data.preparation.chat import BadChatError, ChatEncoder
from tinytrain_dist.data.preparation.conversations import conversation, conversation_of_row
from tinytrain_dist.data.preparation.prepare import prepare
from tinytrain_dist.data.preparation.tokenizer import train_bpe
from tinytrain_dist.errors import ConfigError, DataError

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


@pytest.mark.parametrize("block", ["{% generation %}", "{% generation -%}", "{%generation%}"])
def test_blocks_in_the_template_decide_where_it_has_them(tmp_path: Path, tokenizer_text: str, block: str) -> None:
    encoder = ChatEncoder(folder_with(tmp_path, tokenizer_text, MARKED.replace("{% generation %}", block)))
    assert encoder.marks_answers
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


def test_a_template_that_fails_says_why(tmp_path: Path, tokenizer_text: str) -> None:
    encoder = ChatEncoder(folder_with(tmp_path, tokenizer_text, STRICT))
    with pytest.raises(BadChatError, match="the user must be first"):
        encoder.encode({"messages": MESSAGES})


def test_a_tokenizer_without_a_template(tmp_path: Path, tokenizer_text: str) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        ChatEncoder(folder_with(tmp_path, tokenizer_text, None))
    with pytest.raises(DataError, match="cannot load it"):
        ChatEncoder(tmp_path / "nowhere")


LOAD_IN_A_WORKER = """
import json, pickle, sys
from pathlib import Path
from tinytrain_dist.data.preparation.chat import ChatEncoder
for folder, kind, record, expected in pickle.loads(Path(sys.argv[1]).read_bytes()):
    encoded = ChatEncoder(folder, kind).encode(record)
    assert (encoded.ids.tolist(), encoded.counted.tolist()) == expected, folder
assert "torch" not in sys.modules
"""


def test_a_worker_loads_the_same_tokenizer_without_torch(tmp_path: Path) -> None:
    cases = []
    for family in ("llama3", "gpt2", "qwen", "t5"):
        folder = write_tokenizer(tmp_path / family, family, chat_template="{{ bos_token }}" + CHATML)
        encoder, record = ChatEncoder(folder), {"messages": MESSAGES}
        kind, encoded = encoder.simple_class(), encoder.encode(record)
        if kind is not None:
            cases.append((folder, kind, record, (encoded.ids.tolist(), encoded.counted.tolist())))
    assert len(cases) == 4
    (tmp_path / "cases").write_bytes(pickle.dumps(cases))
    command = [sys.executable, "-c", LOAD_IN_A_WORKER, str(tmp_path / "cases")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [*MESSAGES[:3], {"role": "user", "content": f"And {n}?"}, *MESSAGES[4:]]} for n in range(count)
    ]


@pytest.mark.parametrize("shard_tokens", [None, 2000])
def test_prepare_writes_tokens_documents_and_masks(
    tmp_path: Path, tokenizer_text: str, shard_tokens: int | None
) -> None:
    (tmp_path / "model").mkdir()
    model = folder_with(tmp_path / "model", tokenizer_text, CHATML)
    lines = write_lines(tmp_path / "chat.jsonl", conversations(60))
    out = tmp_path / "data"
    meta = prepare(str(lines), str(out), tokenizer=str(model), chat=True, workers=2, shard_tokens=shard_tokens)
    encoder, decoded = ChatEncoder(model), []
    for path in sorted(out.glob("*.documents.npy")):
        ids, mask = (np.load(str(path).replace(".documents", ending)) for ending in ("", ".mask"))
        assert mask.dtype == np.uint8
        assert len(mask) == len(ids)
        for start, end in itertools.pairwise([*np.load(path).tolist(), len(ids)]):
            decoded.append((encoder.tokenizer.decode(ids[start:end].tolist()), int(mask[start:end].sum())))
    expected = []
    for record in conversations(60):
        text, _ = counted_text(encoder, record["messages"])
        expected.append((text, int(encoder.encode(record).counted.sum())))
    assert sorted(decoded) == sorted(expected)
    assert meta["train_counted_tokens"] + meta["val_counted_tokens"] == sum(count for _, count in expected)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == CHATML
    assert (len(list(out.glob("train*.mask.npy"))) > 1) == (shard_tokens is not None)


def test_prepare_says_if_no_token_counts(
    tmp_path: Path, tokenizer_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder_with(tmp_path, tokenizer_text, CHATML)
    questions: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"And {n}?"}]} for n in range(20)]
    lines = write_lines(tmp_path / "chat.jsonl", questions)
    meta = prepare(str(lines), str(tmp_path / "data"), tokenizer=str(model), chat=True, workers=1)
    assert meta["train_counted_tokens"] == 0
    assert "train: no token counts, because the assistant says nothing" in capsys.readouterr().err


def test_prepare_reads_conversations_of_tables(tmp_path: Path, tokenizer_text: str) -> None:
    model = folder_with(tmp_path, tokenizer_text, CHATML)
    table = pa.table({"chat": [record["messages"] for record in conversations(20)]})
    parquet.write_table(table, tmp_path / "chat.parquet")
    lines = write_lines(tmp_path / "chat.jsonl", conversations(20))
    common: dict[str, Any] = {"tokenizer": str(model), "chat": True, "workers": 1}
    of_table = prepare(str(tmp_path / "chat.parquet"), str(tmp_path / "a"), text_field="chat", **common)
    of_lines = prepare(str(lines), str(tmp_path / "b"), **common)
    assert of_table["digests"] == of_lines["digests"]


def test_messages_of_sharegpt_are_those_with_roles() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    messages = [{"from": names[message["role"]], "value": message["content"]} for message in MESSAGES]
    expected = conversation("here", {"messages": MESSAGES}, "messages")
    assert conversation("here", {"conversations": messages}, "conversations") == expected
    assert conversation_of_row("here", messages, None, "conversations") == expected


def test_a_template_that_does_not_tell_who_speaks_is_refused(tmp_path: Path, tokenizer_text: str) -> None:
    model = folder_with(tmp_path, tokenizer_text, CHATML.replace("message['role']", "'someone'"))
    with pytest.raises(DataError, match="writes the same text for the user and for the assistant"):
        ChatEncoder(model)
    strict = "{% if messages|length < 2 %}{{ raise_exception('too short') }}{% endif %}" + CHATML
    ChatEncoder(folder_with(tmp_path, tokenizer_text, strict))


CALLS = "{% if message.tool_calls is defined %}CALLS{{ message.tool_calls | tojson }}{% endif %}<|im_end|>"
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace("<|im_end|>", CALLS)


def test_tools_beside_the_messages_reach_the_template(tmp_path: Path, tokenizer_text: str) -> None:
    model = folder_with(tmp_path, tokenizer_text, WITH_TOOLS)
    names = ["city", "day", "sum"]
    records = [
        record
        if number % 4 == 0
        else {
            "messages": [
                record["messages"][1],
                {"role": "assistant", "content": "", "tool_calls": [{"name": names[number % 3]}]},
                *record["messages"][2:],
            ],
            "tools": [{"name": "f", "parameters": {names[number % 3]: {"type": "string"}}}],
        }
        for number, record in enumerate(conversations(40))
    ]
    assert (
        ChatEncoder(model).render(records[1]).startswith('[{"name": "f", "parameters": {"day": {"type": "string"}}}]')
    )
    as_text = [record | {"tools": json.dumps(record["tools"]) if "tools" in record else None} for record in records]
    for name, rows in (("objects", records), ("text", as_text)):
        table = pa.table({column: [row.get(column) for row in rows] for column in ("messages", "tools")})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        write_lines(tmp_path / f"{name}.jsonl", rows)
    common: dict[str, Any] = {"tokenizer": str(model), "chat": True, "workers": 1}
    digests = [
        prepare(str(tmp_path / name), str(tmp_path / f"{name}.out"), **common)["digests"]
        for name in ("objects.jsonl", "objects.parquet", "text.jsonl", "text.parquet")
    ]
    assert digests == digests[:1] * 4


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "a"}, "line 3: has no list in the field 'messages' (found: 'text')"),
        ([], "line 3: has no list in the field 'messages' (found: a list)"),
        ({"conversations": []}, "set --text-field to the field with the messages, perhaps 'conversations'"),
        ({"messages": []}, "line 3: has no messages"),
        ({"messages": [{"from": "tool", "value": "a"}]}, "line 3: message 1 is \"from\" 'tool', but only human, user,"),
        ({"messages": [{"content": "a"}]}, 'line 3: message 1 has no "role"'),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, 'line 3: message 2 has no "content"'),
        ({"messages": MESSAGES}, "line 3: the chat template of"),
        ({"messages": MESSAGES[1:], "tools": "[1"}, "line 3: the text in 'tools' is not JSON ("),
        ({"messages": MESSAGES[1:], "tools": {"a": 1}}, "line 3: 'tools' is a dict and not a list; write a list"),
    ],
)
def test_prepare_names_the_line_that_it_cannot_use(
    tmp_path: Path, tokenizer_text: str, record: Any, problem: str
) -> None:
    model = folder_with(tmp_path, tokenizer_text, STRICT + CHATML)
    good = {"messages": MESSAGES[1:3]}
    lines = write_lines(tmp_path / "chat.jsonl", [good, {"messages": MESSAGES[3:]}, record])
    with pytest.raises(DataError) as caught:
        prepare(str(lines), str(tmp_path / "data"), tokenizer=str(model), chat=True, workers=2)
    assert str(caught.value).startswith(f"{lines}: line 3: ")
    assert problem in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_options_that_do_not_fit_conversations() -> None:
    with pytest.raises(ConfigError) as caught:
        prepare("x.jsonl", "out", chat=True, split_by="line", max_document_bytes=100)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["chat", "max_document_bytes", "chat"]
