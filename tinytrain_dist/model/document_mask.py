"""Keep attention within documents: where positions restart, and masks for the attention of a CPU and of a GPU.

Must not know weights or ranks. The suffix of a tensor's name gives its axes: b batch, t position, q block of query
positions, k block of key positions.

A GPU gets the mask in the form of FlexAttention: blocks of positions that are skipped, computed as a whole, or masked
one by one. Its kernel exists only as compiled code, and has no backward on a CPU. So a CPU gets all pairs of positions.
Why not `varlen_attn`, the other kernel for documents: it has no float32, its backward adds in no fixed order, and it
needs the number of documents, which differs from batch to batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinytrain_dist.model.matmul import matmul_dtype, runs_on_cuda

if TYPE_CHECKING:  # not at run time, because the import takes time that few runs need
    from torch.nn.attention.flex_attention import BlockMask

    AttentionMask = Tensor | BlockMask

BLOCK = 128  # positions in a block of FlexAttention
FLEX_MIN_HEAD_WIDTH = 16  # of FlexAttention's kernel


def positions_in_documents(documents_bt: Tensor) -> Tensor:
    """Return the position of each token in its document, from 0: int64 [b, t]."""
    positions_t = torch.arange(documents_bt.shape[1], device=documents_bt.device)
    begins_bt = torch.ones_like(documents_bt, dtype=torch.bool)
    begins_bt[:, 1:] = documents_bt[:, 1:] != documents_bt[:, :-1]
    starts_bt = torch.where(begins_bt, positions_t, 0).cummax(dim=1).values
    return positions_t - starts_bt


def attention_mask(documents_bt: Tensor, x_btd: Tensor, head_width: int) -> AttentionMask:
    """Return the mask for causal attention within documents, for heads of this width computed from `x`.

    The form is chosen by the device for which the code runs. No form needs to know how many documents there are, so
    the device is not waited for, and compiled code is the same for every batch.
    """
    if runs_on_cuda(x_btd) and head_width >= FLEX_MIN_HEAD_WIDTH:
        return block_mask(documents_bt)
    return dense_mask(documents_bt, matmul_dtype(x_btd))


def dense_mask(documents_bt: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of attention: 0 or -infinity, [b, 1, t, t] in `dtype`.

    Not a mask of booleans, because each layer would make numbers of it, and keep them for backward.
    """
    positions_t = torch.arange(documents_bt.shape[1], device=documents_bt.device)
    allowed_btt = documents_bt[:, :, None] == documents_bt[:, None, :]
    allowed_btt &= positions_t[:, None] >= positions_t
    zeros = torch.zeros(allowed_btt.shape, dtype=dtype, device=documents_bt.device)
    return zeros.masked_fill_(~allowed_btt, -math.inf).unsqueeze(1)


def block_mask(documents_bt: Tensor) -> BlockMask:
    """Return the mask of FlexAttention.

    It equals that of torch's `create_block_mask`, which first computes all pairs of positions. Documents are ascending
    within a window, so the first and the last document of each block tell enough.
    """
    from torch.nn.attention.flex_attention import BlockMask

    t = documents_bt.shape[1]
    blocks = torch.arange(-(-t // BLOCK), device=documents_bt.device)
    first_bq = documents_bt[:, ::BLOCK]
    last_bq = documents_bt[:, (blocks * BLOCK + BLOCK - 1).clamp(max=t - 1)]
    # A block is needed if the last document of its keys reaches the first document of its queries.
    needed_bqk = (last_bq[:, None, :] >= first_bq[:, :, None]) & (blocks[:, None] >= blocks)
    # It is computed as a whole if all its keys come before its queries, and all belong to one document. The last block
    # of queries may end early; then it is not whole.
    one_document_bqk = first_bq[:, None, :] == last_bq[:, :, None]
    is_complete_q = (blocks + 1) * BLOCK <= t
    whole_bqk = one_document_bqk & (blocks[:, None] > blocks) & is_complete_q[:, None]
    return BlockMask.from_kv_blocks(
        *_block_lists(needed_bqk & ~whole_bqk),
        *_block_lists(whole_bqk),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_of_pairs(documents_bt),
        seq_lengths=(t, t),
    )


def _block_lists(chosen_bqk: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen key blocks of each query block, and their indices first in a list of all."""
    chosen = chosen_bqk[:, None].int()  # the same for all heads
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.int()


def _mask_of_pairs(documents_bt: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the function with which FlexAttention decides about single pairs of positions."""

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_bt[b, query] == documents_bt[b, key])

    return allowed


def attention_with_block_mask(q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor, mask: BlockMask) -> Tensor:
    """Return softmax attention of the pairs of positions that the mask allows: [b, h, t, e], as q.

    Keys and values may have fewer heads than queries.
    """
    from torch.nn.attention.flex_attention import flex_attention

    # Outside compiled blocks, the kernel is compiled by itself.
    compiled_here = q_bhte.is_cuda and not torch.compiler.is_compiling()
    attend = _compiled_flex_attention() if compiled_here else flex_attention
    grouped = q_bhte.shape[1] != k_bkte.shape[1]
    y_bhte: Tensor = attend(q_bhte, k_bkte, v_bkte, block_mask=mask, enable_gqa=grouped)
    return y_bhte


@functools.cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
