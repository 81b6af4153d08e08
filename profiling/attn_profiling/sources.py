"""What is measured beyond the ladder's subjects: the code that serves users, by the file that holds
it. Its hash follows the same rules as a subject's."""

from __future__ import annotations

from attn_ladder import stage

SERVING = {"decode": "decode_launch.py", "transformers": "integrations/transformers.py"}
"""`decode`: the kernels of `attention_with_kvcache`. `transformers`: all that a model runs through
the integration, prefill included."""


def is_known(name: str) -> bool:
    """Whether a name has a source here: a subject of the ladder, or what serves users."""
    return name in SERVING or name in stage.subjects()


def source_hash(name: str) -> str:
    """`stage.kernel_hash`, for what serves users too."""
    if name not in SERVING:
        return stage.kernel_hash(name)
    return stage.source_hash(stage.PACKAGE / SERVING[name])
