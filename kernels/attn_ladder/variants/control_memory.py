"""Control of the constraint `memory`: loads that each wait for the one before."""

from __future__ import annotations

import torch

from attn_ladder.stage import Control
from attn_ladder.variants._dosed import forward_dosed, unsupported_dosed

CONTROL = Control(title="Planted dependent loads", constraint="memory", doses=(0, 4, 8, 16))
unsupported = unsupported_dosed


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    config: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with a dose of `config` (see `CONTROL`); returns (out, lse)."""
    return forward_dosed(q, k, v, softmax_scale=softmax_scale, memory=config)
