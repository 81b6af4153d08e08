"""Build docker/Dockerfile and run the workflow's tools inside the image.

The image holds the environment, never the code: the checkout is mounted at its own path, so what
ran is the commit in the records. `build` writes the image's digest to a file; `run` reads it there
and hands it to the tool as ATTN_LADDER_ENGINE and ATTN_LADDER_IMAGE_DIGEST, which the records keep.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from attn_profiling import record

ENGINES = ("docker", "podman", "buildah")
TARGETS = ("replay", "measure")
PASSED_ON = (
    "CUDA_VISIBLE_DEVICES", "FORCE_SOURCE_DATE",
    "SOURCE_DATE_EPOCH",
)  # fmt: skip


class ContainerError(ValueError):
    """A container engine or image that cannot be used."""


def works(engine: str) -> str | None:
    """None if `engine` can build and run, else why not."""
    if not shutil.which(engine):
        return f"{engine} is not installed"
    try:
        answer = subprocess.run([engine, "info"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return f"`{engine} info` gave no answer in 30 s"
    if answer.returncode:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        return f"`{engine} info` failed: {said[-1] if said else f'exit status {answer.returncode}'}"
    return None


def choose(engine: str, *, gpu: bool) -> str:
    """The engine that `container.engine` means on this machine, or "none".

    Raises `ContainerError` if a named one does not work, or cannot give a container the GPU.
    """
    if engine == "none":
        return "none"
    if engine == "buildah" and gpu:
        raise ContainerError(
            "container.engine='buildah' cannot give a container the GPU; use docker or podman"
        )
    if engine != "auto":
        reason = works(engine)
        if reason:
            raise ContainerError(
                f"container.engine={engine!r} does not work: {reason}; start it, or use none"
            )
        return engine
    for candidate in ENGINES:
        if not (gpu and candidate == "buildah") and works(candidate) is None:
            return candidate
    return "none"


def counters_restricted() -> bool:
    """Whether the driver keeps hardware counters to administrators, as it does by default."""
    try:
        parameters = Path("/proc/driver/nvidia/params").read_text()
    except OSError:
        return True
    return not re.search(r"^RmProfilingAdminOnly:\s*0$", parameters, re.M)


def build_command(
    engine: str, target: str, digest_file: Path, *, base: str | None = None, ca: str | None = None
) -> list[str]:
    """The command line that builds one target of the Dockerfile from the current folder."""
    command = [engine, "bud" if engine == "buildah" else "build", "--file", "docker/Dockerfile"]
    command += ["--target", target, "--tag", f"attn-ladder-{target}", "--iidfile", str(digest_file)]
    if engine == "buildah":
        command += ["--layers"]
    if base:
        argument = {"replay": "BASE", "measure": "CUDA_BASE"}[target]
        command += ["--build-arg", f"{argument}={base}"]
    if ca:
        command += ["--secret", f"id=ca,src={ca}"]
    return [*command, "."]


def run_command(
    engine: str,
    image: str,
    tool: Sequence[str],
    *,
    folder: Path,
    gpu: bool = False,
    counters: bool = False,
    working: str | None = None,
) -> list[str]:
    """The command line that runs `tool` in `image` with `folder` mounted where it is.

    `counters` adds the capability to read hardware counters where the driver restricts them; the
    tool then runs as root in the container. `working` is buildah's container made from `image`.
    """
    where = f"{folder}:{folder}"
    variables = {
        "ATTN_LADDER_ENGINE": engine,
        "ATTN_LADDER_IMAGE_DIGEST": image,
        "HOME": "/tmp",
        "PYTHONPATH": f"{folder}/kernels:{folder}/profiling",
    } | {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    settings = [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
    if working:
        command = ["buildah", "run", "--volume", where, "--workingdir", str(folder), *settings]
        return [*command, working, "--", *tool]
    command = [
        engine,
        "run",
        "--rm",
        "--init",
        "--volume",
        where,
        "--workdir",
        str(folder),
        *settings,
    ]
    if gpu:
        command += ["--gpus", "all"] if engine == "docker" else ["--device", "nvidia.com/gpu=all"]
    if gpu and counters and counters_restricted():
        command += ["--cap-add", "SYS_ADMIN"]
    elif os.getuid():
        as_user = ["--user", f"{os.getuid()}:{os.getgid()}"]
        command += as_user if engine == "docker" else ["--userns", "keep-id"]
    return [*command, image, *tool]


def prefix(engine: str, digest_file: Path, *, gpu: bool = False, counters: bool = False) -> str:
    """What a rule puts before a console script, "" where tools run natively."""
    if engine == "none":
        return ""
    flags = " --gpu" * gpu + " --counters" * counters
    runner = f"{sys.executable} -m attn_profiling.container run"
    return f"{runner} --engine {engine} --digest {digest_file}{flags} -- "


def build(engine: str, target: str, out: Path, *, base: str | None, ca: str | None) -> str:
    """Build `target`, write the image's digest to `out`, return it."""
    engine = choose(engine, gpu=False)
    if engine == "none":
        reasons = "; ".join(f"{works(candidate)}" for candidate in ENGINES)
        raise ContainerError(
            f"no container engine works here: {reasons}. Install docker, podman or buildah"
        )
    if ca and not Path(ca).is_file():
        raise ContainerError(
            f"container.ca={ca!r} is not a file; name one with CA certificates, or null"
        )
    with tempfile.TemporaryDirectory() as scratch:
        digest_file = Path(scratch) / "digest"
        command = build_command(engine, target, digest_file, base=base, ca=ca)
        print("+", " ".join(command), flush=True)
        if subprocess.run(command, env={**os.environ, "DOCKER_BUILDKIT": "1"}).returncode:
            raise ContainerError(
                f"{engine} could not build the target {target!r}; its messages are above"
            )
        digest = digest_file.read_text().strip()
    if not re.fullmatch(r"(sha256:)?[0-9a-f]{64}", digest):
        raise ContainerError(f"{engine} built the target {target!r} but gave no digest: {digest!r}")
    digest = f"sha256:{digest.removeprefix('sha256:')}"
    record.write_text(out, f"{digest}\n")
    return digest


