"""FlashAttention-3 (Shah et al., 2024), the kernel on the witness stand.

The wheel `fa3-fwd` packs the upstream forward kernels (bf16 and fp8, no fp16). Another build with
the same interface is named by the environment variable ATTN_LADDER_FA3_MODULE (config key
`fa3_module`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache

import torch

from attn_ladder.problem import Problem
from attn_ladder.stage import Peer

PEER = Peer(title="FlashAttention-3", distribution="fa3-fwd")


@cache
def flash_attn_func() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """FA3's function, looked up once."""
    module = os.environ.get("ATTN_LADDER_FA3_MODULE", "fa3_fwd_interface")
    return importlib.import_module(module).flash_attn_func


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    config: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FA3's `flash_attn_func`; `config` may set `num_splits` and `pack_gqa`. Returns (out, lse)."""
    out, lse = flash_attn_func()(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        return_attn_probs=True,
        **(config or {}),
    )
    return out, lse


def candidates(problem: Problem) -> list[dict]:
    """FA3's own knobs worth trying on a problem; the first is its default."""
    knobs: list[dict] = [{}, {"num_splits": 0}, {"num_splits": 2}]
    if problem.nheads != problem.nheads_k:
        knobs += [{"pack_gqa": True}, {"pack_gqa": False}]
    return knobs


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why FA3 cannot run a problem on a GPU of that compute capability, or None."""
    if capability[0] != 9:
        return f"FA3 needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}"
    if problem.dtype != "bf16":
        return f"this FA3 build has no {problem.dtype} kernels"
    return None
