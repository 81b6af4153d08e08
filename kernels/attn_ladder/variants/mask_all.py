"""The top stage with a mask in every block, also in the interior blocks that need none.

The plan removes branches on masks by predication; the top stage goes further and knows which blocks
need no mask. What this variant loses against it is what masked work in the hot loop costs.
"""

from __future__ import annotations

from dataclasses import replace

from attn_ladder import stage5_everything
from attn_ladder.stage import Variant
from attn_ladder.variants._copied import reconfigured

VARIANT = Variant(
    title="Top stage with every block masked", of="stage5", changes="interior blocks are masked too"
)


_stage = reconfigured(stage5_everything, "mask_all", lambda cfg: replace(cfg, mask_all=True))
forward = _stage.forward
unsupported = _stage.unsupported
