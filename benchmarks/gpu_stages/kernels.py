"""Stages that measure kernels: ceilings of the device, loss, attention, optimizer and reduction, each alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gpu_stages.context import Stage, milliseconds, peak_mib


def ceilings(stage: Stage) -> None:
    """Measure matrix products in bf16 and float8, and the bandwidth of memory and of the bus."""
    import torch

    device, dry = stage.device, stage.dry
    tokens, width, wide, vocab = (64, 32, 128, 512) if dry else (16384, 2048, 8192, 50304)
    side = 128 if dry else 8192
    shapes = [(tokens, width, wide), (tokens, wide, width), (tokens, width, width), (tokens, width, vocab)]
    shapes.append((side, side, side))
    best: dict[str, float] = {}
    for kind, product in (("bf16", _bf16_product), ("fp8", _fp8_product), ("fp8 fast", _fp8_fast_product)):
        for m, k, n in shapes:

            def speed(product: Any = product, m: int = m, k: int = k, n: int = n) -> float:
                call = product(m, k, n, device)
                return round(2 * m * k * n / milliseconds(call, device, dry) / 1e9, 4 if dry else 1)

            found = stage.attempt(f"{kind} {m}x{k}x{n} TFLOP/s", speed)
            if found:
                best[kind] = max(best.get(kind, 0.0), found)
    stage.put("best TFLOP/s", best)

    size = 2**20 if dry else 2**30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    ms = milliseconds(lambda: target.copy_(source), device, dry)
    stage.put("copy on the device GB/s, read and written", round(2 * size / ms / 1e6, 1))
    if device == "cuda":
        host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
        part = target[: size // 4]
        up = milliseconds(lambda: part.copy_(host, non_blocking=True), device)
        down = milliseconds(lambda: host.copy_(part, non_blocking=True), device)
        stage.put("host to device GB/s, pinned", round(len(host) / up / 1e6, 1))
        stage.put("device to host GB/s, pinned", round(len(host) / down / 1e6, 1))


def _bf16_product(m: int, k: int, n: int, device: str) -> Callable[[], Any]:
    import torch

    a = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    b = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    return lambda: torch.nn.functional.linear(a, b)


def _fp8_product(m: int, k: int, n: int, device: str, fast: bool = False) -> Callable[[], Any]:
    import torch

    a = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _fp8_fast_product(m: int, k: int, n: int, device: str) -> Callable[[], Any]:
    return _fp8_product(m, k, n, device, fast=True)


# ---------------------------------------------------------------- loss


def loss(stage: Stage) -> None:
    """Measure output head and loss, forward and backward, against plain cross-entropy of all logits at once."""
    import torch

    tokens, width, vocabularies = (128, 32, (500,)) if stage.dry else (16384, 2048, (50304, 128256))
    for vocab in vocabularies:
        torch.compiler.reset()  # else torch would soon refuse to compile the same function for further sizes
        _loss_of_vocabulary(stage, tokens, width, vocab)


def _loss_of_vocabulary(stage: Stage, tokens: int, width: int, vocab: int) -> None:
    import torch
    import torch.nn.functional as F

    from tinytrain_dist.model.loss import chunk_loss_and_grad, head_loss_sum

    device = stage.device
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = torch.randn(vocab, width, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=device)

    def plain(hidden: Any, weight: Any, targets: Any) -> Any:
        return F.cross_entropy(F.linear(hidden, weight.to(torch.bfloat16)).float(), targets, reduction="sum")

    compiled = chunk_loss_and_grad if stage.dry else torch.compile(chunk_loss_and_grad, dynamic=False)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(hidden, weight, targets),
        "ours, eager": lambda: head_loss_sum(hidden, weight, targets),
        "ours": lambda: head_loss_sum(hidden, weight, targets, None, compiled),
    }
    if not stage.dry:
        whole = torch.compile(plain, dynamic=False)
        ways["plain, compiled"] = lambda: whole(hidden, weight, targets)
        for chunk in (1024, 4096, 16384):
            ways[f"ours, chunks of {chunk}"] = lambda chunk=chunk: head_loss_sum(  # type: ignore[misc]
                hidden, weight, targets, chunk, compiled
            )
    theirs: Any = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        stage.note("torch has no linear_cross_entropy")
    else:
        ways["torch"] = lambda: theirs(hidden, weight.to(torch.bfloat16), targets, reduction="sum")

    truth: dict[str, float] = {}
    for name, way in ways.items():

        def measure(way: Callable[[], Any] = way) -> dict[str, Any]:
            def both() -> Any:
                hidden.grad = weight.grad = None
                value = way()
                value.backward()
                return value

            both()
            hidden.grad = weight.grad = None
            found: dict[str, Any] = {"peak MiB": peak_mib(both, device)}
            numbers = {"loss": float(both()) / tokens}
            for label, tensor in (("hidden", hidden), ("weight", weight)):
                assert tensor.grad is not None
                numbers[label] = float(tensor.grad.float().norm())
            truth.update({} if truth else numbers)
            found["ms"] = round(milliseconds(both, device, stage.dry), 2)
            found["largest deviation"] = max(abs(numbers[key] / truth[key] - 1) for key in truth)
            return found

        stage.attempt(f"{vocab} {name}", measure)
        hidden.grad = weight.grad = None


# ---------------------------------------------------------------- attention


def attention(stage: Stage) -> None:
    """Measure causal attention, forward and backward, by each kernel of torch and by ours."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from tinytrain_dist.model.attention import causal_attention

    device = stage.device
    shapes = [(1, 2, 64, 16)] if stage.dry else [(8, 32, 2048, 64), (8, 16, 2048, 128)]
    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    if device == "cpu":
        names = {"flash": "FLASH_ATTENTION", "math": "MATH"}
    for b, h, t, e in shapes:
        for groups in (1, 4) if not stage.dry else (1, 2):

            def tensor(heads: int, b: int = b, t: int = t, e: int = e) -> Any:
                return torch.randn(b, heads, t, e, dtype=torch.bfloat16, device=device).requires_grad_()

            q, k, v = tensor(h), tensor(h // groups), tensor(h // groups)
            grad = torch.randn_like(q)

            def run(way: Callable[[Any, Any, Any], Any], q: Any = q, k: Any = k, v: Any = v, grad: Any = grad) -> Any:
                flops = 7 * q.shape[0] * q.shape[1] * q.shape[2] ** 2 * q.shape[3]  # causal, forward and backward
                ms = milliseconds(lambda: torch.autograd.grad(way(q, k, v), (q, k, v), grad), device, stage.dry)
                return {"ms": round(ms, 3), "TFLOP/s": round(flops / ms / 1e9, 1)}

            shape = f"[{b}, {h}{f' / {h // groups}' if groups > 1 else ''}, {t}, {e}]"
            for name, backend in names.items():

                def with_backend(q: Any, k: Any, v: Any, backend: str = backend) -> Any:
                    with sdpa_kernel(getattr(SDPBackend, backend)):
                        return F.scaled_dot_product_attention(
                            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                        )

                stage.attempt(f"{shape} {name}", lambda way=with_backend: run(way))  # type: ignore[misc]

            def ours(q: Any, k: Any, v: Any, groups: int = groups) -> Any:
                repeated = [x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v)]
                return causal_attention(q, *repeated)

            stage.attempt(f"{shape} ours{', repeated' if groups > 1 else ''}", lambda: run(ours))


