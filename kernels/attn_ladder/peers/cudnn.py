"""cuDNN attention through PyTorch SDPA."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_ladder.problem import Problem
from attn_ladder.stage import Peer

PEER = Peer(title="cuDNN attention through PyTorch SDPA", distribution="nvidia-cudnn-cu13")


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    config: None = None,
) -> tuple[torch.Tensor, None]:
    """SDPA with this backend alone, on transposed views; it exposes no log-sum-exp."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal,
            scale=softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2), None


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why this peer cannot run a problem on a GPU of that compute capability, or None."""
    if capability < (8, 0):
        return f"cuDNN needs compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    if problem.causal and problem.seqlen_q != problem.seqlen_k:
        return "SDPA aligns a causal mask top-left; the problem needs bottom-right"
    return None
