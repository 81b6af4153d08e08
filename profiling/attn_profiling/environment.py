"""Set up what the workflow runs with: a virtual environment from the locks, TeX from the system.

`python -m attn_profiling.environment --lock base --tex need` needs nothing but the standard
library. It says what is missing, and how to get it, before it changes anything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {"base": ("base",), "cpu": ("cpu", "base"), "cuda": ("cuda", "base")}
PYTHONS = ((3, 11), (3, 12))


class Missing(Exception):
    """Something the machine lacks; the text says what, and how to get it."""


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if not shutil.which("nvidia-smi"):
        return Path("/dev/nvidia0").exists()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and listed.stdout.startswith("GPU ")


def debian_packages() -> list[str]:
    """The Debian packages that bring TeX."""
    return (ROOT / "requirements" / "debian.txt").read_text().split()


def missing_tex() -> list[str]:
    """The programs and LaTeX packages of the paper that this machine lacks."""
    missing = [tool for tool in ("latexmk", "pdflatex") if not shutil.which(tool)]
    used: list[str] = []
    for path in sorted((ROOT / "paper").glob("*.tex")):
        for names in re.findall(r"^\\usepackage(?:\[[^]]*\])?\{([^}]*)\}", path.read_text(), re.M):
            used += [f"{name.strip()}.sty" for name in names.split(",")]
    if not shutil.which("kpsewhich"):
        return missing
    found = subprocess.run(["kpsewhich", *used], capture_output=True, text=True).stdout
    return missing + [name for name in dict.fromkeys(used) if f"/{name}\n" not in found]


def tex_message(missing: Sequence[str]) -> str:
    """What to do about `missing`."""
    return (
        f"the PDF needs TeX, and this machine lacks {', '.join(missing)}. On Debian or Ubuntu:"
        f" apt-get install --no-install-recommends {' '.join(debian_packages())} (as root `make`"
        " does it by itself); elsewhere install TeX Live. Everything but the PDF works without:"
        " make results"
    )


def _may_install() -> bool:
    return (
        os.geteuid() == 0 and Path("/etc/debian_version").exists() and bool(shutil.which("apt-get"))
    )


def _apt(packages: Sequence[str]) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-q"], install):
        print("+", " ".join(command), file=sys.stderr, flush=True)
        if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
            raise Missing(f"`{' '.join(command)}` failed; its messages are above")


def ensure_tex(need: str) -> None:
    """Install TeX where allowed; elsewhere raise `Missing`, or say so if `need` is "try"."""
    missing = missing_tex()
    if missing and _may_install():
        _apt(debian_packages())
        missing = missing_tex()
    if missing and need == "need":
        raise Missing(tex_message(missing))
    if missing:
        print(f"note: {tex_message(missing)}", file=sys.stderr)


def _makes_environments() -> bool:
    """Whether this Python can; Debian's cannot without the package python3-venv."""
    probe = [sys.executable, "-c", "import ensurepip, venv"]
    return subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0


def check_python() -> None:
    """Raise `Missing` where this is the wrong Python or cannot make virtual environments."""
    if sys.version_info[:2] not in PYTHONS:
        found = ".".join(map(str, sys.version_info[:3]))
        raise Missing(
            f"this is Python {found}; 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"
        )
    if not _makes_environments() and _may_install():
        _apt(["python3-venv"])
    if not _makes_environments():
        raise Missing(
            "this Python cannot make virtual environments: its ensurepip is missing."
            " On Debian or Ubuntu: apt-get install python3-venv"
        )


def lock_files(lock: str) -> list[Path]:
    """The files that `lock` installs."""
    return [ROOT / "requirements" / f"{name}.txt" for name in LOCKS[lock]]


def pins(lock: str) -> dict[str, str]:
    """{package: version} of what `lock` installs."""
    lines = [line for path in lock_files(lock) for line in path.read_text().splitlines()]
    return dict(line.split()[0].split("==") for line in lines if line and line[0] not in " #")


