"""The command lines that build and run the image, seen by stand-ins for the engines; one test, on
request, builds it for real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attn_profiling import container

ROOT = Path(__file__).resolve().parents[1]
DIGEST = "sha256:" + "a" * 64
FAKE = """#!{python}
import json, os, pathlib, sys
with open({log!r}, "a") as handle:
    handle.write(json.dumps(sys.argv) + "\\n")
if sys.argv[1] == "info":
    sys.exit({info})
if sys.argv[1] == "from":
    print("working-1")
if "--iidfile" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--iidfile") + 1]).write_text({digest!r})
sys.exit({status} if sys.argv[1] in ("run", "build", "bud") else 0)
"""


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """Put stand-ins on an otherwise empty PATH: `engines("docker", info=1)`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("PATH", str(folder))

    def add(name, *, info=0, status=0, digest=DIGEST):
        path = folder / name
        text = FAKE.format(
            python=sys.executable, log=str(log), info=info, status=status, digest=digest
        )
        path.write_text(text)
        path.chmod(0o755)

    add.calls = lambda: [json.loads(line) for line in log.read_text().splitlines()]
    add.named = lambda word: [call for call in add.calls() if call[1] == word]
    return add


def value_of(command, option):
    return command[command.index(option) + 1]


def test_none_is_native(engines):
    engines("docker")
    assert container.choose("none", gpu=False) == "none"
    assert container.prefix("none", Path("digest")) == ""
    assert engines.calls() == []


def test_auto_takes_the_first_that_works(engines):
    engines("docker", info=1)
    engines("podman")
    engines("buildah")
    assert container.choose("auto", gpu=False) == "podman"


def test_auto_is_native_where_nothing_works(engines):
    engines("docker", info=1)
    assert container.choose("auto", gpu=False) == "none"


def test_auto_leaves_buildah_out_with_a_gpu(engines):
    engines("buildah")
    assert container.choose("auto", gpu=False) == "buildah"
    assert container.choose("auto", gpu=True) == "none"
    with pytest.raises(container.ContainerError, match="cannot give a container the GPU"):
        container.choose("buildah", gpu=True)


def test_a_named_engine_must_work(engines):
    engines("docker", info=1)
    engines("buildah")
    with pytest.raises(container.ContainerError, match="'docker' does not work: `docker info`"):
        container.choose("docker", gpu=False)
    with pytest.raises(container.ContainerError, match="podman is not installed"):
        container.choose("podman", gpu=False)
    assert container.choose("buildah", gpu=False) == "buildah"


def test_build_writes_the_digest(engines, tmp_path):
    engines("docker")
    ca = tmp_path / "ca.crt"
    ca.touch()
    out = tmp_path / "image" / "replay.digest"
    container.build("docker", "replay", out, base="my/base:1", ca=str(ca))
    assert out.read_text() == f"{DIGEST}\n"
    (command,) = engines.named("build")
    assert value_of(command, "--target") == "replay"
    assert value_of(command, "--file") == "docker/Dockerfile"
    assert value_of(command, "--build-arg") == "BASE=my/base:1"
    assert value_of(command, "--secret") == f"id=ca,src={ca}"
    assert command[-1] == "."


def test_build_without_options_passes_none(engines, tmp_path):
    engines("buildah", digest="b" * 64)
    container.build("buildah", "measure", tmp_path / "digest", base=None, ca=None)
    (command,) = engines.named("bud")
    assert "--build-arg" not in command and "--secret" not in command
    assert (tmp_path / "digest").read_text() == f"sha256:{'b' * 64}\n"


def test_the_measuring_target_has_its_own_base():
    command = container.build_command("podman", "measure", Path("f"), base="my/cuda:1")
    assert value_of(command, "--build-arg") == "CUDA_BASE=my/cuda:1"


def test_a_failed_build_leaves_the_old_digest(engines, tmp_path):
    out = tmp_path / "digest"
    out.write_text("old\n")
    engines("docker", status=3)
    with pytest.raises(container.ContainerError, match="could not build the target 'replay'"):
        container.build("docker", "replay", out, base=None, ca=None)
    engines("docker", digest="what")
    with pytest.raises(container.ContainerError, match="gave no digest: 'what'"):
        container.build("docker", "replay", out, base=None, ca=None)
    assert out.read_text() == "old\n"


def test_a_build_needs_an_engine_and_its_certificates(engines, tmp_path):
    with pytest.raises(container.ContainerError, match="docker is not installed; podman is not"):
        container.build("auto", "replay", tmp_path / "digest", base=None, ca=None)
    engines("docker")
    with pytest.raises(container.ContainerError, match="container.ca='nowhere' is not a file"):
        container.build("docker", "replay", tmp_path / "digest", base=None, ca="nowhere")


def test_the_checkout_is_mounted_where_it_is(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "7")
    command = container.run_command("docker", DIGEST, ["tool", "--x"], folder=Path("/here"))
    assert command[:2] == ["docker", "run"]
    assert command[-3:] == [DIGEST, "tool", "--x"]
    assert value_of(command, "--volume") == "/here:/here"
    assert value_of(command, "--workdir") == "/here"
    variables = [command[i + 1] for i, word in enumerate(command) if word == "--env"]
    assert "ATTN_LADDER_ENGINE=docker" in variables
    assert f"ATTN_LADDER_IMAGE_DIGEST={DIGEST}" in variables
    assert "PYTHONPATH=/here/kernels:/here/profiling" in variables
    assert "SOURCE_DATE_EPOCH=7" in variables
    assert not {"--gpus", "--cap-add", "--device"} & set(command)


