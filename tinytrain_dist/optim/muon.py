"""Update matrices with Muon: momentum whose matrix is orthogonalized.

Must not call collectives. Momentum and weights are those of the shard on this rank; `MatrixExchange` lets one rank
orthogonalize each whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor
from tinytrain_dist.distributed.matrix_exchange import MatrixExchange
from tinytrain_dist.optim.base import Optimizer, StateTensor, call_closure
from tinytrain_dist.optim.costs import newton_schulz_plan
from tinytrain_dist.optim.newton_schulz import newton_schulz_dtype, orthogonalize


def update_scale(scale: str, rows: int, columns: int) -> float:
    """Return the factor of the learning rate for a matrix of this shape.

    * match_rms_adamw: 0.2 sqrt(max(rows, columns)). The update is then about as large as AdamW's, so that rates and
      weight decays for AdamW suit. Source: Liu et al. 2025 (arXiv 2502.16982).
    * spectral: sqrt(max(1, rows / columns)), as in the original. Source: kellerjordan.github.io/posts/muon
    """
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(Optimizer):
    """Momentum (Nesterov), orthogonalized, with decoupled weight decay: equal to torch.optim.Muon.

        m <- momentum * m + (1 - momentum) * g
        theta <- theta - lr * weight_decay * theta
        theta <- theta - lr * scale * NewtonSchulz(momentum * m + (1 - momentum) * g)

    The scale depends on the shape, see `update_scale`. All parameters are matrices, and each is orthogonalized whole.
    Errors: ValueError for hyper-parameters out of range, and for a parameter that is not a matrix.
    """

    updates_whole_matrices: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        steps: int = 5,
        scale: str = "match_rms_adamw",
        context: DistributedContext | None = None,
    ) -> None:
        """`params`: tensors, or groups with their own settings. steps: of Newton-Schulz. scale: see `update_scale`.

        context: of the ranks that share the parameters by DDP or FSDP (None: this process has them alone).
        """
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1 and steps >= 1):
            raise ValueError(
                f"Muon: needs lr, weight_decay >= 0, momentum in [0, 1) and steps >= 1, got lr={lr}, "
                f"weight_decay={weight_decay}, momentum={momentum}, steps={steps}"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps, "scale": scale}
        super().__init__(params, defaults)
        self._members = [(param, group) for group in self.param_groups for param in group["params"]]
        vectors = [param for param, _ in self._members if param.ndim != 2]
        if vectors:
            raise ValueError(
                f"Muon: updates matrices only, got a parameter of shape {list(vectors[0].shape)}; use AdamW for it"
            )
        shapes = tuple((param.shape[0], param.shape[1]) for param, _ in self._members)
        replicas, shards = (context.weight_replicas, context.weight_shards) if context else (1, 1)
        steps_of_each = [group["steps"] for _, group in self._members]
        plan = newton_schulz_plan(shapes, steps_of_each, replicas, shards)
        dtype = newton_schulz_dtype(self._members[0][0])
        self._exchange = MatrixExchange(plan, context, dtype)

    def state_tensors(self, param: Tensor) -> tuple[StateTensor, ...]:
        """Return the momentum."""
        return (StateTensor("momentum_buffer", tuple(param.shape), param.dtype),)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        skip: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> Any:
        """Update all parameters that have a gradient; see `Optimizer.step`. A collective.

        Products and sums are separate operations, each of which rounds once. A fused one may round differently at the
        end of a tensor, and then the bits would depend on the sharding.
        """
        loss = call_closure(closure)
        self.materialize()
        skipped = None if skip is None else skip.bool()
        updated = [index for index, (param, _) in enumerate(self._members) if param.grad is not None]
        grads = {index: local_tensor(self._members[index][0].grad) for index in updated}
        if grad_scale is not None:
            torch._foreach_div_(list(grads.values()), grad_scale)
        for index, grad in grads.items():
            buffer, momentum = self._momentum(index)
            new = buffer.mul(momentum).add_(grad.mul(1 - momentum))
            _replace(buffer, new, skipped)

        def rows_of(index: int) -> Tensor:
            buffer, momentum = self._momentum(index)
            return buffer.mul(momentum).add_(grads[index].mul(1 - momentum))

        def compute(index: int, whole: Tensor) -> Tensor:
            steps: int = self._members[index][1]["steps"]
            return orthogonalize(whole, steps)

        def use(index: int, rows: Tensor) -> None:
            param, group = self._members[index]
            weights = local_tensor(param).detach()
            update = rows.to(weights.dtype).mul(-group["lr"] * update_scale(group["scale"], *param.shape))
            new = weights.mul(1 - group["lr"] * group["weight_decay"]).add_(update)
            _replace(weights, new, skipped)

        self._exchange.run(rows_of, compute, use, grads.keys())
        return loss

    def _momentum(self, index: int) -> tuple[Tensor, float]:
        """Return this rank's rows of a momentum, and its rate."""
        param, group = self._members[index]
        return local_tensor(self.state[param]["momentum_buffer"]), group["momentum"]


def _replace(values: Tensor, new: Tensor, skipped: Tensor | None) -> None:
    """Overwrite values by new ones, unless `skipped` is true; then NaN in the new ones has no effect."""
    if skipped is None:
        values.copy_(new)
    else:
        torch.where(skipped, values, new, out=values)
