"""Make small tokenizers of well-known families, each as a folder that transformers could have saved.

Must not know what is done with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["the wolf ran home again, naïve as 1234 wolves\n", "A lamb slept.  Nobody saw it — 北京\n"] * 40
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def _byte_level(special: list[str], regex: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if regex is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _template(tokenizer: Tokenizer, single: str, *tokens: str) -> processors.TemplateProcessing:
    ids = [(token, tokenizer.token_to_id(token)) for token in tokens]
    return processors.TemplateProcessing(
        single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=ids
    )


def _llama2() -> tuple[Tokenizer, dict[str, Any]]:
    """SentencePiece as BPE: a space before each text, bytes as tokens."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([text.strip() for text in TEXTS], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = _template(tokenizer, "<s> $A", "<s>")
    roles = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "unk_token": {"content": "<unk>"}}
    return tokenizer, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False, **roles}


def _llama3() -> tuple[Tokenizer, dict[str, Any]]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(special, r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    begin = _template(tokenizer, "<|begin_of_text|> $A", "<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    roles = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1]}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, **roles}


def _gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = _byte_level(["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return tokenizer, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **roles}


def _qwen() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = _byte_level([], r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "chat_template": CHAT, **roles}


def _t5() -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer that ends every text."""
    tokenizer = _byte_level(["<pad>", "</s>"])
    tokenizer.post_processor = _template(tokenizer, "$A </s>", "</s>")
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}


FAMILIES = {"llama2": _llama2, "llama3": _llama3, "gpt2": _gpt2, "qwen": _qwen, "t5": _t5}


def write_tokenizer(folder: Path, family: str, **settings: Any) -> Path:
    """Write a family's tokenizer.json and tokenizer_config.json; `settings` change the latter."""
    tokenizer, config = FAMILIES[family]()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    return folder
