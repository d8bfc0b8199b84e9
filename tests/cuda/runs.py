"""What the tests of this folder do on a GPU, in few processes, because each takes seconds to start CUDA and NCCL.

Must not know what is asserted. Each `part` is a function of the shared context; `run_parts` returns what it returned,
or the text of its error, so that one part that fails does not hide the others. With TINYTRAIN_TEST_DEVICE=cpu the same
code runs on the CPU, to find mistakes where there is no GPU.
"""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers.memory import measure
from tests.helpers.training import Run, settings_for

DEVICE = os.environ.get("TINYTRAIN_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"

# Heads of 32 and widths that are multiples of 16, so that fused attention and float8 take them.
SMALL: dict[str, Any] = {
    "device": DEVICE,
    "val_data": None,
    "d_model": 128,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "d_ff": 256,
    "context_len": 64,
    "batch_size": 8,
    "micro_batch_size": 2,
    "eval_every": 99,
    "ckpt_every": 3,
    "total_steps": 6,
    "parallel": "none",
    "compile": False,
    "precision": "bf16",
    "lr_max": 3e-3,
}
# About 1 GiB on a GPU, so that neither alignment nor the workspaces of libraries matter.
MEMORY: dict[str, Any] = {
    "device": DEVICE,
    "num_layers": 6,
    "d_model": 512 if ON_GPU else 128,
    "num_heads": 8 if ON_GPU else 4,
    "vocab_size": 8192 if ON_GPU else 1024,
    "context_len": 512 if ON_GPU else 64,
    "batch_size": 16,
    "parallel": "none",
    "compile": False,
    "precision": "bf16" if ON_GPU else "fp32",
}
Part = Callable[[Any, Path], Any]


class Failed:
    """The error of a part."""

    def __init__(self, text: str) -> None:
        self.text = text


def run_parts(parts: list[Part], folder: Path) -> dict[str, Any]:
    """On a rank: the results of the parts by their names."""
    from tinytrain_dist.distributed.context import init_distributed

    context = init_distributed(DEVICE)
    found: dict[str, Any] = {}
    for part in parts:
        try:
            found[part.__name__] = part(context, folder)
        except BaseException:
            found[part.__name__] = Failed(traceback.format_exc())
        finally:
            torch.compiler.reset()
            gc.collect()
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.empty_cache()
    return found


def trainer_for(context: Any, folder: Path, name: str, **overrides: Any) -> Any:
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.training.trainer import Trainer

    return Trainer.build(TrainingConfig(**settings_for(folder, name, **{**SMALL, **overrides})), context)


def losses_of(context: Any, folder: Path, name: str, **overrides: Any) -> list[float]:
    """Train a run to its end, and return the loss of each step."""
    trainer_for(context, folder, name, **overrides).fit()
    return Run(folder / name).values("train", "loss")


def digests_of(context: Any, folder: Path, name: str, **overrides: Any) -> dict[str, str]:
    """Train a run to its end, and return the digests of its last checkpoint."""
    trainer_for(context, folder, name, **overrides).fit()
    return Run(folder / name).digests()


# ---------------------------------------------------------------- with the fastest kernels


def fit_without_waiting(context: Any, folder: Path, name: str, **overrides: Any) -> str:
    """Train with torch's check for waits from the third step on: any wait for the GPU within a step is an error."""
    trainer = trainer_for(context, folder, name, total_steps=10, ckpt_every=99, log_every=4, **overrides)
    plain, finish = trainer.run_step, trainer._finish

    def strict() -> Any:
        check("error" if trainer.step >= 2 else "default")  # the first steps allocate and compile
        return plain()

    trainer.run_step = strict
    trainer._finish = lambda: (check("default"), finish())[1]
    return str(trainer.fit())


def check(mode: str) -> None:
    if ON_GPU:
        torch.cuda.set_sync_debug_mode(mode)


def eager_steps_wait(context: Any, folder: Path) -> str:
    return fit_without_waiting(context, folder, "strict")


def sharded_steps_wait(context: Any, folder: Path) -> str:
    return fit_without_waiting(context, folder, "strict-fsdp", parallel="fsdp")


def compiled_steps_wait(context: Any, folder: Path) -> str:
    return fit_without_waiting(context, folder, "strict-compiled", compile=ON_GPU)


def masked_steps_wait(context: Any, folder: Path) -> str:
    _write_masks(folder)
    return fit_without_waiting(context, folder, "strict-masked", **MASKED)


def compiled_masked_steps_wait(context: Any, folder: Path) -> str:
    _write_masks(folder)
    return fit_without_waiting(context, folder, "strict-masked-compiled", compile=ON_GPU, **MASKED)


def offloaded_steps_wait(context: Any, folder: Path) -> str:
    return fit_without_waiting(context, folder, "strict-offloaded", **OFFLOADED)


def compiled_offloaded_steps_wait(context: Any, folder: Path) -> str:
    return fit_without_waiting(context, folder, "strict-offloaded-compiled", compile=ON_GPU, **OFFLOADED)


OFFLOADED: dict[str, Any] = {"activation_checkpointing": "block", "activation_offload": True}
MASKED: dict[str, Any] = {"loss_mask": True, "document_mask": True}


def _write_masks(folder: Path) -> None:
    """Write a mask and document starts beside the token files of `settings_for`."""
    settings_for(folder, "any")
    for name in ("train", "val"):
        random = np.random.default_rng(0).random(len(np.load(folder / f"{name}.npy")))
        np.save(folder / f"{name}.mask.npy", (random < 0.7).astype(np.uint8))
        np.save(folder / f"{name}.documents.npy", np.concatenate([[0], 1 + np.flatnonzero(random[1:] < 0.05)]))


def within_documents(context: Any, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradients of packed documents, on the device and on the CPU, in float32."""
    from tinytrain_dist.config.model_config import ModelConfig
    from tinytrain_dist.model.transformer import TransformerLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "d_model": 128}
    ids, targets = torch.randint(0, 53, (2, 3, 300))
    documents = (torch.rand(3, 300) < 0.02).cumsum(dim=1).int()
    found: dict[str, list[torch.Tensor]] = {}
    for device in (DEVICE, "cpu"):
        model = TransformerLM(ModelConfig(**shape, vocab_size=53, context_len=300)).to(device)
        loss = model(ids.to(device), targets.to(device), documents.to(device))
        loss.backward()
        found.setdefault("loss", []).append(loss.detach().cpu())
        for name, param in model.named_parameters():
            assert param.grad is not None
            found.setdefault(name, []).append(param.grad.cpu())
    return {name: (on_device, on_cpu) for name, (on_device, on_cpu) in found.items()}


def eager_memory(context: Any, folder: Path) -> tuple[int, int, str]:
    return measure(MEMORY, context)


def compiled_memory(context: Any, folder: Path) -> tuple[int, int, str]:
    return measure({**MEMORY, "compile": ON_GPU}, context)


def offloaded_memory(context: Any, folder: Path) -> tuple[int, int, str]:
    return measure({**MEMORY, **OFFLOADED}, context)


def losses_by_mode(context: Any, folder: Path) -> dict[str, list[float]]:
    return {mode: losses_of(context, folder, f"mode-{mode}", parallel=mode) for mode in ("none", "ddp", "fsdp")}


def losses_compiled(context: Any, folder: Path) -> list[float]:
    return losses_of(context, folder, "compiled", compile=ON_GPU)


def losses_fp8(context: Any, folder: Path) -> list[float]:
    return losses_of(context, folder, "fp8", precision="fp8")


def copies_on_the_host(context: Any, folder: Path) -> dict[str, tuple[bool, bool]]:
    """By tensor: whether its copy on the host is pinned, and whether it is equal."""
    from tinytrain_dist.checkpoint.async_save import CopyStream, HostBuffers
    from tinytrain_dist.checkpoint.state_collection import collect_shards

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 7)).to(DEVICE)
    stream = CopyStream(context.device) if DEVICE == "cuda" else None
    buffers = HostBuffers(collect_shards(model, None)[0], stream)
    found = {}
    for _ in range(2):  # the second copy reuses the buffers
        with torch.no_grad():
            for param in model.parameters():
                param.add_(1)
        expected = {name: param.detach().clone() for name, param in model.named_parameters()}
        shards, event = buffers.copy()
        if event is not None:
            event.synchronize()
        for shard in shards["model"]:
            copied = shard.rows_to_save
            found[shard.name] = (copied.is_pinned(), torch.equal(copied, expected[shard.name].cpu()))
    return found


def grouped_and_repeated(context: Any, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Output and gradients of attention with two key heads, and of the same with each key head repeated."""
    from tinytrain_dist.config.model_config import ModelConfig
    from tinytrain_dist.model.attention import Attention, RotaryEmbedding

    torch.manual_seed(0)
    heads, groups, width, t = 4, 2, 32, 96
    shape: dict[str, Any] = {"vocab_size": 53, "num_layers": 1, "d_model": 128, "num_heads": heads, "head_dim": width}
    grouped = Attention(ModelConfig(**shape, num_kv_heads=heads // groups, context_len=t)).to(DEVICE)
    whole = Attention(ModelConfig(**shape, num_kv_heads=heads, context_len=t)).to(DEVICE)

    def repeat(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(-1, width, 128).repeat_interleave(groups, dim=0).reshape(-1, 128)

    with torch.no_grad():
        for param in grouped.parameters():
            param.normal_(std=0.08)
        for name in ("q_proj", "o_proj"):
            getattr(whole, name).weight.copy_(getattr(grouped, name).weight)
        for name in ("k_proj", "v_proj"):
            getattr(whole, name).weight.copy_(repeat(getattr(grouped, name).weight))
    x = torch.randn(2, t, 128, device=DEVICE).bfloat16()
    grad = torch.randn(2, t, 128, device=DEVICE).bfloat16()
    cos, sin = RotaryEmbedding(width)(torch.arange(t, device=DEVICE))
    outputs = [attention(x, cos, sin) for attention in (grouped, whole)]
    for output in outputs:
        output.backward(grad)
    found = {"output": (outputs[0].float().cpu(), outputs[1].float().cpu())}
    for name in ("k_proj", "v_proj"):
        summed = getattr(whole, name).weight.grad.view(-1, groups, width, 128).sum(dim=1).reshape(-1, 128)
        found[name] = (getattr(grouped, name).weight.grad.cpu(), summed.cpu())
    return {name: (a.detach(), b.detach()) for name, (a, b) in found.items()}


def losses_of_head(context: Any, folder: Path) -> dict[str, tuple[float, float, float]]:
    """Relative deviations of loss, and of both gradients by norm, from float64 with all logits at once."""
    from tinytrain_dist.model.loss import IGNORE_INDEX, head_loss_sum

    torch.manual_seed(0)
    hidden64 = torch.randn(300, 64, dtype=torch.float64)
    weight64 = torch.randn(1000, 64, dtype=torch.float64) * 0.1
    targets = torch.randint(0, 1000, (300,))
    targets[::7] = IGNORE_INDEX
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        rounded = [hidden64.to(dtype).double(), weight64.to(dtype).double()]
        truth = _head(*rounded, targets, lambda h, w, t: torch.nn.functional.cross_entropy(h @ w.T, t, reduction="sum"))
        for chunk in (None, 300, 64, 37):
            inputs = [hidden64.to(dtype).to(DEVICE), weight64.to(dtype).float().to(DEVICE)]
            got = _head(*inputs, targets.to(DEVICE), lambda h, w, t, chunk=chunk: head_loss_sum(h, w, t, chunk))
            deviations = [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]
            found[f"{str(dtype).removeprefix('torch.')} {chunk}"] = (deviations[0], deviations[1], deviations[2])
    return found


def _head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, loss: Any) -> list[torch.Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(hidden, weight, targets)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [value.detach(), hidden.grad, weight.grad]


# ---------------------------------------------------------------- in reproducible mode


def reproducible_digests(context: Any, folder: Path) -> dict[str, dict[str, str]]:
    """Digests of the same run: twice, with one rank that shards, with offload, and stopped and resumed."""
    found = {
        name: digests_of(context, folder, name, reproducible=True, parallel=mode)
        for name, mode in (("once", "none"), ("twice", "none"), ("sharded", "fsdp"))
    }
    found["offloaded"] = digests_of(context, folder, "offloaded", reproducible=True, **OFFLOADED)
    trainer_for(context, folder, "resumed", reproducible=True, stop_at_step=3).fit()
    found["resumed"] = digests_of(context, folder, "resumed", reproducible=True)
    return found


def reproducible_masked_digests(context: Any, folder: Path) -> dict[str, dict[str, str]]:
    """Digests of the same run with masks and documents: twice, and with one rank that shards."""
    _write_masks(folder)
    return {
        name: digests_of(context, folder, f"masked-{name}", reproducible=True, parallel=mode, **MASKED)
        for name, mode in (("once", "none"), ("twice", "none"), ("sharded", "fsdp"))
    }


def losses_in_float32(context: Any, folder: Path) -> list[float]:
    return losses_of(context, folder, f"fp32-{context.device.type}", reproducible=True, precision="fp32")


def die_after_a_save(folder: Path) -> None:
    """On a rank: train, and be killed in step 5; step 3 was saved."""
    from tinytrain_dist.distributed.context import init_distributed

    trainer = trainer_for(init_distributed(DEVICE), folder, "killed", reproducible=True, ckpt_async=False)
    plain = trainer.run_step

    def deadly() -> Any:
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain()

    trainer.run_step = deadly
    trainer.fit()


def resume_after_the_kill(context: Any, folder: Path) -> dict[str, str]:
    return digests_of(context, folder, "killed", reproducible=True, ckpt_async=False)


def losses_on_the_cpu(folder: Path) -> list[float]:
    """On a rank: the losses of the run in float32, on the CPU."""
    from tinytrain_dist.distributed.context import init_distributed

    return losses_of(init_distributed("cpu"), folder, "fp32-host", reproducible=True, precision="fp32", device="cpu")
