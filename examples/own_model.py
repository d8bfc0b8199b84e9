"""Train your own model in your own loop on several processes, with DDP or FSDP. Started again, it resumes exactly.

    torchrun --standalone --nproc_per_node 2 own_model.py --mode fsdp --steps 40 --folder runs/own_model

The result does not depend on when the program was stopped: batches are a function of seed and step, so a checkpoint
needs no state of a data loader.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tinytrain_dist import (
    AdamW,
    apply_ddp,
    apply_fsdp,
    clip_gradients,
    cosine_lr_schedule,
    cross_entropy_loss,
    gather_full_state_dict,
    get_batch,
    load_checkpoint,
    load_token_dataset,
    save_checkpoint,
)
from tinytrain_dist.distributed import DistributedContext, init_distributed, shutdown

VOCAB_SIZE = 97
BATCH_SIZE, CONTEXT_LEN, SEED = 8, 32, 0  # sequences over all processes; tokens; of the batches
LR_MAX, LR_MIN, WARMUP_STEPS, MAX_NORM = 3e-3, 3e-4, 4, 1.0
SAVE_EVERY = 10


class GatedConvolutionLM(nn.Module):
    """A model that this project does not know: causal convolutions with gates, [batch, length] -> logits."""

    def __init__(self, width: int = 64, num_blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, width)
        self.blocks = nn.ModuleList(GatedConvolution(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, VOCAB_SIZE, bias=False)
        self.bias = nn.Parameter(torch.zeros(VOCAB_SIZE))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden) + self.bias


class GatedConvolution(nn.Module):
    """One block: a convolution over the last tokens, and a gate."""

    def __init__(self, width: int, reach: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, 2 * width, reach)
        self.reach = reach

    def forward(self, hidden: Tensor) -> Tensor:
        padded = nn.functional.pad(self.norm(hidden).transpose(1, 2), (self.reach - 1, 0))  # no look into the future
        value, gate = self.convolution(padded).transpose(1, 2).chunk(2, dim=-1)
        return value * gate.sigmoid()


def build_model(context: DistributedContext, mode: str) -> nn.Module:
    """Return the model, the same on all processes, wrapped for the mode."""
    torch.manual_seed(SEED)
    model = GatedConvolutionLM().to(context.device)
    if mode == "ddp":
        return apply_ddp(model)
    return apply_fsdp(model, init_device_mesh(context.device.type, (context.world_size,)))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None. A folder with such a name is complete: it gets the name at the end."""
    return max(folder.glob("step-*[0-9]"), default=None)


def main() -> None:
    """Train, save every few steps, and print the loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mode", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--steps", type=int, default=40, help="of the whole run")
    parser.add_argument("--stop-at", type=int, help="end after this step; the next start goes on from there")
    parser.add_argument("--folder", type=Path, default=Path("runs/own_model"))
    parser.add_argument("--data", type=Path, help="token file (.npy) with IDs below 97 (default: a made-up sequence)")
    options = parser.parse_args()

    context = init_distributed("auto")
    if BATCH_SIZE % context.world_size:
        raise SystemExit(f"BATCH_SIZE {BATCH_SIZE} cannot be shared by {context.world_size} processes; start 1, 2 or 4")
    if options.data is None:
        data = (np.arange(20_000) ** 2 % VOCAB_SIZE).astype(np.uint16)  # two tokens determine the next
    else:
        data = load_token_dataset(options.data, vocab_size=VOCAB_SIZE)
    model = build_model(context, options.mode)
    optimizer = AdamW(model.parameters(), LR_MAX, (0.9, 0.95), 1e-8, 0.1)
    resumed_from = context.broadcast_object(newest_checkpoint(options.folder))  # every process takes the same one
    first = load_checkpoint(model, optimizer, resumed_from) if resumed_from else 0

    per_rank = BATCH_SIZE // context.world_size
    slots = range(per_rank * context.rank, per_rank * (context.rank + 1))  # this process's part of the batch
    last = max(first, min(options.steps, options.stop_at or options.steps))
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr_schedule(step, LR_MAX, LR_MIN, min(WARMUP_STEPS, options.steps), options.steps)
        ids, targets = get_batch(data, per_rank, CONTEXT_LEN, context.device, seed=SEED, step=step, slots=slots)
        loss = cross_entropy_loss(model(ids), targets)
        loss.backward()
        norm = clip_gradients(model.parameters(), MAX_NORM, 1e-6)  # over all processes, in every mode
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = context.all_reduce_sum(loss.detach()) / context.world_size
        if context.is_main and (step + 1) % 5 == 0:
            print(f"step {step + 1}: loss {float(mean_loss):.4f}, gradient norm {float(norm):.3f}", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
            save_checkpoint(model, optimizer, step + 1, options.folder / f"step-{step + 1:06d}")

    weights = gather_full_state_dict(model)  # whole tensors under their original names, on every process
    if context.is_main:
        print(f"done at step {last}: {sum(tensor.numel() for tensor in weights.values()):,} weights")
    shutdown()


if __name__ == "__main__":
    main()
