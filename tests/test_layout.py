"""The house keeps its shape: where modules may lie, who imports whom, what runs without torch."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIGHT = ("metrics", "tidy", "verdict", "stats", "record", "config", "workflow", "container")
BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


def loose_modules(folder: Path) -> list[str]:
    """Python files directly in a folder that must hold packages only."""
    return sorted(path.name for path in folder.glob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement of a file; level > 0 is relative."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.append((node.level, module))
            found += [(node.level, f"{module}.{alias.name}") for alias in node.names]
    return found


def importing(folder: Path, package: str) -> list[str]:
    """Files below `folder` that import `package`."""
    return [
        path.name
        for path in sorted(folder.rglob("*.py"))
        if any(module.partition(".")[0] == package for _, module in imports(path))
    ]


def relative_imports(folder: Path) -> list[str]:
    """Files below `folder` with a relative import."""
    return [p.name for p in sorted(folder.rglob("*.py")) if any(level for level, _ in imports(p))]


def dead_links(page: Path) -> list[str]:
    """Relative links of a Markdown page that lead nowhere."""
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    return [link for link in links if not (page.parent / link).exists()]


def without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which torch and triton cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKER + code], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("folder", ["kernels", "profiling"])
def test_top_folders_hold_packages_only(folder):
    assert loose_modules(ROOT / folder) == []


def test_a_loose_module_is_seen(tmp_path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / "notes.md").touch()
    assert loose_modules(tmp_path) == ["__init__.py"]


def test_kernels_never_import_profiling():
    assert importing(ROOT / "kernels", "attn_profiling") == []


def test_an_import_in_the_wrong_direction_is_seen(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from attn_profiling.record import read\n")
    (tmp_path / "b.py").write_text("import attn_profiling_else\n")
    assert importing(tmp_path, "attn_profiling") == ["a.py"]


def test_no_stage_imports_another():
    for path in (ROOT / "kernels" / "attn_ladder").glob("stage[0-9]_*.py"):
        modules = [module for _, module in imports(path)]
        assert not [m for m in modules if m.startswith("attn_ladder.stage") and m[17:18].isdigit()]


@pytest.mark.parametrize("folder", ["kernels", "profiling", "paper", "tests"])
def test_imports_are_absolute(folder):
    assert relative_imports(ROOT / folder) == []


def test_a_relative_import_is_seen(tmp_path):
    (tmp_path / "a.py").write_text("from . import b\n")
    assert relative_imports(tmp_path) == ["a.py"]


def test_what_derives_results_needs_no_torch():
    names = [f"attn_profiling.{name}" for name in LIGHT] + ["attn_ladder"]
    run = without_torch(
        f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "from attn_ladder.stage import kernel_hash, subjects\n"
        "[kernel_hash(name) for name in subjects()]\n"
    )
    assert run.returncode == 0, run.stderr


def test_the_paper_needs_no_torch():
    names = [f"paper.{path.stem}" for path in sorted((ROOT / "paper").glob("*.py"))]
    run = without_torch(
        f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    )
    assert run.returncode == 0, run.stderr


def test_the_block_holds():
    run = without_torch("import attn_ladder.stage1_fused")
    assert run.returncode != 0
    assert "is blocked" in run.stderr


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "kernels/README.md", "docker/README.md"]
)
def test_links_lead_somewhere(page):
    assert dead_links(ROOT / page) == []


def test_a_dead_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[here](page.md) [gone](gone.md) [away](https://example.org/x)\n")
    assert dead_links(page) == ["gone.md"]


def test_importing_the_folder_kernels_runs_nothing():
    """transformers imports a package `kernels` where it finds one, and reads its version."""
    code = (
        "import json, sys, kernels\n"
        "print(json.dumps([getattr(kernels, '__file__', None), hasattr(kernels, '__version__'),\n"
        "                  'attn_ladder' in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(run.stdout) == [None, False, False]


def test_a_package_kernels_would_be_seen(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '1'\n")
    code = "import kernels; print(kernels.__file__, kernels.__version__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split()[1] == "1"
