"""What is measured beyond the ladder's subjects: the code that serves users, by the file that holds
it. Its hash follows the same rules as a subject's."""

from __future__ import annotations

import ast
import hashlib
from functools import cache

from attn_ladder import stage

SERVING = {"decode": "decode.py", "transformers": "integrations/transformers.py"}
"""`decode`: the kernels of `attention_with_kvcache`. `transformers`: all that a model runs through
the integration, prefill included."""


def is_known(name: str) -> bool:
    """Whether a name has a source here: a subject of the ladder, or what serves users."""
    return name in SERVING or name in stage.subjects()


@cache
def source_hash(name: str) -> str:
    """`stage.kernel_hash`, for what serves users too: the syntax trees of the file and of every
    file of the package that it imports, without docstrings and comments."""
    if name not in SERVING:
        return stage.kernel_hash(name)
    seen = {stage.PACKAGE / "stage.py", stage.PACKAGE / "problem.py"}
    pending, digest = [stage.PACKAGE / SERVING[name]], hashlib.sha256()
    while pending:
        path = pending.pop(0)
        if path in seen:
            continue
        seen.add(path)
        tree = ast.parse(path.read_text())
        pending += stage._imported_files(tree)
        digest.update(stage._text(stage._stripped(tree)).encode())
    return digest.hexdigest()[:16]
