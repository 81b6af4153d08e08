"""What can be measured, found without importing it: every subject is read from its file as a
literal.

A file declares `STAGE = Stage(...)`, `PEER = Peer(...)`, `VARIANT = Variant(...)` or
`CONTROL = Control(...)` and has this interface:

    forward(q, k, v, *, softmax_scale=None, causal=False, config=None) -> (out, lse or None)
    unsupported(problem, capability) -> None, or one sentence saying why it cannot run

Reading a title or a kernel hash needs neither torch nor triton.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Stage:
    """A rung of the ladder. `removes` is the id of a constraint, or None for the first."""

    title: str
    removes: str | None = None


@dataclass(frozen=True)
class Peer:
    """A kernel of somebody else. `distribution` is the package whose version identifies it."""

    title: str
    distribution: str


@dataclass(frozen=True)
class Variant:
    """A stage with one thing changed. `of` names the stage, `changes` says what differs."""

    title: str
    of: str
    changes: str


@dataclass(frozen=True)
class Control:
    """A kernel with a planted dose of a constraint; a subject for each dose, `<file>.<dose>`."""

    title: str
    constraint: str
    doses: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """Anything that is measured. `kind` is `stage`, `peer`, `variant` or `control`."""

    name: str
    kind: str
    title: str
    removes: str | None
    of: str | None
    distribution: str | None
    module: str
    path: Path
    constraint: str | None = None
    dose: int | None = None


_KINDS = {
    "STAGE": (Stage, "stage"),
    "PEER": (Peer, "peer"),
    "VARIANT": (Variant, "variant"),
    "CONTROL": (Control, "control"),
}


def _read(path: Path, module: str, name: str) -> list[Subject]:
    for node in ast.parse(path.read_text()).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        if node.targets[0].id in _KINDS and isinstance(node.value, ast.Call):
            cls, kind = _KINDS[node.targets[0].id]
            literal = cls(
                **{k.arg: ast.literal_eval(k.value) for k in node.value.keywords if k.arg}
            )
            found = Subject(
                name=name,
                kind=kind,
                title=literal.title,
                removes=getattr(literal, "removes", None),
                of=getattr(literal, "of", None),
                distribution=getattr(literal, "distribution", None),
                module=module,
                path=path,
                constraint=getattr(literal, "constraint", None),
            )
            doses = getattr(literal, "doses", ())
            return [replace(found, name=f"{name}.{d}", dose=d) for d in doses] or [found]
    raise ValueError(
        f"{path}: no literal STAGE, PEER, VARIANT or CONTROL; a subject's file must declare one"
    )


@cache
def subjects() -> dict[str, Subject]:
    """All subjects by name: `stage1` … in order, then the peers, then variants and controls."""
    found: dict[str, Subject] = {}
    for path in sorted(PACKAGE.glob("stage[0-9]_*.py")):
        (one,) = _read(path, f"attn_ladder.{path.stem}", path.stem.split("_")[0])
        found[one.name] = one
    for folder in ("peers", "variants"):
        for path in sorted((PACKAGE / folder).glob("[a-z]*.py")):
            for one in _read(path, f"attn_ladder.{folder}.{path.stem}", path.stem):
                if one.name in found:
                    raise ValueError(f"{path}: the subject name {one.name!r} is used twice")
                found[one.name] = one
    order = [kind for _, kind in _KINDS.values()]
    return {s.name: s for s in sorted(found.values(), key=lambda s: order.index(s.kind))}


def subject(name: str) -> Subject:
    """The subject called `name`. Raises `ValueError` listing the known ones."""
    known = subjects()
    if name not in known:
        raise ValueError(f"subject {name!r} is unknown; known subjects: {', '.join(known)}")
    return known[name]


def in_suite(name: str, suite: str) -> bool:
    """Whether a subject is measured in a suite.

    Controls are measured in `control` alone, and nothing else there; variants only in `variant`.
    """
    kind = subject(name).kind
    if kind == "variant":
        return suite == "variant"
    return (kind == "control") == (suite == "control")


def load(name: str) -> ModuleType | SimpleNamespace:
    """Import a subject (this is where torch and triton come in); gives `forward` and `unsupported`.

    A control's `forward` is bound to its dose.
    """
    found = subject(name)
    module = importlib.import_module(found.module)
    if found.dose is None:
        return module
    return SimpleNamespace(
        forward=partial(module.forward, config=found.dose), unsupported=module.unsupported
    )


def _imported_files(tree: ast.Module) -> list[Path]:
    """Files of this package that a module imports, however the import is written."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    files = []
    for module in sorted(modules):
        parts = module.split(".")
        if parts[0] != PACKAGE.name or len(parts) == 1:
            continue
        path = PACKAGE.joinpath(*parts[1:]).with_suffix(".py")
        if path.is_file():
            files.append(path)
    return files


def _stripped(tree: ast.Module) -> ast.Module:
    """The tree without its docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _text(node: object) -> str:
    """A syntax tree as text. Empty fields are left out: later versions of Python add some."""
    if isinstance(node, ast.AST):
        parts = [f"{k}={_text(v)}" for k, v in ast.iter_fields(node) if v is not None and v != []]
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return repr(node)


@cache
def source_hash(path: Path) -> str:
    """Sixteen hex digits that change when what a file of this package runs changes.

    Hashed is the syntax tree, without docstrings and comments, of the file and of every file of
    this package that it imports, directly or not.
    """
    seen = {PACKAGE / "stage.py", PACKAGE / "problem.py"}  # they describe; nothing of them runs
    pending, digest = [path], hashlib.sha256()
    while pending:
        path = pending.pop(0)
        if path in seen:
            continue
        seen.add(path)
        tree = ast.parse(path.read_text())
        pending += _imported_files(tree)
        digest.update(_text(_stripped(tree)).encode())
    return digest.hexdigest()[:16]


def kernel_hash(name: str) -> str:
    """`source_hash` of a subject's file; its configurations are in it or in what it imports."""
    return source_hash(subject(name).path)