def hashes(lock: str) -> dict[str, list[str]]:
    """{package: sha256 of each file} that `lock` allows."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in (line for path in lock_files(lock) for line in path.read_text().splitlines()):
        if line and line[0] not in " #":
            name = line.split("==")[0]
        found.setdefault(name, []).extend(re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
    return found


WHEELS = "wheels.json"
"""In an environment's folder: {package: [version, sha256 of its wheel]}. pip itself keeps the hash
only of what was not taken from an index."""


def _note_wheels(folder: Path, report: Path) -> None:
    """Keep the hashes of a report of pip, and those of what it did not have to install."""
    if not report.is_file():
        return
    kept = folder / WHEELS
    wheels = json.loads(kept.read_text()) if kept.is_file() else {}
    for item in json.loads(report.read_text())["install"]:
        sha256 = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha256:
            wheels[item["metadata"]["name"]] = [item["metadata"]["version"], sha256]
    kept.write_text(json.dumps(wheels, indent=1, sort_keys=True) + "\n")
    report.unlink()


def stamp(folder: Path, lock: str) -> Path:
    """The file that says that `folder` holds `lock`; its name changes with what the lock says."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for path in [*lock_files(lock), ROOT / "pyproject.toml"]:
        digest.update(path.read_bytes())
    return folder / f"stamp-{lock}-{digest.hexdigest()[:16]}"


def _pip(folder: Path, *arguments: str) -> None:
    command = [
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
    ]
    run = subprocess.run([*command, *arguments], stderr=subprocess.PIPE, text=True)
    if run.returncode == 0:
        return
    sys.stderr.write(run.stderr)
    absent = re.search(r"No matching distribution found for (torch==\S+\+cpu)", run.stderr)
    if absent:
        raise Missing(
            f"pip finds no {absent[1]} for this Python and machine: PyPI carries only torch's CUDA"
            " builds. The CPU wheels (Linux x86-64, Python 3.11 and 3.12) are on PyTorch's own"
            " index; pytorch.org shows its address under 'Get started', pip, CPU. Name it in"
            " PIP_EXTRA_INDEX_URL, or a folder that holds the wheel in PIP_FIND_LINKS, and run the"
            " command again. Or take the CUDA build, several GB: make test LOCK=cuda"
        )
    raise Missing(f"pip could not install {' '.join(arguments)}; its messages are above")


def install(folder: Path, lock: str) -> bool:
    """Make `folder` a virtual environment that holds `lock`; return False if it already did."""
    if stamp(folder, lock).exists():
        return False
    version = folder / "pyvenv.cfg"
    if (
        version.exists()
        and f"version = {sys.version_info[0]}.{sys.version_info[1]}." not in version.read_text()
    ):
        shutil.rmtree(folder)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True, symlinks=True)
    for old in folder.glob("stamp-*"):  # one torch replaces the other
        old.unlink()
    print(f"installing requirements/{lock}.txt into {folder}", file=sys.stderr, flush=True)
    requirements = [argument for path in lock_files(lock) for argument in ("-r", str(path))]
    report = folder / "pip-report.json"
    _pip(folder, "--require-hashes", "--report", str(report), *requirements)
    _note_wheels(folder, report)
    _pip(folder, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    for held in {lock, "base"}:
        stamp(folder, held).touch()
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, set up, and return the exit status."""
    parser = argparse.ArgumentParser(prog="attn_profiling.environment", description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--lock", choices=["auto", *LOCKS], default="auto")
    parser.add_argument(
        "--without-gpu",
        choices=["base", "cpu"],
        default="base",
        help="what auto means without a GPU",
    )
    parser.add_argument("--tex", choices=["need", "try", "no"], default="no")
    options = parser.parse_args(arguments)
    lock = options.lock
    if lock == "auto":
        lock = "cuda" if has_gpu() else options.without_gpu
    try:
        check_python()
        if options.tex != "no":
            ensure_tex(options.tex)
        install(options.venv, lock)
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
