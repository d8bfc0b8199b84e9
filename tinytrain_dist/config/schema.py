"""The settings of a run: `TrainingConfig`, one flat frozen value that is checked when it is made.

Must not know torch, files, ranks or devices: a login node checks a run in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tinytrain_dist.errors import ConfigError

Mode = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
IDENTITY_SETTINGS = tuple(  # what makes a run this run: a resume with another value is refused
    "vocab_size num_layers num_heads num_kv_heads head_dim d_model d_ff rope_theta rope_scaling_factor "
    "rope_original_context_len rope_low_freq_factor rope_high_freq_factor tie_embeddings qk_norm norm_eps "
    "context_len batch_size seed train_weights".split()
)
SECTIONS = ("run", "data", "model", "optimizer", "parallel", "checkpoint")


def _setting(section: str, default: Any, help: str) -> Any:
    """Declare a field of TrainingConfig: the TOML heading it belongs under, its default, one sentence for --help."""
    return field(default=default, metadata={"section": section, "help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what is trained, and how; a frozen value, checked when it is made.

    Construction raises ConfigError with every problem at once. Derived facts (`ffn_dim`, `checkpoints_dir`, ...)
    are properties, so that `dataclasses.replace(config, d_model=512)` never leaves a stale value behind.
    """

    target_dir: str = _setting("run", "runs/default", "folder of this run: settings, logs and checkpoints")
    seed: int = _setting(
        "run", 0, "random seed of the initial weights and of every drawn window, on any number of ranks"
    )
    device: Literal["auto", "cpu", "cuda"] = _setting("run", "auto", "auto: cuda where there is one, else cpu")
    total_steps: int = _setting("run", 40_000, "optimizer steps of the whole run")
    stop_at_step: int | None = _setting("run", None, "stop early after this step; the schedule still spans total_steps")
    time_limit: float | None = _setting("run", None, "seconds after which the run saves and stops")
    start_limit: float = _setting(
        "run",
        1800.0,
        "abort if joining, opening data, building or loading takes more seconds than this, each (0: no limit)",
    )
    step_limit: float = _setting(
        "run", 1800.0, "abort as hung after this many seconds without progress in a step or evaluation (0: never)"
    )
    log_every: int = _setting("run", 10, "steps between log lines")
    eval_every: int = _setting("run", 1000, "steps between evaluations")
    eval_steps: int = _setting("run", 10, "batches of batch_size windows in one evaluation; the same windows all run")
    early_stop_patience: int | None = _setting(
        "run", None, "evaluations in a row without a better loss after which the run stops; each best is saved"
    )
    sample_tokens: int = _setting(
        "run", 32, "tokens of each sample text written at an evaluation (0: no samples); needs tokenizer.json"
    )
    profile: str | None = _setting("run", None, "START:STOP, steps whose trace rank 0 writes to log_dir/profile")
    log_dir: str | None = _setting("run", None, "None: target_dir/logs")
    log_save_prefix: str = _setting("run", "metrics", "name of the plain record: metrics.jsonl")
    resume: str = _setting("run", "auto", "auto (newest valid checkpoint of this run, if any) | never | a checkpoint")
    ckpt_path_to_resume: str | None = _setting("run", None, "a checkpoint folder; the same as resume = PATH")
    allow: str | None = _setting("run", None, "comma-separated settings that may differ from the checkpoint on resume")
    init_from: str | None = _setting("run", None, "start from the weights in this Hugging Face folder (Llama or Qwen3)")

    train_data: str | tuple[str, ...] | None = _setting("data", None, "token file (.npy) to train on, or several")
    train_weights: tuple[float, ...] | None = _setting(
        "data", None, "sampling weight of each file of train_data; None: every window is equally likely"
    )
    val_data: str | tuple[str, ...] | None = _setting(
        "data", None, "token file (.npy) to evaluate on, or several, each by itself; None: no evaluation"
    )
    batch_size: int = _setting("data", 32, "sequences per optimizer step over ALL ranks")
    micro_batch_size: int | Literal["auto"] | None = _setting(
        "data", None, "sequences in one forward pass on one rank; None: all of them; auto: what fits in memory"
    )
    context_len: int = _setting("data", 256, "tokens per sequence")

    vocab_size: int | None = _setting("model", None, "None: taken from meta.json beside train_data")
    num_layers: int = _setting("model", 4, "transformer blocks")
    num_heads: int = _setting("model", 16, "query heads")
    num_kv_heads: int | None = _setting("model", None, "key/value heads (grouped-query attention); None: num_heads")
    head_dim: int | None = _setting("model", None, "width of one head; None: d_model / num_heads")
    d_model: int = _setting("model", 512, "width of the residual stream")
    d_ff: int | None = _setting("model", None, "width of the feed-forward; None: 8/3 d_model, up to a multiple of 64")
    rope_theta: float = _setting("model", 10_000.0, "base of the rotary frequencies")
    rope_scaling_factor: float | None = _setting("model", None, "Llama-3 rotary scaling; None: no scaling")
    rope_original_context_len: int | None = _setting("model", None, "context length before scaling")
    rope_low_freq_factor: float = _setting("model", 1.0, "Llama-3 rotary scaling: where the low band ends")
    rope_high_freq_factor: float = _setting("model", 4.0, "Llama-3 rotary scaling: where the high band starts")
    tie_embeddings: bool = _setting("model", False, "output head shares the embedding's weight")
    qk_norm: bool = _setting("model", False, "RMSNorm on queries and keys (Qwen3)")
    norm_eps: float = _setting("model", 1e-5, "epsilon of every RMSNorm")

    lr_max: float = _setting("optimizer", 1e-3, "learning rate after warm-up")
    lr_min: float = _setting("optimizer", 1e-4, "learning rate at the end of the schedule")
    schedule: Literal["cosine", "wsd", "constant"] = _setting("optimizer", "cosine", "shape after warm-up")
    warmup_iters: int | None = _setting("optimizer", None, "steps of linear warm-up; None: 1 % of total_steps")
    cosine_iters: int | None = _setting("optimizer", None, "step at which the cosine ends; None: total_steps")
    decay_iters: int | None = _setting("optimizer", None, "wsd: steps of the final decay; None: 10 % of total_steps")
    betas: tuple[float, float] = _setting("optimizer", (0.9, 0.95), "AdamW: decay rates of the moments")
    eps: float = _setting("optimizer", 1e-8, "AdamW: added to the denominator")
    weight_decay: float = _setting("optimizer", 0.1, "AdamW: decoupled decay of matrices (norm weights do not decay)")
    grad_clip_norm: float | None = _setting("optimizer", 1.0, "largest global gradient norm; None: no clipping")
    max_skipped_steps: int = _setting("optimizer", 10, "non-finite steps in a row after which the run stops")

    parallel: Mode = _setting("parallel", "auto", "auto | none | ddp | fsdp | hsdp")
    dp_replicate: int | None = _setting("parallel", None, "hsdp: number of replicas")
    dp_shard: int | None = _setting("parallel", None, "hsdp: ranks that share one replica")
    precision: Literal["fp32", "bf16"] = _setting("parallel", "fp32", "compute type; weights and sums stay float32")
    compile: bool | None = _setting(
        "parallel", None, "torch.compile every block and the loss; None: if the run is long enough to pay for it"
    )
    activation_checkpointing: Literal["none", "block", "selective"] = _setting(
        "parallel", "none", "recompute in backward: nothing, whole blocks, all but matrix products"
    )
    loss_chunk_tokens: int | None = _setting(
        "parallel", None, "tokens per chunk of output head and loss; None: as many as give 2**24 logits"
    )
    reproducible: bool = _setting("parallel", False, "give the same bits on any number of ranks and in any mode")
    allow_drift: bool = _setting(
        "parallel", False, "with reproducible: resume although something that decides bits has changed"
    )
    cpu_threads: int | None = _setting(
        "parallel", None, "threads per process; None: OMP_NUM_THREADS, or 1 if reproducible"
    )
    fingerprint_every: int | None = _setting(
        "parallel", None, "steps between bitwise comparisons of replicas; None: only with each save"
    )

    ckpt_every: int = _setting("checkpoint", 1000, "steps between checkpoints")
    ckpt_dir: str | None = _setting("checkpoint", None, "None: target_dir/checkpoints")
    ckpt_save_prefix: str = _setting("checkpoint", "checkpoint", "folders are named PREFIX-00001000")
    keep_last: int = _setting("checkpoint", 2, "number of newest checkpoints to keep")
    keep_every: int | None = _setting("checkpoint", None, "keep checkpoints at multiples of this step for ever")
    ckpt_async: bool = _setting(
        "checkpoint", True, "save in the background; a crash then loses up to one interval and the duration of a save"
    )
    ckpt_writers: int = _setting("checkpoint", 1, "ranks that write files of a checkpoint at the same time")
    save_limit: float = _setting(
        "checkpoint", 3600.0, "abort as hung when a step waits this many seconds for a save (0: no limit)"
    )
    max_shard_bytes: int = _setting("checkpoint", 2 * 1024**3, "largest file of a checkpoint")

    def __post_init__(self) -> None:
        """Raise ConfigError with everything that is wrong; whole numbers become floats where floats are meant."""
        problems = []
        for name in FIELDS:
            value, problem = _coerce(name, getattr(self, name))
            if problem:
                problems.append(problem)
            else:
                object.__setattr__(self, name, value)
        from tinytrain_dist.config.validation import find_problems  # not at the top: it imports this module

        problems = problems or find_problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward: d_ff, or 8/3 d_model rounded up to a multiple of 64."""
        return self.d_ff or 64 * math.ceil(8 * self.d_model / (3 * 64))

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def fixed_micro_batch_size(self) -> int | None:
        """micro_batch_size where it is a number."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return self.total_steps // 100 if self.warmup_iters is None else self.warmup_iters

    @property
    def cosine_end(self) -> int:
        """Step at which the schedule reaches lr_min."""
        return self.cosine_iters or self.total_steps

    @property
    def decay_steps(self) -> int:
        """Steps of the final decay of the WSD schedule."""
        return max(1, self.total_steps // 10) if self.decay_iters is None else self.decay_iters

    @property
    def last_step(self) -> int:
        """The step after which this process stops: stop_at_step or total_steps."""
        return min(self.total_steps, self.stop_at_step or self.total_steps)

    @property
    def checkpoints_dir(self) -> Path:
        """Folder that holds the checkpoints."""
        return Path(self.ckpt_dir) if self.ckpt_dir else Path(self.target_dir) / "checkpoints"

    @property
    def logs_dir(self) -> Path:
        """Folder that holds TensorBoard events and the plain record."""
        return Path(self.log_dir) if self.log_dir else Path(self.target_dir) / "logs"

    @property
    def train_files(self) -> tuple[str, ...]:
        """The files of train_data."""
        return (self.train_data,) if isinstance(self.train_data, str) else self.train_data or ()

    @property
    def val_files(self) -> tuple[str, ...]:
        """The files of val_data."""
        return (self.val_data,) if isinstance(self.val_data, str) else self.val_data or ()

    @property
    def resume_from(self) -> str:
        """`auto`, `never` or the path of a checkpoint."""
        return self.ckpt_path_to_resume or self.resume

    @property
    def profiled_steps(self) -> range:
        """The steps named in `profile`, both ends included."""
        start, _, stop = (self.profile or "0:-1").partition(":")
        return range(int(start), int(stop) + 1)

    @property
    def allowed_changes(self) -> set[str]:
        """The settings named in `allow`."""
        return {name.strip() for name in (self.allow or "").split(",") if name.strip()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, tuples as lists; `from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the configuration") -> TrainingConfig:
        """Build from plain values. Errors: ConfigError naming unknown keys, wrong types and bad values at once."""
        wrong = {key: problem for key, value in values.items() if (problem := _coerce(key, value)[1])}
        good, problems = {key: value for key, value in values.items() if key not in wrong}, list(wrong.values())
        try:
            config = cls(**good)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems], source) from None
        if problems:
            raise ConfigError(problems, source)
        return config

    def resolved(self) -> dict[str, Any]:
        """`to_dict` with the sizes that follow from others written out, so that two ways to say the same are equal."""
        sizes = {"d_ff": self.ffn_dim, "num_kv_heads": self.kv_heads, "head_dim": self.head_width}
        return {**self.to_dict(), **sizes}

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML, with derived sizes written out; None is left out."""
        resolved = self.resolved()
        lines = ["# the resolved configuration of this run, written by tinytrain_dist"]
        for section in SECTIONS:
            lines.append(f"\n[{section}]")
            names = [f.name for f in dataclasses.fields(self) if f.metadata["section"] == section]
            lines += [f"{n} = {_to_toml_value(resolved[n])}" for n in names if resolved[n] is not None]
        return "\n".join(lines) + "\n"


FIELDS = {f.name: f for f in dataclasses.fields(TrainingConfig)}
HINTS = get_type_hints(TrainingConfig)


def _coerce(key: str, value: Any) -> tuple[Any, str]:
    """Return the value with its declared type, or a sentence that says why it cannot have that type."""
    if key not in FIELDS:
        return None, f"{key}: unknown setting{_nearest(key)}"
    for option in get_args(HINTS[key]) if _is_union(HINTS[key]) else (HINTS[key],):
        with contextlib.suppress(TypeError):
            return _convert(option, value), ""
    return None, f"{key}: {value!r} is not {_describe(HINTS[key])}"


def _convert(kind: Any, value: Any) -> Any:
    """Convert a value to the declared type of a field. Errors: TypeError if it cannot be converted."""
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        inner = get_args(kind)
        if len(value) == len(inner) or (value and inner[-1] is Ellipsis):
            return tuple(_convert(inner[0], item) for item in value)
    elif value is None and kind is type(None):
        return None
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    elif kind is str and isinstance(value, Path):
        return str(value)
    raise TypeError


def _to_toml_value(value: Any) -> str:
    # JSON, but for two differences: TOML knows no pairs of escapes for rarer characters, and no bare DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_union(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _describe(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "None",
    }
    if _is_union(hint):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"a list of {names[inner[0]][2:]}s" if inner[-1] is Ellipsis else "two numbers"
    return names[hint]


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), FIELDS, n=1)
    return f"; did you mean {close[0]}?" if close else "; launch/train.py --help lists all of them"
