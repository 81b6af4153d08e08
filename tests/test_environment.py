"""Setting up: what is missing is said, with its remedy, before anything is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attn_profiling import environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine with nothing on PATH and no right to install; returns the folder on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(environment, "_may_install", lambda: False)
    return folder


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def pip(monkeypatch):
    """Record what pip would be asked to do, and make empty environments."""
    calls = []

    def create(folder, **_):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()
        (folder / "pyvenv.cfg").write_text(f"version = 3.{sys.version_info[1]}.0\n")

    monkeypatch.setattr(environment, "_pip", lambda folder, *words: calls.append(words))
    monkeypatch.setattr(environment.venv, "create", create)
    return calls


def test_missing_tex_is_said_before_anything_is_installed(bare, pip, tmp_path, capsys):
    status = environment.main(["--venv", str(tmp_path / "venv"), "--lock", "base", "--tex", "need"])
    said = capsys.readouterr().err
    assert status == 1
    assert "lacks latexmk, pdflatex" in said
    assert "apt-get install --no-install-recommends latexmk" in said
    assert "make results" in said
    assert pip == []


def test_tests_go_on_without_tex(bare, pip, tmp_path, capsys):
    status = environment.main(["--venv", str(tmp_path / "venv"), "--lock", "base", "--tex", "try"])
    assert status == 0
    assert "note: the PDF needs TeX" in capsys.readouterr().err
    assert pip != []


def test_a_missing_latex_package_is_named(bare, tmp_path, monkeypatch):
    paper = tmp_path / "paper"
    paper.mkdir()
    (paper / "main.tex").write_text(
        "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage{there, absent}\n"
    )
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for tool in ("latexmk", "pdflatex"):
        executable(bare / tool, "")
    executable(bare / "kpsewhich", "echo /t/fontenc.sty; echo /t/there.sty")
    assert environment.missing_tex() == ["absent.sty"]
    executable(bare / "kpsewhich", "echo /t/fontenc.sty; echo /t/there.sty; echo /t/absent.sty")
    assert environment.missing_tex() == []


def test_root_on_debian_installs_tex(bare, monkeypatch):
    installed = []
    monkeypatch.setattr(environment, "_may_install", lambda: True)
    monkeypatch.setattr(environment, "_apt", installed.extend)
    with pytest.raises(environment.Missing):
        environment.ensure_tex("need")
    assert installed == environment.debian_packages()


def test_a_wrong_python_is_refused(monkeypatch):
    environment.check_python()
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 4))
    with pytest.raises(environment.Missing, match="this is Python 3.10.4; 3.11 or 3.12 is needed"):
        environment.check_python()


def test_a_python_without_venv_is_refused(bare, monkeypatch):
    executable(bare / "python3", "echo \"No module named 'ensurepip'\" >&2; exit 1")
    monkeypatch.setattr(environment.sys, "executable", str(bare / "python3"))
    with pytest.raises(environment.Missing, match="apt-get install python3-venv"):
        environment.check_python()


def test_root_on_debian_installs_venv(bare, monkeypatch):
    installed = []
    monkeypatch.setattr(environment, "_may_install", lambda: True)
    monkeypatch.setattr(environment, "_apt", installed.extend)
    monkeypatch.setattr(environment, "_makes_environments", lambda: bool(installed))
    environment.check_python()
    assert installed == ["python3-venv"]


def test_a_second_time_installs_nothing(pip, tmp_path):
    folder = tmp_path / "venv"
    assert environment.install(folder, "cpu")
    assert [words[-1] for words in pip] == [str(ROOT / "requirements" / "base.txt"), str(ROOT)]
    assert "--require-hashes" in pip[0]
    assert not environment.install(folder, "cpu")
    assert not environment.install(folder, "base")
    assert len(pip) == 2


def test_the_hashes_of_wheels_are_kept(pip, tmp_path, monkeypatch):
    folder = tmp_path / "venv"

    def installing(version, **more):
        def report(folder, *words):
            if "--report" in words:
                item = {"metadata": {"name": "peer", "version": version}, "download_info": more}
                Path(words[words.index("--report") + 1]).write_text(json.dumps({"install": [item]}))

        monkeypatch.setattr(environment, "_pip", report)

    installing("1", archive_info={"hashes": {"sha256": "a" * 64}})
    environment.install(folder, "base")
    kept = folder / environment.WHEELS
    assert json.loads(kept.read_text()) == {"peer": ["1", "a" * 64]}
    assert not (folder / "pip-report.json").exists()
    installing("2", dir_info={})
    environment.install(folder, "cpu")
    assert json.loads(kept.read_text()) == {"peer": ["1", "a" * 64]}


def test_another_lock_or_a_changed_one_installs(pip, tmp_path, monkeypatch):
    folder = tmp_path / "venv"
    environment.install(folder, "cpu")
    assert environment.install(folder, "cuda")
    assert not environment.stamp(folder, "cpu").exists()
    locks = tmp_path / "requirements"
    locks.mkdir()
    for name in ("base", "cuda"):
        (locks / f"{name}.txt").write_bytes((ROOT / "requirements" / f"{name}.txt").read_bytes())
    monkeypatch.setattr(
        environment,
        "lock_files",
        lambda lock: [locks / f"{n}.txt" for n in environment.LOCKS[lock]],
    )
    assert not environment.install(folder, "cuda")
    (locks / "base.txt").write_text("# changed\n")
    assert environment.install(folder, "cuda")


def test_another_python_starts_over(pip, tmp_path):
    folder = tmp_path / "venv"
    environment.install(folder, "base")
    (folder / "pyvenv.cfg").write_text("version = 3.9.1\n")
    (folder / "leftover").touch()
    for stamp in folder.glob("stamp-*"):
        stamp.unlink()
    environment.install(folder, "base")
    assert not (folder / "leftover").exists()


def test_an_absent_cpu_torch_says_where_it_is(tmp_path):
    (tmp_path / "bin").mkdir()
    executable(
        tmp_path / "bin" / "python",
        "echo 'ERROR: No matching distribution found for torch==2.13.0+cpu' >&2; exit 1",
    )
    with pytest.raises(environment.Missing, match="PIP_EXTRA_INDEX_URL.*make test LOCK=cuda"):
        environment._pip(tmp_path, "-r", "x")
    executable(tmp_path / "bin" / "python", "echo 'ERROR: other' >&2; exit 1")
    with pytest.raises(environment.Missing, match="pip could not install -r x"):
        environment._pip(tmp_path, "-r", "x")


@pytest.mark.parametrize(
    ("text", "visible", "found"),
    [
        ("echo 'GPU 0: some GPU'", None, True),
        ("echo 'GPU 0: some GPU'", "0", True),
        ("echo 'GPU 0: some GPU'", "", False),
        ("echo 'No devices found'", None, False),
        ("exit 9", None, False),
    ],
)
def test_a_gpu_is_seen(bare, monkeypatch, text, visible, found):
    executable(bare / "nvidia-smi", text)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment.has_gpu() is found


@pytest.mark.parametrize("name", ["base", "cpu", "cuda"])
def test_locks_are_exact_hashed_and_name_no_place(name):
    lock = (ROOT / "requirements" / f"{name}.txt").read_text()
    entries = [line for line in lock.splitlines() if line and line[0] not in " #"]
    assert entries
    assert all("==" in line and line.endswith("\\") for line in entries)
    assert lock.count("--hash=sha256:") >= len(entries)
    assert "://" not in lock and "--index" not in lock and "--find-links" not in lock


def test_locks_agree():
    def pins(name):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        return dict(
            line.split(" ")[0].split("==") for line in lines if line and line[0] not in " #"
        )

    base, cpu, cuda = pins("base"), pins("cpu"), pins("cuda")
    assert "torch" not in base and "triton" not in base
    assert cpu["triton"] == cuda["triton"] == "3.6.0"
    assert cpu["torch"].endswith("+cpu") and "+" not in cuda["torch"]
    assert tuple(map(int, base["numpy"].split(".")[:2])) < (2, 4)
    for other in (cpu, cuda):
        assert all(base[package] == other[package] for package in base.keys() & other.keys())


def test_make_without_a_python_says_so(tmp_path):
    run = subprocess.run(
        ["make", "-n", "-f", str(ROOT / "Makefile"), "PYTHON="],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "Python 3.11 or 3.12 is needed and not on PATH" in run.stderr
