"""A small, exact, fault-tolerant pre-trainer for decoder-only language models.

The public names are loaded on first use, so that `import tinytrain_dist` does not import torch. A login node can
then check a configuration in a tenth of a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors find the names here; at run time __getattr__ imports them
    from tinytrain_dist.checkpoint.own_training_loop import load_checkpoint as load_checkpoint
    from tinytrain_dist.checkpoint.own_training_loop import save_checkpoint as save_checkpoint
    from tinytrain_dist.config.loading import load_config as load_config
    from tinytrain_dist.config.schema import TrainingConfig as TrainingConfig
    from tinytrain_dist.data.batches import get_batch as get_batch
    from tinytrain_dist.data.token_file import load_token_dataset as load_token_dataset
    from tinytrain_dist.distributed.batch_plan import BatchPlan as BatchPlan
    from tinytrain_dist.errors import CheckpointError as CheckpointError
    from tinytrain_dist.errors import ConfigError as ConfigError
    from tinytrain_dist.errors import DataError as DataError
    from tinytrain_dist.errors import TrainingError as TrainingError
    from tinytrain_dist.metrics.trackers.base import Tracker as Tracker
    from tinytrain_dist.model.attention import RotaryEmbedding as RotaryEmbedding
    from tinytrain_dist.model.attention import apply_rotary_pos_emb as apply_rotary_pos_emb
    from tinytrain_dist.model.layers import RMSNorm as RMSNorm
    from tinytrain_dist.model.layers import SwiGLU as SwiGLU
    from tinytrain_dist.model.loss import cross_entropy_loss as cross_entropy_loss
    from tinytrain_dist.model.transformer import TransformerBlock as TransformerBlock
    from tinytrain_dist.model.transformer import TransformerLM as TransformerLM
    from tinytrain_dist.optim.adamw import AdamW as AdamW
    from tinytrain_dist.optim.clipping import clip_gradients as clip_gradients
    from tinytrain_dist.optim.lr_schedule import cosine_lr_schedule as cosine_lr_schedule
    from tinytrain_dist.optim.lr_schedule import linear_lr_schedule as linear_lr_schedule
    from tinytrain_dist.optim.lr_schedule import wsd_lr_schedule as wsd_lr_schedule
    from tinytrain_dist.parallel.wrappers import apply_ddp as apply_ddp
    from tinytrain_dist.parallel.wrappers import apply_fsdp as apply_fsdp
    from tinytrain_dist.parallel.wrappers import gather_full_state_dict as gather_full_state_dict
    from tinytrain_dist.training.trainer import Trainer as Trainer

_HOME = {  # the module that defines each public name
    "TrainingConfig": "config.schema",
    "load_config": "config.loading",
    "BatchPlan": "distributed.batch_plan",
    "ConfigError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
    "TrainingError": "errors",
    "cross_entropy_loss": "model.loss",
    "cosine_lr_schedule": "optim.lr_schedule",
    "linear_lr_schedule": "optim.lr_schedule",
    "wsd_lr_schedule": "optim.lr_schedule",
    "AdamW": "optim.adamw",
    "clip_gradients": "optim.clipping",
    "TransformerLM": "model.transformer",
    "TransformerBlock": "model.transformer",
    "RMSNorm": "model.layers",
    "RotaryEmbedding": "model.attention",
    "apply_rotary_pos_emb": "model.attention",
    "SwiGLU": "model.layers",
    "get_batch": "data.batches",
    "load_token_dataset": "data.token_file",
    "apply_ddp": "parallel.wrappers",
    "apply_fsdp": "parallel.wrappers",
    "gather_full_state_dict": "parallel.wrappers",
    "save_checkpoint": "checkpoint.own_training_loop",
    "load_checkpoint": "checkpoint.own_training_loop",
    "Tracker": "metrics.trackers.base",
    "Trainer": "training.trainer",
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
