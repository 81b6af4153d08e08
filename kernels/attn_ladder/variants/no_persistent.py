"""The top stage without its persistent grid: one CTA for each query tile.

The CTAs are launched in the order in which the persistent ones would take the tiles, groups of
heads with the longest causal tile first; each sets up its barriers and waits for its first loads
in full. What it loses against the top is what `launch` is worth there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_ladder import stage5_everything
from attn_ladder.stage import Variant
from attn_ladder.variants._copied import copied

VARIANT = Variant(
    title="Top stage, one CTA per tile", of="stage5", changes="the persistent grid taken away"
)


def schedule(*problem: Any) -> tuple[Any, Any, int]:
    """The top stage's configuration and shape, with as many CTAs as tiles."""
    cfg, shape, _ = stage5_everything.schedule(*problem)
    return replace(cfg, schedule="static", cross_tile=False), shape, shape.num_m * shape.num_heads


_stage = copied(stage5_everything, "no_persistent", schedule=schedule)
forward = _stage.forward
unsupported = _stage.unsupported
