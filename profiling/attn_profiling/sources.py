"""What is measured beyond the ladder's subjects: the code that serves users, by the file that holds
it. Its hash follows the same rules as a subject's."""

from __future__ import annotations

import ast
import hashlib
from functools import cache

from attn_ladder import stage
from attn_ladder.stage import _stripped, _text

SERVING = {"decode": "decode_launch.py", "transformers": "integrations/transformers.py"}
"""`decode`: the kernels of `attention_with_kvcache`. `transformers`: all that a model runs through
the integration, prefill included."""
ENTRIES = {"stage5": "dispatch.py"}
"""What users call in place of a subject's `forward`: `host` measures that."""


def is_known(name: str) -> bool:
    """Whether a name has a source here: a subject of the ladder, or what serves users."""
    return name in SERVING or name in stage.subjects()


def source_hash(name: str) -> str:
    """`stage.kernel_hash`, for what serves users too."""
    if name not in SERVING:
        return stage.kernel_hash(name)
    return stage.source_hash(stage.PACKAGE / SERVING[name])


@cache
def entry_hash(name: str) -> str | None:
    """Sixteen hex digits that change when what runs of the file of a subject's entry changes; None
    where users call its `forward`.

    Files that it imports do not count: the kernel has a hash of its own, and what else there is
    serves other calls.
    """
    if name not in ENTRIES:
        return None
    tree = ast.parse((stage.PACKAGE / ENTRIES[name]).read_text())
    return hashlib.sha256(_text(_stripped(tree)).encode()).hexdigest()[:16]