def run(engine: str, digest_file: Path, tool: Sequence[str], *, gpu: bool, counters: bool) -> int:
    """Run `tool` in the image of `digest_file` and return its exit status."""
    try:
        image = digest_file.read_text().strip()
    except OSError:
        raise ContainerError(f"{digest_file}: no image was built; run: make container") from None
    folder = Path.cwd()
    if engine != "buildah":
        command = run_command(engine, image, tool, folder=folder, gpu=gpu, counters=counters)
        return subprocess.run(command).returncode
    made = subprocess.run(
        ["buildah", "from", "--pull-never", image.removeprefix("sha256:")],
        stdout=subprocess.PIPE,
        text=True,
    )
    if made.returncode:
        raise ContainerError(
            f"buildah knows no image {image}; delete {digest_file} and run: make container"
        )
    working = made.stdout.strip()
    try:
        command = run_command(engine, image, tool, folder=folder, working=working)
        return subprocess.run(command).returncode
    finally:
        subprocess.run(["buildah", "rm", working], stdout=subprocess.DEVNULL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line of `build` or `run` and return the exit status."""
    parser = argparse.ArgumentParser(prog="attn_profiling.container", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build")
    builder.add_argument("--engine", choices=["auto", *ENGINES], required=True)
    builder.add_argument("--target", choices=TARGETS, required=True)
    builder.add_argument("--base")
    builder.add_argument("--ca")
    builder.add_argument("--out", type=Path, required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--engine", choices=ENGINES, required=True)
    runner.add_argument("--digest", type=Path, required=True)
    runner.add_argument("--gpu", action="store_true")
    runner.add_argument("--counters", action="store_true")
    runner.add_argument("tool", nargs="+")
    options = parser.parse_args(arguments)
    try:
        if options.command == "build":
            print(
                build(options.engine, options.target, options.out, base=options.base, ca=options.ca)
            )
            return 0
        return run(
            options.engine, options.digest, options.tool, gpu=options.gpu, counters=options.counters
        )
    except ContainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
