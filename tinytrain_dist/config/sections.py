"""Define the settings of a run, section by section: name, type, default and help.

Each class is one section of a TOML file. `TrainingConfig` in schema.py joins them, and has what follows from several
sections. Must not know torch, files, ranks or devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinytrain_dist.config.batch_phases import BatchSizes
from tinytrain_dist.config.rope_scaling import RopeType
from tinytrain_dist.config.run_folder import LOGS_FOLDER
from tinytrain_dist.config.step_ranges import parse_step_ranges

Mode = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
Sampling = Literal["random", "shuffle"]
Packing = Literal["none", "best_fit"]
DecayShape = Literal["linear", "sqrt"]
TokenType = Literal["uint16", "uint32", "int32"]
Precision = Literal["auto", "fp32", "bf16", "fp8"]
OptimizerName = Literal["adamw", "muon"]
MuonScale = Literal["match_rms_adamw", "spectral"]
BF16_PRECISIONS = ("bf16", "fp8")  # blocks compute in bf16; with fp8, all but the products of their linear layers
SECTIONS = ("run", "data", "model", "optimizer", "parallel", "compute", "checkpoint")  # of a TOML file, in this order


def _setting(section: str, default: Any, help: str) -> Any:
    """Return a field of TrainingConfig. section: of the TOML file; help: one sentence for --help."""
    return field(default=default, metadata={"section": section, "help": help})


@dataclass(frozen=True)
class RunSettings:
    """Section [run]: where a run writes, how long it is, and when it logs, evaluates, resumes."""

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
    stability_every: int | None = _setting(
        "run", None, "steps between records of norms and maxima inside the model; each costs a forward pass (None: off)"
    )
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
    resume: str = _setting("run", "auto", "auto (from the newest valid checkpoint), never, or the path or URL of one")
    ckpt_path_to_resume: str | None = _setting("run", None, "path of a checkpoint; the same as resume = PATH")
    allow: str | None = _setting(
        "run", None, "comma-separated settings that may differ from the checkpoint on resume (None: none)"
    )
    init_from: str | None = _setting(
        "run",
        None,
        "weights to start from: a Hugging Face folder (Llama, Qwen3), a checkpoint or a run (None: random from seed)",
    )

    @property
    def logs_dir(self) -> Path:
        """Folder that holds TensorBoard events and the metrics file."""
        return Path(self.log_dir) if self.log_dir else Path(self.target_dir) / LOGS_FOLDER

    @property
    def last_step(self) -> int:
        """The step after which this process stops: stop_at_step or total_steps."""
        return min(self.total_steps, self.stop_at_step or self.total_steps)

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


@dataclass(frozen=True)
class DataSettings:
    """Section [data]: what a run trains and evaluates on, and how windows are drawn from it."""

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
    batch_size_warmup: tuple[str, ...] | None = _setting(
        "data", None, "phases 'STEP: BATCH_SIZE' of smaller batches, the last with batch_size (None: no warm-up)"
    )
    micro_batch_size: int | Literal["auto"] | None = _setting(
        "data", None, "sequences per forward pass of one rank (auto: what fits in memory; None: auto on GPUs, else all)"
    )
    context_len: int = _setting("data", 256, "tokens per sequence")
    loss_mask: bool = _setting("data", False, "count only those targets that the mask file beside a token file marks")
    packing: Packing = _setting("data", "none", "best_fit: documents are packed into windows, not cut where they fit")
    document_mask: bool = _setting("data", False, "attention stays within documents, and positions restart in each")
    skip_steps: str | None = _setting(
        "data", None, "START:STOP,...: steps whose batches are left out; they change no weights (None: none)"
    )

    @property
    def left_out_steps(self) -> tuple[range, ...]:
        """The steps named in `skip_steps`, both ends of each range included."""
        return parse_step_ranges(self.skip_steps)

    @property
    def batch_sizes(self) -> BatchSizes:
        """The batch size of every step: batch_size, after the phases of batch_size_warmup."""
        return BatchSizes.of(self.batch_size, self.batch_size_warmup)

    @property
    def fixed_micro_batch_size(self) -> int | None:
        """The value of micro_batch_size if it is a number, else None."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size

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