@pytest.mark.parametrize(
    ("engine", "flags"),
    [("docker", ["--gpus", "all"]), ("podman", ["--device", "nvidia.com/gpu=all"])],
)
def test_the_gpu_is_given(engine, flags):
    command = container.run_command(engine, DIGEST, ["tool"], folder=Path("/here"), gpu=True)
    assert value_of(command, flags[0]) == flags[1]
    assert "--cap-add" not in command


@pytest.mark.parametrize("restricted", [True, False])
def test_the_capability_is_added_where_counters_are_restricted(monkeypatch, restricted):
    monkeypatch.setattr(container, "counters_restricted", lambda: restricted)
    command = container.run_command(
        "docker", DIGEST, ["tool"], folder=Path("/here"), gpu=True, counters=True
    )
    assert ("--cap-add" in command) is restricted
    if restricted:
        assert value_of(command, "--cap-add") == "SYS_ADMIN"
        assert "--user" not in command


def test_files_belong_to_the_user(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "getgid", lambda: 100)
    command = container.run_command("docker", DIGEST, ["tool"], folder=Path("/here"))
    assert value_of(command, "--user") == "1000:100"
    command = container.run_command("podman", DIGEST, ["tool"], folder=Path("/here"))
    assert value_of(command, "--userns") == "keep-id"
    monkeypatch.setattr(os, "getuid", lambda: 0)
    command = container.run_command("docker", DIGEST, ["tool"], folder=Path("/here"))
    assert "--user" not in command


def run_prefixed(prefix, words, cwd):
    """Run a prefixed shell command as a rule does."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/kernels:{ROOT}/profiling"}
    return subprocess.run(
        ["/bin/sh", "-c", prefix + words], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_a_prefixed_tool_runs_in_the_image_and_keeps_its_status(engines, tmp_path):
    engines("docker", status=5)
    (tmp_path / "digest").write_text(f"{DIGEST}\n")
    prefix = container.prefix("docker", tmp_path / "digest", gpu=True, counters=True)
    run = run_prefixed(prefix, "attn-profiling check --suite 'a b'", tmp_path)
    assert run.returncode == 5
    (command,) = engines.named("run")
    assert command[-4:] == ["attn-profiling", "check", "--suite", "a b"]
    assert command[-5] == DIGEST
    assert "--gpus" in command


def test_a_prefixed_tool_without_an_image_says_how_to_get_one(engines, tmp_path):
    engines("docker")
    run = run_prefixed(container.prefix("docker", tmp_path / "digest"), "true", tmp_path)
    assert run.returncode == 1
    assert "no image was built; run: make container" in run.stderr
    assert engines.calls() == []


def test_buildah_runs_in_a_container_that_it_removes(engines, tmp_path):
    engines("buildah", status=4)
    (tmp_path / "digest").write_text(f"{DIGEST}\n")
    run = run_prefixed(container.prefix("buildah", tmp_path / "digest"), "tool --x", tmp_path)
    assert run.returncode == 4
    assert [call[1] for call in engines.calls()] == ["from", "run", "rm"]
    (command,) = engines.named("run")
    assert command[-4:] == ["working-1", "--", "tool", "--x"]
    assert f"ATTN_LADDER_IMAGE_DIGEST={DIGEST}" in command


def test_both_targets_and_the_optional_secret_are_in_the_dockerfile():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    for target in container.TARGETS:
        assert f" AS {target}\n" in text
    assert "ARG BASE=" in text and "ARG CUDA_BASE=" in text
    assert "required=true" not in text


REAL = "ATTN_LADDER_REAL_CONTAINER"


def without(*tools):
    """Why an image cannot be built for real here, or None."""
    if not os.environ.get(REAL):
        return f"{REAL}=1 builds the image for real: ten minutes, a network, root"
    absent = [tool for tool in tools if not shutil.which(tool)]
    return f"needs root and {', '.join(tools)}" if absent or os.getuid() else None


WHY_NOT = without("buildah", "debootstrap")


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_the_replay_runs_in_an_image_that_is_built_for_real(tmp_path, monkeypatch):
    """From Debian's packages alone: a base by debootstrap, the Dockerfile by buildah, a replay."""
    storage = tmp_path / "storage.conf"
    storage.write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "{tmp_path}/run"\n'
        f'graphroot = "{tmp_path}/graph"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(storage))
    monkeypatch.setenv("BUILDAH_ISOLATION", "chroot")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*words, cwd=tmp_path):
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip() + done.stderr.strip()

    run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", "rootfs")
    working = run("buildah", "from", "scratch").splitlines()[-1]
    run("buildah", "add", "-q", working, "rootfs", "/")
    run("buildah", "commit", "-q", working, "localhost/base:bookworm")
    checkout = tmp_path / "checkout"
    run("git", "-c", f"safe.directory={ROOT}", "clone", "-q", str(ROOT), str(checkout))
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    container_ca = f", ca: {certificates}" if certificates else ""
    snakemake = [sys.executable, "-m", "snakemake", "--cores", "1", "--config"]
    engine = f"container={{engine: buildah, base: 'localhost/base:bookworm'{container_ca}}}"
    monkeypatch.setenv("PYTHONPATH", f"{checkout}/kernels:{checkout}/profiling")
    run(*snakemake, engine, cwd=checkout)
    digest = (checkout / "results" / "image" / "replay.digest").read_text().strip()
    assert digest.startswith("sha256:")
    assert (checkout / "results" / "main.pdf").read_bytes().startswith(b"%PDF")
    again = run(*snakemake, engine, cwd=checkout)
    assert "Nothing to be done" in again and f"image: {digest} (buildah)" in again