# ---------------------------------------------------------------- optimizer and reduction


def _train_step(stage: Stage, reproducible: bool = False) -> Any:
    """Return a train step of the 1b model with undefined weights, in this process alone."""
    import compare

    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
    from tinytrain_dist.training.train_step import build_train_step

    options = argparse.Namespace(size="tiny" if stage.dry else "1b", vocab_size=0)
    size: dict[str, Any] = dict(compare.sizes(options))
    config = TrainingConfig(
        **size, device=stage.device, precision="bf16", compile=False, batch_size=1, micro_batch_size=1,  # type: ignore[arg-type]
        parallel="none", reproducible=reproducible, target_dir=str(stage.folder),
    )  # fmt: skip
    context = init_distributed(stage.device)
    context = context.with_mesh(choose_parallel_dims(config, 1, 1))
    return build_train_step(config, context, draw=False)


def _fill(train_step: Any) -> dict[Any, Any]:
    """Give weights and gradients small values, and return the gradients by parameter."""
    import torch

    grads = {}
    with torch.no_grad():
        for param in train_step.model.parameters():
            param.normal_(std=0.02)
            param.grad = grads[param] = torch.randn_like(param).mul_(1e-3)
    return grads


def optimizer(stage: Stage) -> None:
    """Measure norm, clipping and update of all weights of the 1b model, ours and torch's."""
    import torch

    train_step = _train_step(stage)
    grads = _fill(train_step)
    device = stage.device
    params = list(train_step.model.parameters())
    stage.put("parameters", sum(param.numel() for param in params))
    skip = torch.zeros((), device=device)

    def restore() -> None:
        for param, grad in grads.items():
            param.grad = grad

    def ours() -> None:
        restore()
        train_step._update(train_step.reduction.squared_norm().sqrt(), 1e-4, skip)

    def measure(name: str, call: Callable[[], Any]) -> None:
        stage.attempt(f"{name} ms", lambda: round(milliseconds(call, device, stage.dry), 3))

    measure("ours, norm, clip and step", ours)

    def step_only() -> None:
        restore()
        train_step.optimizer.step(skip=skip)

    measure("ours, step alone", step_only)
    train_step.optimizer.state.clear()
    stage.free()
    restore()
    theirs = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def torch_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        theirs.step()

    measure("torch, clip_grad_norm_ and fused AdamW", torch_step)
    measure("torch, fused AdamW alone", theirs.step)


def reduction(stage: Stage) -> None:
    """Measure the squared norm of all gradients of the 1b model, native and reproducible, against torch's."""
    import torch

    from tinytrain_dist.parallel.grad_reduction import build_grad_reduction

    train_step = _train_step(stage)
    grads = _fill(train_step)
    size = 4 * sum(grad.numel() for grad in grads.values())
    exact = build_grad_reduction(train_step.model, train_step.plan, train_step.context, deterministic=True)
    truth = float(sum(grad.double().square().sum() for grad in grads.values()))
    ways: dict[str, Callable[[], Any]] = {
        "native": train_step.reduction.squared_norm,
        "reproducible": exact.squared_norm,
        "torch get_total_norm": lambda: torch.nn.utils.get_total_norm(list(grads.values())).square(),
    }
    for name, way in ways.items():

        def measure(way: Callable[[], Any] = way) -> dict[str, float]:
            ms = milliseconds(way, stage.device, stage.dry)
            error = abs(float(way()) / truth - 1)
            return {"ms": round(ms, 3), "GB/s": round(size / ms / 1e6, 1), "relative error": error}

        stage.attempt(name, measure)
    layer_norms = train_step.reduction.layer_norms
    stage.attempt("layer norms ms", lambda: round(milliseconds(layer_norms, stage.device, stage.dry), 3))
