"""The top stage without turns: its consumers issue their products whenever they are ready.

Without turns a softmax must run under the consumer's own product as well (`overlap="own"`), so at
headdim 64 two things change.
"""

from __future__ import annotations

from dataclasses import replace

from attn_ladder import stage5_everything
from attn_ladder.stage import Variant
from attn_ladder.variants._copied import reconfigured

VARIANT = Variant(
    title="Top stage without ping-pong", of="stage5", changes="the consumers do not take turns"
)


_stage = reconfigured(
    stage5_everything, "no_ping_pong", lambda cfg: replace(cfg, ping_pong=False, overlap="own")
)
forward = _stage.forward
unsupported = _stage.unsupported
