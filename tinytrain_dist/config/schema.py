"""Define all settings of a run: `TrainingConfig`, one flat frozen dataclass that is checked when it is created.

Must not know torch, files, ranks or devices, so that a login node can check a run in a tenth of a second. The
architecture of the model is in model_config.py, the checks of values are in validation.py, and their types in
type_conversion.py.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from tinytrain_dist.config.model_config import MODEL_SETTINGS, ModelConfig
from tinytrain_dist.config.run_folder import CHECKPOINTS_FOLDER, LOGS_FOLDER
from tinytrain_dist.config.type_conversion import convert_value, describe_type, to_toml_value
from tinytrain_dist.config.validation import IDENTITY_SETTINGS as IDENTITY_SETTINGS
from tinytrain_dist.config.validation import find_problems
from tinytrain_dist.errors import ConfigError

Mode = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
Sampling = Literal["random", "shuffle"]
Packing = Literal["none", "best_fit"]
TokenType = Literal["uint16", "uint32", "int32"]
Precision = Literal["auto", "fp32", "bf16", "fp8"]
BF16_PRECISIONS = ("bf16", "fp8")  # blocks compute in bf16; with fp8, all but the products of their linear layers
SECTIONS = ("run", "data", "model", "optimizer", "parallel", "compute", "checkpoint")  # of a TOML file, in this order
HELP_COMMAND = "tinytrain config --help"


def _setting(section: str, default: Any, help: str) -> Any:
    """Return a field of TrainingConfig. section: of the TOML file; help: one sentence for --help."""
    return field(default=default, metadata={"section": section, "help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """All settings of a training run; a frozen dataclass, checked when it is created.

    Construction raises ConfigError with all problems at once. Derived values (`ffn_dim`, `checkpoints_dir`, ...) are
    properties, so that `dataclasses.replace(config, d_model=512)` never leaves a stale value behind.
    """

    target_dir: str = _setting("run", "runs/default", "folder of this run: settings, logs and checkpoints")
    seed: int = _setting("run", 0, "seed of initial weights and training windows, for any number of ranks")
    device: Literal["auto", "cpu", "cuda"] = _setting("run", "auto", "auto: cuda if available, else cpu")
    total_steps: int = _setting("run", 40_000, "optimizer steps of the whole run")
    epochs: float | None = _setting("run", None, "passes over train_data, instead of total_steps (None: total_steps)")
    stop_at_step: int | None = _setting(
        "run", None, "stop after this step (None: total_steps); the learning rate still follows total_steps"
    )
    time_limit: float | None = _setting("run", None, "save and stop after this many seconds (None: no limit)")
    start_limit: float = _setting("run", 1800.0, "abort if start-up takes more than this many seconds (0: never)")
    step_limit: float = _setting(
        "run", 1800.0, "abort as hung after this many seconds without progress in a step or evaluation (0: never)"
    )
    log_every: int = _setting("run", 10, "steps between log lines")
    eval_every: int = _setting("run", 1000, "steps between evaluations")
    eval_steps: int = _setting("run", 10, "batches of batch_size windows per evaluation, the same every time")
    early_stop_patience: int | None = _setting(
        "run", None, "stop after this many evaluations without a new lowest loss (None: never); each lowest is saved"
    )
    sample_tokens: int = _setting(
        "run", 32, "tokens to generate in each sample text at an evaluation (0: disabled); needs a tokenizer.json"
    )
    profile: str | None = _setting("run", None, "START:STOP: rank 0 traces these steps to log_dir/profile (None: off)")
    log_dir: str | None = _setting("run", None, "folder of logs and TensorBoard events (None: target_dir/logs)")
    log_save_prefix: str = _setting("run", "metrics", "name of the metrics file, without .jsonl")
    trackers: tuple[str, ...] = _setting("run", ("tensorboard",), "any of tensorboard, wandb, mlflow, MODULE:CLASS")
    resume: str = _setting("run", "auto", "auto (from the newest valid checkpoint), never, or the path of a checkpoint")
    ckpt_path_to_resume: str | None = _setting("run", None, "path of a checkpoint; the same as resume = PATH")
    allow: str | None = _setting(
        "run", None, "comma-separated settings that may differ from the checkpoint on resume (None: none)"
    )
    init_from: str | None = _setting(
        "run", None, "folder with Hugging Face Llama or Qwen3 weights to start from (None: random weights from seed)"
    )

    train_data: str | tuple[str, ...] | None = _setting("data", None, "token file, folder or glob, or several of them")
    sampling: Sampling = _setting("data", "random", "random windows, or shuffle: each token is a target once per epoch")
    train_weights: tuple[float, ...] | tuple[str, ...] | None = _setting(
        "data", None, "weight of each entry of train_data, or phases 'STEP: WEIGHT ...' (None: by number of windows)"
    )
    val_data: str | tuple[str, ...] | None = _setting(
        "data", None, "as train_data, to evaluate on; several are evaluated separately (None: no evaluation)"
    )
    token_dtype: TokenType | None = _setting("data", None, "type of IDs in files without a header (None: not stated)")
    batch_size: int = _setting("data", 32, "sequences per optimizer step over ALL ranks")
    micro_batch_size: int | Literal["auto"] | None = _setting(
        "data", None, "sequences per forward pass of one rank (auto: what fits in memory; None: auto on GPUs, else all)"
    )
    context_len: int = _setting("data", 256, "tokens per sequence")
    loss_mask: bool = _setting("data", False, "count only those targets that the mask file beside a token file marks")
    packing: Packing = _setting("data", "none", "best_fit: documents are packed into windows, not cut where they fit")
    document_mask: bool = _setting("data", False, "attention stays within documents, and positions restart in each")

    vocab_size: int | None = _setting("model", None, "size of the vocabulary (None: from meta.json beside train_data)")
    num_layers: int = _setting("model", 4, "number of transformer blocks")
    num_heads: int = _setting("model", 16, "number of query heads")
    num_kv_heads: int | None = _setting("model", None, "number of key/value heads (None: num_heads)")
    head_dim: int | None = _setting("model", None, "width of one head (None: d_model / num_heads)")
    d_model: int = _setting("model", 512, "width of the residual stream")
    d_ff: int | None = _setting(
        "model", None, "width of the feed-forward layer (None: 8/3 d_model, rounded up to a multiple of 64)"
    )
    rope_theta: float = _setting("model", 10_000.0, "base of the rotary frequencies")
    rope_scaling_factor: float | None = _setting("model", None, "Llama 3 rotary scaling: factor (None: no scaling)")
    rope_original_context_len: int | None = _setting("model", None, "Llama 3 rotary scaling: original context length")
    rope_low_freq_factor: float = _setting("model", 1.0, "Llama 3 rotary scaling: end of the low-frequency band")
    rope_high_freq_factor: float = _setting("model", 4.0, "Llama 3 rotary scaling: start of the high-frequency band")
    tie_embeddings: bool = _setting("model", False, "share the embedding's weight with the output head")
    qk_norm: bool = _setting("model", False, "RMSNorm on queries and keys (Qwen3)")
    norm_eps: float = _setting("model", 1e-5, "epsilon of every RMSNorm")

    lr_max: float = _setting("optimizer", 1e-3, "highest learning rate, at the end of the warm-up")
    lr_min: float = _setting("optimizer", 1e-4, "learning rate at the end of the schedule")
    schedule: Literal["cosine", "wsd", "constant"] = _setting("optimizer", "cosine", "learning-rate schedule")
    warmup_iters: int | None = _setting("optimizer", None, "steps of linear warm-up (None: 1 % of total_steps)")
    cosine_iters: int | None = _setting("optimizer", None, "step at which the cosine ends (None: total_steps)")
    decay_iters: int | None = _setting("optimizer", None, "wsd: steps of the final decay (None: 10 % of total_steps)")
    betas: tuple[float, float] = _setting("optimizer", (0.9, 0.95), "AdamW: decay rates of the two moments")
    eps: float = _setting("optimizer", 1e-8, "AdamW: added to the denominator")
    weight_decay: float = _setting("optimizer", 0.1, "AdamW: decoupled decay of matrices (norm weights do not decay)")
    grad_clip_norm: float | None = _setting("optimizer", 1.0, "clip gradients to this global norm (None: no clipping)")
    max_skipped_steps: int = _setting("optimizer", 10, "stop after skipping this many non-finite steps in a row")

    parallel: Mode = _setting("parallel", "auto", "data-parallel mode (auto: chosen by number of ranks and model size)")
    dp_replicate: int | None = _setting("parallel", None, "hsdp: number of replicas")
    dp_shard: int | None = _setting("parallel", None, "hsdp: ranks that share one replica")
    reshard_after_forward: bool | None = _setting(
        "parallel", None, "fsdp, hsdp: gather weights again for backward (None: unless GPUs have memory to keep them)"
    )
    precision: Precision = _setting("compute", "auto", "type in which blocks compute (auto: bf16 on GPUs, else fp32)")
    compile: bool | None = _setting(
        "compute", None, "compile each block and the loss with torch.compile (None: if the run is long enough to gain)"
    )
    activation_checkpointing: Literal["none", "block", "selective"] = _setting(
        "parallel", "none", "what backward recomputes: nothing, whole blocks, or all except matrix products (selective)"
    )
    loss_chunk_tokens: int | None = _setting(
        "compute", None, "tokens per chunk of output head and loss (None: as many as give 2**24 logits)"
    )
    reproducible: bool = _setting("compute", False, "same bits on any number of ranks and in any data-parallel mode")
    allow_drift: bool = _setting(
        "compute", False, "with reproducible: resume even if a setting or version that affects bits has changed"
    )
    cpu_threads: int | None = _setting(
        "compute", None, "CPU threads per process (None: OMP_NUM_THREADS, or 1 if reproducible)"
    )
    fingerprint_every: int | None = _setting(
        "parallel", None, "steps between comparisons of the replicas' bits (None: only at each save)"
    )

    ckpt_every: int = _setting("checkpoint", 1000, "steps between checkpoints")
    ckpt_dir: str | None = _setting("checkpoint", None, "folder of the checkpoints (None: target_dir/checkpoints)")
    ckpt_save_prefix: str = _setting("checkpoint", "checkpoint", "PREFIX in the names of checkpoints, PREFIX-00001000")
    keep_last: int = _setting("checkpoint", 2, "number of newest checkpoints to keep")
    keep_every: int | None = _setting("checkpoint", None, "also keep checkpoints at multiples of this step (None: off)")
    ckpt_async: bool = _setting(
        "checkpoint", True, "save in the background; a crash can then also lose the steps computed during a save"
    )
    ckpt_writers: int | None = _setting(
        "checkpoint", None, "number of ranks that write files of a checkpoint at the same time (None: one on each node)"
    )
    save_limit: float = _setting(
        "checkpoint", 3600.0, "abort as hung if a step waits longer than this many seconds for a save (0: never)"
    )
    max_shard_bytes: int = _setting("checkpoint", 2 * 1024**3, "largest file of a checkpoint, in bytes")

    def __post_init__(self) -> None:
        """Check all settings, and convert whole numbers to float where float is declared. Errors: ConfigError."""
        problems = []
        for name in FIELDS:
            value, problem = _convert_setting(name, getattr(self, name))
            if problem:
                problems.append(problem)
            else:
                object.__setattr__(self, name, value)
        problems = problems or find_problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def model(self) -> ModelConfig:
        """The architecture alone: the value that a model is built from."""
        return ModelConfig(**{name: getattr(self, name) for name in MODEL_SETTINGS})

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer; see ModelConfig."""
        return self.model.ffn_dim

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads; see ModelConfig."""
        return self.model.kv_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head; see ModelConfig."""
        return self.model.head_width

    @property
    def fixed_micro_batch_size(self) -> int | None:
        """The value of micro_batch_size if it is a number, else None."""
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
        return Path(self.ckpt_dir) if self.ckpt_dir else Path(self.target_dir) / CHECKPOINTS_FOLDER

    @property
    def logs_dir(self) -> Path:
        """Folder that holds TensorBoard events and the metrics file."""
        return Path(self.log_dir) if self.log_dir else Path(self.target_dir) / LOGS_FOLDER

    @property
    def train_files(self) -> tuple[str, ...]:
        """The entries of train_data: files, folders, globs; () if it is not set."""
        return (self.train_data,) if isinstance(self.train_data, str) else self.train_data or ()

    @property
    def val_files(self) -> tuple[str, ...]:
        """The entries of val_data: files, folders, globs; () if it is not set."""
        return (self.val_data,) if isinstance(self.val_data, str) else self.val_data or ()

    @property
    def counts_tokens(self) -> bool:
        """Whether some targets may not count in the loss, so that every step and evaluation counts those that do."""
        # the end of a shuffled epoch has fewer targets, and packed windows have room that is not used
        return self.loss_mask or self.document_mask or self.sampling == "shuffle" or self.packing != "none"

    @property
    def resume_from(self) -> str:
        """Where to resume from: `auto`, `never` or the path of a checkpoint."""
        return self.ckpt_path_to_resume or self.resume

    @property
    def profiled_steps(self) -> range:
        """The steps named in `profile`, both ends included."""
        start, _, stop = (self.profile or "0:-1").partition(":")  # 0:-1 gives an empty range
        return range(int(start), int(stop) + 1)

    @property
    def allowed_changes(self) -> set[str]:
        """The settings named in `allow`."""
        return {name.strip() for name in (self.allow or "").split(",") if name.strip()}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, with tuples as lists. `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the configuration") -> TrainingConfig:
        """Return a configuration with these settings. Errors: ConfigError with all unknown names and bad values."""
        return _config_from_dict(values, source)

    def resolved(self) -> dict[str, Any]:
        """Return `to_dict` with derived sizes filled in, so that a default size equals the same size set explicitly."""
        return {**self.to_dict(), "d_ff": self.ffn_dim, "num_kv_heads": self.kv_heads, "head_dim": self.head_width}

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML, with derived sizes filled in; None is left out."""
        return _format_toml(self.resolved() | ({"total_steps": None} if self.epochs else {}))


FIELDS = {f.name: f for f in dataclasses.fields(TrainingConfig)}
HINTS = get_type_hints(TrainingConfig)


def _convert_setting(name: str, value: Any) -> tuple[Any, str]:
    """Return (converted value, ""), or (None, problem) if the setting is unknown or the value has the wrong type."""
    if name not in FIELDS:
        return None, f"{name}: unknown setting{_suggest_name(name)}"
    try:
        return convert_value(HINTS[name], value), ""
    except TypeError:
        return None, f"{name}: {value!r} is not {describe_type(HINTS[name])}"


def _config_from_dict(values: dict[str, Any], source: str) -> TrainingConfig:
    """Return a configuration with these settings; see TrainingConfig.from_dict."""
    problem_of = {name: _convert_setting(name, value)[1] for name, value in values.items()}
    problems = [problem for problem in problem_of.values() if problem]
    try:
        config = TrainingConfig(**{name: value for name, value in values.items() if not problem_of[name]})
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], source) from None
    if problems:
        raise ConfigError(problems, source)
    return config


def _format_toml(values: dict[str, Any]) -> str:
    """Return settings as TOML in their sections, in the order of SECTIONS and of the fields. None is left out."""
    lines = ["# the resolved configuration of this run, written by tinytrain_dist"]
    for section in SECTIONS:
        lines.append(f"\n[{section}]")
        names = [f.name for f in FIELDS.values() if f.metadata["section"] == section]
        lines += [f"{name} = {to_toml_value(values[name])}" for name in names if values[name] is not None]
    return "\n".join(lines) + "\n"


def _suggest_name(name: str) -> str:
    """Return the end of the message about an unknown setting: the nearest known name, or where to find all names."""
    nearest = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; {HELP_COMMAND} lists all of them"
