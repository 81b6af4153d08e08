"""FlashAttention-4's CuTe DSL kernels, which also run on sm_90."""

from __future__ import annotations

import torch

from attn_ladder.problem import Problem
from attn_ladder.stage import Peer

try:  # here, so that the workers that measure import it while they wait
    from flash_attn.cute.interface import flash_attn_func
except ModuleNotFoundError:
    flash_attn_func = None

PEER = Peer(title="FlashAttention-4 (CuTe DSL)", distribution="flash-attn-4")


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    config: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FA4's `flash_attn_func`; `config` may set its keyword arguments. Returns (out, lse)."""
    result = flash_attn_func(
        q, k, v, softmax_scale=softmax_scale, causal=causal, return_lse=True, **(config or {})
    )
    return result[0], result[1]


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why FA4 cannot run a problem on a GPU of that compute capability, or None."""
    if flash_attn_func is None:
        return "flash-attn-4 is not installed; `pip install --pre flash-attn-4[cu13]` brings it"
    if capability[0] not in (9, 10):
        return f"FA4 needs compute capability 9 or 10; this GPU has {capability[0]}.{capability[1]}"
    return None
