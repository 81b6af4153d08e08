"""The top stage with four producer warps instead of one.

One thread issues a TMA load whatever the number of warps, so more of them can only cost issue slots
and barriers; the plan's flag for their number is measured here.
"""

from __future__ import annotations

from dataclasses import replace

from attn_ladder import stage5_everything
from attn_ladder.stage import Variant
from attn_ladder.variants._copied import reconfigured

VARIANT = Variant(
    title="Top stage, four producer warps", of="stage5", changes="four warps load instead of one"
)


_stage = reconfigured(
    stage5_everything, "four_producers", lambda cfg: replace(cfg, producer_warps=4)
)
forward = _stage.forward
unsupported = _stage.unsupported
