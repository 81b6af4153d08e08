"""Control of the constraint `sync`: extra barriers of the whole CTA, once a key block."""

from __future__ import annotations

import torch

from attn_ladder.stage import Control
from attn_ladder.variants._dosed import forward_dosed, unsupported_dosed

CONTROL = Control(title="Planted CTA barriers", constraint="sync", doses=(0, 4, 16, 64))
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
    return forward_dosed(q, k, v, softmax_scale=softmax_scale, sync=config)
