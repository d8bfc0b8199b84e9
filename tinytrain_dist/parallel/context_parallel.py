"""Context parallelism: ranks that have parts of the same sequences exchange them for attention, and only there.

This is the method of DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509). The ranks of a `cp` group have equal
parts of each sequence, in the order of ranks. Before attention, an all-to-all gives each rank all positions of some
heads; after it, another one gives it all heads of its positions. All other layers compute each position by itself.

The suffix of a tensor's name gives its axes: c rank of the group, b batch, h query head, k key/value head, t position
in the part of this rank, s position in the whole sequence, e head width; a head whose axis ends in _own is one of this
rank's share. Must not know how gradients are summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinytrain_dist.distributed.collectives import Group, exchange_parts, group_size
from tinytrain_dist.distributed.context import CONTEXT, DistributedContext
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.parallel.wrappers import unwrap
from tinytrain_dist.utils.text import format_list

if TYPE_CHECKING:
    from tinytrain_dist.model.document_mask import AttentionMask


class HeadExchange(nn.Module):
    """Attention of a rank that has some positions: it computes some heads of all positions. A collective of `group`."""

    def __init__(self, whole: nn.Module, group: Group) -> None:
        """`whole`: computes attention of whole sequences, see `causal_attention`. It gets a share of the heads."""
        super().__init__()
        self.whole = whole
        self.group_name = group.group_name
        self.ranks = group_size(group)

    def forward(self, q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """q: [b, h, t, e]; k, v: [b, k, t, e], all with the positions of this rank. mask: of whole sequences.

        Returns [b, h, t, e].
        """
        y_bhse = self.whole(*self._gather_positions(q_bhte, k_bkte, v_bkte), mask)
        return self._gather_heads(y_bhse)

    def _gather_positions(self, q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values of whole sequences, for this rank's share of the heads."""
        copies = math.lcm(k_bkte.shape[1], self.ranks) // k_bkte.shape[1]
        tensors = (q_bhte, _repeat_heads(k_bkte, copies), _repeat_heads(v_bkte, copies))
        # one message for all three: [c, b, own heads of q, k and v, t, e]
        shares = [tensor.unflatten(1, (self.ranks, -1)).movedim(1, 0) for tensor in tensors]
        received = exchange_parts(torch.cat(shares, dim=2), self.group_name)
        # the ranks have sent their parts of the sequence, in order
        whole = received.movedim(0, 2).flatten(2, 3)  # [b, own heads, s, e]
        return torch.split(whole, [share.shape[2] for share in shares], dim=1)

    def _gather_heads(self, y_bhse: Tensor) -> Tensor:
        """Return all heads of this rank's positions: [b, own heads, s, e] -> [b, h, t, e]."""
        parts = y_bhse.unflatten(2, (self.ranks, -1)).movedim(2, 0)  # [c, b, own heads, t, e]
        return exchange_parts(parts, self.group_name).movedim(0, 1).flatten(1, 2)


def _repeat_heads(x_bkte: Tensor, copies: int) -> Tensor:
    """Return each head `copies` times in a row, so that each rank gets one. Their gradients are summed."""
    if copies == 1:
        return x_bkte
    return x_bkte.unsqueeze(2).expand(-1, -1, copies, -1, -1).flatten(1, 2)


def check_placement(context: DistributedContext, cp: int) -> None:
    """Check that the ranks which share sequences are on one node. A collective. Errors: ConfigError on all ranks."""
    if cp > 1 and (problem := placement_problem(context.all_gather_object(context.host), cp)):
        raise ConfigError(problem)


def placement_problem(hosts: Sequence[str], cp: int) -> str:
    """Return a sentence if a group of `cp` consecutive ranks spans hosts; "" otherwise. hosts: by rank."""
    for first in range(0, len(hosts), cp):
        hosts_of_group = sorted(set(hosts[first : first + cp]))
        if len(hosts_of_group) > 1:
            return (
                f"cp: ranks {first} to {first + cp - 1} share sequences, and must be on one node, but they are on "
                f"{format_list(hosts_of_group)}; give the ranks of a node consecutive numbers, as torchrun and "
                "srun --distribution=block do"
            )
    return ""


def apply_context_parallel(model: Any, context: DistributedContext) -> None:
    """Make a TransformerLM compute this rank's part of each sequence, in place. Before it is compiled or wrapped."""
    group = context.group(CONTEXT)
    assert group is not None, "cp is more than 1"
    _, _, model.model.sequence_part = context.data_coordinates
    for block in model.model.layers:
        block.self_attn.core_attention = HeadExchange(block.self_attn.core_attention, group)


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Let a model compute whole sequences while the block runs, the same ones on every rank: to generate text."""
    decoder: Any = unwrap(model).model
    part = decoder.sequence_part
    attentions = [block.self_attn for block in decoder.layers]
    cores = [attention.core_attention for attention in attentions]
    decoder.sequence_part = 0
    for attention, core in zip(attentions, cores, strict=True):
        attention.core_attention = core.whole if isinstance(core, HeadExchange) else core
    try:
        yield
    finally:
        decoder.sequence_part = part
        for attention, core in zip(attentions, cores, strict=True):
            attention.core_attention = core
