"""A second copy of a stage's module, so that one of its functions can be replaced.

The kernels of the copy look names up in the copy, so a function put there before the first launch
is the one that is compiled; the stage itself stays as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def copied(module: ModuleType, name: str, **replaced: Any) -> ModuleType:
    """A copy of `module` under a name of its own, with `replaced` in place of what it defines.

    Raises `ValueError` if the module does not define one of the names.
    """
    unknown = [key for key in replaced if key not in vars(module)]
    if unknown:
        raise ValueError(f"{module.__name__} defines no {', '.join(unknown)}; nothing to replace")
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location(f"{module.__name__}__{name}", module.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    vars(copy).update(replaced)
    return copy


def reconfigured(module: ModuleType, name: str, change: Callable[[Any], Any]) -> ModuleType:
    """A copy of a stage's `module` that runs what `change` makes of its configurations."""

    def schedule(*problem: Any) -> tuple[Any, Any, int]:
        cfg, shape, grid = module.schedule(*problem)
        return change(cfg), shape, grid

    return copied(module, name, schedule=schedule)
