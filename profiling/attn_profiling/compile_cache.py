"""What keeps a kernel that was compiled once in Triton's cache from being found again.

Triton 3.6 hashes a function differently if a helper that it calls was hashed before, for another
kernel: what the helper takes from its module is then counted to the caller, too. So in a process
with several subjects the order of their first calls would decide what has to be compiled.
"""

from __future__ import annotations

import sys


def forget_hashes(package: str = "attn_ladder") -> None:
    """Before a subject's first call: have its kernel hashed as if it were alone in the process."""
    from triton.runtime.jit import JITCallable

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package:
            for value in vars(module).values():
                if isinstance(value, JITCallable):
                    value.hash = None
                    value.used_global_vals = {}
