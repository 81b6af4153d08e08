"""The top stage with turns that end at the other moment.

Where the top stage hands the turn on when its products are issued (headdim 128), this one waits
until they are complete, and where the top stage waits (headdim 64), this one does not: which
softmax runs under whose products is all that differs.
"""

from __future__ import annotations

from dataclasses import replace

from attn_ladder import stage5_everything
from attn_ladder.stage import Variant
from attn_ladder.variants._copied import reconfigured

VARIANT = Variant(
    title="Top stage, other end of the turns", of="stage5", changes="when the turn is handed on"
)
OTHER = {"own": "others", "others": "own"}


_stage = reconfigured(
    stage5_everything, "other_turn", lambda cfg: replace(cfg, overlap=OTHER[cfg.overlap])
)
forward = _stage.forward
unsupported = _stage.unsupported
