"""Owns the public names of the package, loaded on first use. Must not import torch: a login node imports this too."""

from importlib import import_module
from typing import Any

_HOME = {
    "TrainingConfig": "config",
    "load_config": "commandline",
    "BatchPlan": "layout",
    "ConfigError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
    "TrainingError": "errors",
    "cross_entropy_loss": "losses",
    "cosine_lr_schedule": "schedule",
    "wsd_lr_schedule": "schedule",
    "AdamW": "optim",
    "clip_gradients": "optim",
    "TransformerLM": "model",
    "TransformerBlock": "model",
    "RMSNorm": "model",
    "RotaryEmbedding": "model",
    "apply_rotary_pos_emb": "model",
    "SwiGLU": "model",
    "get_batch": "data",
    "load_token_dataset": "data",
    "apply_ddp": "parallel",
    "apply_fsdp": "parallel",
    "gather_full_state_dict": "parallel",
    "save_checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "Trainer": "trainer",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
