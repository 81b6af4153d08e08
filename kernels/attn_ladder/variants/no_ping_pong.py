"""The top stage without turns: its consumers issue their products whenever they are ready.

Without turns a softmax must run under the consumer's own product as well (`overlap="own"`), so at
headdim 64 two things change.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_ladder import stage5_everything
from attn_ladder.stage import Variant
from attn_ladder.variants._copied import copied

VARIANT = Variant(
    title="Top stage without ping-pong", of="stage5", changes="the consumers do not take turns"
)


def schedule(*problem: Any) -> tuple[Any, Any, int]:
    cfg, shape, grid = stage5_everything.schedule(*problem)
    return replace(cfg, ping_pong=False, overlap="own"), shape, grid


_stage = copied(stage5_everything, "no_ping_pong", schedule=schedule)
forward = _stage.forward
unsupported = _stage.unsupported
