"""Check for each special token that training data has what the stored tokenizer produces from the same text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")
from tokenizers import Tokenizer, processors

from tests.helpers.models import KINDS
from tests.helpers.tokenizers import FAMILIES, TEXTS, write_tokenizer
from tinytrain_dist.data.preparation.prepare import prepare
from tinytrain_dist.errors import ConfigError, DataError
from tinytrain_dist.model.huggingface_config import to_hf_config

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test uses the network

SPELLED = "<|im_start|>user <think><s><|begin_of_text|> hi<unk><pad>"
DOCUMENTS = [f"{number} {TEXTS[number % 2]}" for number in range(30)] + [f"{n}{SPELLED}" for n in range(10)]


def prepared(folder: Path, family: str, spelled: str = "text", **settings: Any) -> tuple[Path, dict[str, Any]]:
    """Token files of DOCUMENTS, and their meta.json."""
    source = write_tokenizer(folder / family, family, **settings)
    lines = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS)
    (folder / "a.jsonl").write_text(lines)
    out = folder / "out"
    options: dict[str, Any] = {"tokenizer": str(source), "special_tokens": spelled, "workers": 1, "overwrite": True}
    return out, prepare((str(folder / "a.jsonl"),), str(out), **options)


def trained_documents(out: Path, eos_id: int) -> list[list[int]]:
    """The documents of both token files, each with the token that ends it."""
    documents = []
    for side in ("train", "val"):
        ids = np.load(out / f"{side}.npy")
        documents += [part.tolist() for part in np.split(ids, np.where(ids == eos_id)[0] + 1)[:-1]]
    return sorted(documents)


@pytest.mark.parametrize("spelled", ["text", "ids"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_in_training_is_what_the_stored_tokenizer_makes_of_it(
    tmp_path: Path, family: str, spelled: str
) -> None:
    transformers = pytest.importorskip("transformers")
    out, meta = prepared(tmp_path, family, spelled)
    documents = trained_documents(out, meta["eos_id"])
    assert len(documents) == len(DOCUMENTS)
    for kind in (None, "plain", "qwen3"):  # alone, and with the config.json of a checkpoint, which may choose a class
        if kind:
            (out / "config.json").write_text(json.dumps(to_hf_config(KINDS[kind], meta["eos_id"], meta["bos_id"])))
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        of_texts = [tokenizer(document)["input_ids"] for document in DOCUMENTS]
        ended = [ids if ids[-1] == meta["eos_id"] else [*ids, meta["eos_id"]] for ids in of_texts]
        assert sorted(ended) == documents, kind
        assert tokenizer.eos_token_id == meta["eos_id"]
        assert len(tokenizer) == meta["vocab_size"], "no token was added"
    if tokenizer.bos_token_id is not None and meta["bos_id"] is not None:
        assert tokenizer.bos_token_id == meta["bos_id"]


BEGINNINGS = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "gpt2": None, "qwen": None, "t5": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_beginning_and_the_end_are_the_tokenizers_own(tmp_path: Path, family: str) -> None:
    out, meta = prepared(tmp_path, family)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    begin = BEGINNINGS[family]
    first = tokenizer.token_to_id(begin) if begin else None
    assert meta["bos_id"] == first
    assert meta["tokenizer"]["ids_before_document"] == ([] if first is None else [first])
    assert meta["tokenizer"]["ids_after_document"] == [meta["eos_id"]]
    for document in trained_documents(out, meta["eos_id"]):
        assert document.count(meta["eos_id"]) == 1
        assert first is None or (document[0] == first and document.count(first) == 1)
    source = tmp_path / family / "tokenizer.json"
    assert (out / "tokenizer.json").read_bytes() == source.read_bytes(), "nothing had to change"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_special_token_is_reported(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path, family)
    said = capsys.readouterr().err
    begin = BEGINNINGS[family]
    assert (f"{begin!r} (" in said and "begins every document" in said) if begin else "no token begins" in said
    assert "ends every document" in said
    assert "pads" in said
    assert ("special tokens that a text spells" in said) == (family != "gpt2")
    assert ("WARNING: its chat template is left out" in said) == (family in ("llama3", "qwen"))
    assert ("WARNING: this tokenizer puts '</s>' (1) after every text" in said) == (family == "t5")
    assert ("documents spell special tokens" in said) == (family != "gpt2")


def test_names_of_tokens_and_the_chat_template_are_kept(tmp_path: Path) -> None:
    out, _ = prepared(tmp_path, "qwen")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": True,
    }
    out, _ = prepared(tmp_path, "qwen", "ids")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["split_special_tokens"] is False
    assert "<|im_start|>" in config["chat_template"]
    source = tmp_path / "llama3"
    out, _ = prepared(tmp_path, "llama3", "ids", chat_template=None)
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    (source / "chat_template.jinja").write_text("{{ messages }}")
    out, _ = prepared(tmp_path, "llama3", "ids", chat_template=None)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("family", ["llama3", "qwen", "gpt2"])
@pytest.mark.parametrize("add", [True, False])
def test_add_bos_token_is_obeyed_and_stored(
    tmp_path: Path, family: str, add: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    bos = {"qwen": "<|im_start|>", "gpt2": "<|endoftext|>", "llama3": "<|begin_of_text|>"}[family]
    out, meta = prepared(tmp_path, family, add_bos_token=add, bos_token=bos)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert meta["bos_id"] == (tokenizer.token_to_id(bos) if add else None)
    assert (tokenizer.encode("x").ids[0] == meta["bos_id"]) == add
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs("x")["input_ids"] == tokenizer.encode("x").ids
    assert (f"says add_bos_token = {str(add).lower()}" in capsys.readouterr().err) == (add == (family != "llama3"))


def test_the_advice_on_a_tokenizer_that_ends_prompts_works(tmp_path: Path) -> None:
    out, meta = prepared(tmp_path, "t5", add_eos_token=False)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert meta["eos_id"] not in tokenizer.encode("x").ids
    assert all(document[-1] == meta["eos_id"] for document in trained_documents(out, meta["eos_id"]))
    # one of the two settings leaves the other side as it is
    out, meta = prepared(tmp_path, "llama2", add_eos_token=False, add_bos_token=None)
    assert meta["bos_id"] == 1


def test_names_without_a_token_in_the_tokenizer_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = {"400": {"content": "<|extra|>", "special": True}}
    out, meta = prepared(tmp_path, "llama3", pad_token="[PAD]", added_tokens_decoder=decoder)
    said = capsys.readouterr().err
    assert "WARNING: left out, because tokenizer.json does not list it among its added tokens" in said
    assert "pad_token '[PAD]', '<|extra|>'" in said
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert "pad_token" not in config
    assert "added_tokens_decoder" not in config
    assert meta["vocab_size"] <= 320, "the token with id 400 is not counted"


def test_settings_that_would_cut_and_pad_are_not_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tokenizer(tmp_path / "plain", "llama3")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_id=1, pad_token="<|end_of_text|>", length=50)
    tokenizer.save(str(source / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    prepare((str(tmp_path / "a.txt"),), str(tmp_path / "out"), tokenizer=str(source), workers=1)
    stored = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (stored.truncation, stored.padding) == (None, None)
    assert "neither cut nor padded" in capsys.readouterr().err
    assert max(map(len, trained_documents(tmp_path / "out", 1))) > 10


def test_an_end_that_text_can_produce_is_refused(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "t", "llama3")
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    with pytest.raises(DataError, match=r"'a' is no special token of this tokenizer.*--eos-token"):
        prepare((str(tmp_path / "a.txt"),), str(tmp_path / "out"), tokenizer=str(source), eos_token="a", workers=1)


def test_a_post_processor_that_changes_the_text_itself_is_refused(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "t", "llama3")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    end = [("<|end_of_text|>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <|end_of_text|> $A", special_tokens=end)
    tokenizer.save(str(source / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    with pytest.raises(DataError, match="post-processor does more than to put tokens before and after a text"):
        prepare((str(tmp_path / "a.txt"),), str(tmp_path / "out"), tokenizer=str(source), workers=1)


def test_special_tokens_as_ids_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="special_tokens: ids has no effect without tokenizer"):
        prepare(("stdlib",), str(tmp_path / "out"), special_tokens="ids")