@dataclass(frozen=True)
class ModelSettings:
    """Section [model]: the architecture; model_config.py has the same fields."""

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
    rope_type: RopeType | None = _setting(
        "model", None, "scaling of rotary positions (None: llama3 with rope_scaling_factor, else default, not scaled)"
    )
    rope_scaling_factor: float | None = _setting(
        "model", None, "rotary scaling: factor, usually context_len / the one before (None: no scaling)"
    )
    rope_original_context_len: int | None = _setting(
        "model", None, "rotary scaling, except linear: context_len that the weights were trained with before"
    )
    rope_low_freq_factor: float = _setting("model", 1.0, "Llama 3 rotary scaling: end of the low-frequency band")
    rope_high_freq_factor: float = _setting("model", 4.0, "Llama 3 rotary scaling: start of the high-frequency band")
    rope_beta_fast: float = _setting(
        "model", 32.0, "YaRN: rotations in the original context above which none is scaled"
    )
    rope_beta_slow: float = _setting("model", 1.0, "YaRN: rotations in the original context below which all are scaled")
    rope_attention_factor: float | None = _setting(
        "model", None, "YaRN: factor of cosines and sines (None: 0.1 ln(rope_scaling_factor) + 1)"
    )
    tie_embeddings: bool = _setting("model", False, "share the embedding's weight with the output head")
    qk_norm: bool = _setting("model", False, "RMSNorm on queries and keys (Qwen3)")
    norm_eps: float = _setting("model", 1e-5, "epsilon of every RMSNorm")
    logit_soft_cap: float | None = _setting(
        "model", None, "bound logits by c x tanh(logits / c), as in Gemma 2 (None: not); Hugging Face's Llama cannot"
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """Section [optimizer]: how the weights are updated."""

    optimizer: OptimizerName = _setting(
        "optimizer", "adamw", "what updates the weights; muon: the matrices of blocks with Muon, the rest with AdamW"
    )
    lr_max: float = _setting("optimizer", 1e-3, "highest learning rate, at the end of the warm-up")
    lr_min: float = _setting("optimizer", 1e-4, "learning rate at the end of the schedule")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = _setting("optimizer", "cosine", "learning-rate schedule")
    warmup_iters: int | None = _setting("optimizer", None, "steps of linear warm-up (None: 1 % of total_steps)")
    cosine_iters: int | None = _setting("optimizer", None, "step at which the cosine ends (None: total_steps)")
    decay_iters: int | None = _setting("optimizer", None, "wsd: steps of the final decay (None: 10 % of total_steps)")
    decay_shape: DecayShape = _setting("optimizer", "linear", "wsd: the decay falls as 1 - p (linear) or 1 - sqrt(p)")
    betas: tuple[float, float] = _setting("optimizer", (0.9, 0.95), "AdamW: decay rates of the two moments")
    eps: float = _setting("optimizer", 1e-8, "AdamW: added to the denominator")
    weight_decay: float = _setting("optimizer", 0.1, "decoupled decay of matrices (norm weights do not decay)")
    weight_decay_schedule: Literal["constant", "lr"] = _setting(
        "optimizer", "constant", "weight decay in each step (lr: proportional to the learning rate, full at lr_max)"
    )
    muon_momentum: float = _setting("optimizer", 0.95, "Muon: decay rate of the momentum")
    muon_steps: int = _setting("optimizer", 5, "Muon: steps of the Newton-Schulz iteration")
    muon_scale: MuonScale = _setting(
        "optimizer", "match_rms_adamw", "Muon: update as large as AdamW's, or spectral: sqrt(max(1, rows / columns))"
    )
    param_groups: tuple[str, ...] = _setting(
        "optimizer", (), "entries 'PATTERN, PATTERN: lr_factor=X weight_decay=Y optimizer=Z'; the first match counts"
    )
    grad_clip_norm: float | None = _setting("optimizer", 1.0, "clip gradients to this global norm (None: no clipping)")
    ema_decay: float | None = _setting(
        "optimizer", None, "decay per step of a moving average of the weights, evaluated beside them (None: no average)"
    )
    ema_every: int = _setting("optimizer", 1, "steps between changes of the moving average")
    ema_on_host: bool = _setting("optimizer", False, "keep the moving average in host memory instead of on the GPU")
    z_loss: float | None = _setting(
        "optimizer", None, "train with this coefficient of log(Z)^2 beside the loss, as PaLM with 1e-4 (None: without)"
    )
    skip_spikes: float | None = _setting(
        "optimizer", None, "skip steps whose loss or norm is this many standard deviations above its mean (None: off)"
    )
    spike_window: int = _setting("optimizer", 128, "skip_spikes: steps of the mean; it acts when half of them are done")
    max_skipped_steps: int = _setting("optimizer", 10, "stop after skipping this many steps in a row")


@dataclass(frozen=True)
class ParallelSettings:
    """Section [parallel]: how the work is divided over ranks."""

    parallel: Mode = _setting("parallel", "auto", "data-parallel mode (auto: chosen by number of ranks and model size)")
    dp_replicate: int | None = _setting("parallel", None, "hsdp: number of replicas")
    dp_shard: int | None = _setting("parallel", None, "hsdp: ranks that share one replica")
    cp: int = _setting("parallel", 1, "context parallelism: ranks that share each sequence, for long contexts (1: off)")
    reshard_after_forward: bool | None = _setting(
        "parallel", None, "fsdp, hsdp: gather weights again for backward (None: unless GPUs have memory to keep them)"
    )
    activation_checkpointing: Literal["none", "block", "selective"] = _setting(
        "parallel", "none", "what backward recomputes: nothing, whole blocks, or all except matrix products (selective)"
    )
    activation_offload: bool = _setting(
        "parallel", False, "keep inputs of blocks in host memory until backward; needs activation_checkpointing = block"
    )
    fingerprint_every: int | None = _setting(
        "parallel", None, "steps between comparisons of the replicas' bits (None: only at each save)"
    )


@dataclass(frozen=True)
class ComputeSettings:
    """Section [compute]: how each rank computes."""

    precision: Precision = _setting("compute", "auto", "type in which blocks compute (auto: bf16 on GPUs, else fp32)")
    compile: bool | None = _setting(
        "compute", None, "compile each block and the loss with torch.compile (None: if the run is long enough to gain)"
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


@dataclass(frozen=True)
class CheckpointSettings:
    """Section [checkpoint]: when and how checkpoints are written."""

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
    snapshot_every: int | None = _setting(
        "checkpoint", None, "steps between snapshots in memory for restarts of ranks (None: about every 30 s; 0: off)"
    )
    save_limit: float = _setting(
        "checkpoint", 3600.0, "abort as hung if a step waits longer than this many seconds for a save (0: never)"
    )
    max_shard_bytes: int = _setting("checkpoint", 2 * 1024**3, "largest file of a checkpoint, in bytes")
    checkpoint_copies: str | None = _setting(
        "checkpoint", None, "URL or folder to which checkpoints are copied in the background (None: no copies)"
    )
    copies_keep_last: int = _setting("checkpoint", 2, "number of newest copies to keep")
    copies_keep_every: int | None = _setting(
        "checkpoint", None, "also keep copies of checkpoints at multiples of this step (None: off)"
    )
    copies_end_limit: float = _setting(
        "checkpoint", 600.0, "at its end, the run waits at most this many seconds for the last copy (0: not at all)"
    )
