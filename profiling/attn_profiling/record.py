"""The raw files of a run: read with their schema checked, written whole or not at all.

    runs/<id>/device.json                      what was measured on
    runs/<id>/check/<suite>.json               the gate: which subject is right on which problem
    runs/<id>/timing/<suite>.<regime>.json     samples of GPU time
    runs/<id>/host/<suite>.json                samples of host cost and latency
    runs/<id>/ncu/<suite>.json                 index of the Nsight Compute reports beside it
    runs/<id>/serving/<suite>.json             decoding: checks, samples of GPU time
    runs/<id>/serving/model.json               a model: tokens, memory, samples of speed

Every file has the same header: what identifies the measurement (`content`, and a kernel hash for
each subject) and what rides along (`provenance`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem
from attn_profiling.sources import entry_hash, is_known, source_hash

KINDS = ("device", "check", "timing", "host", "ncu", "decode", "model")
VERSION = 1

Record = dict[str, Any]


class RecordError(ValueError):
    """A raw file that cannot be used; the text names the file, what is wrong and what to do."""


def schema_id(kind: str) -> str:
    """The value of a file's `schema` field: `attn-ladder/<kind>/1`."""
    if kind not in KINDS:
        raise ValueError(f"{kind=} must be one of {', '.join(KINDS)}")
    return f"attn-ladder/{kind}/{VERSION}"


def _wrong_samples(instance: Any, positive: bool) -> Iterator[tuple[str, list[int]]]:
    """(what is wrong, where) of a list of numbers per process."""
    for p, process in enumerate(instance):
        if not isinstance(process, list):
            yield f"{process!r} is not a list of numbers", [p]
        elif positive and not process:
            yield "no sample", [p]
        else:
            for i, value in enumerate(process):
                if value is None and not positive:
                    continue
                if type(value) not in (int, float) or not isfinite(value):
                    yield f"{value!r} is not a finite number", [p, i]
                elif positive and value <= 0:
                    yield f"{value!r} is not positive", [p, i]


@cache
def _validator(kind: str) -> Any:
    from jsonschema import Draft202012Validator, ValidationError, validators
    from referencing import Registry, Resource

    def samples(validator: Any, value: str, instance: Any, schema: Any) -> Iterator[Any]:
        if isinstance(instance, list):
            for message, path in _wrong_samples(instance, value == "positive"):
                yield ValidationError(message, path=path)

    folder = files("attn_profiling") / "schemas"
    header = json.loads((folder / "header.json").read_text())
    registry: Any = Registry().with_resource("header.json", Resource.from_contents(header))
    known = validators.extend(Draft202012Validator, {"samples": samples})
    return known(json.loads((folder / f"{kind}.json").read_text()), registry=registry)


def validate(data: Any, kind: str, source: str) -> None:
    """Check a record against its schema.

    Raises `RecordError` naming `source` and the field.
    """
    expected = schema_id(kind)
    found = data.get("schema") if isinstance(data, dict) else None
    if found != expected:
        raise RecordError(
            f"{source}: schema={found!r}, expected {expected!r}; the file is of another kind or"
            " version: measure it again, or read it with the version that wrote it"
        )
    from jsonschema.exceptions import best_match

    error = best_match(_validator(kind).iter_errors(data))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "(top level)"
        raise RecordError(f"{source}: at {place}: {error.message[:500]}")


def read(path: Path, kind: str) -> Record:
    """Read and check one raw file. Raises `RecordError` if it is missing, truncated or wrong."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise RecordError(
            f"{path}: no such file; `attn-profiling {_COMMAND[kind]}` writes it"
        ) from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not a text file ({error})") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}: not valid JSON at line {error.lineno} column {error.colno} ({error.msg}); the"
            " file was cut off or edited: measure it again"
        ) from None
    validate(data, kind, str(path))
    return dict(data)


_COMMAND = {
    "device": "device",
    "check": "check",
    "timing": "time",
    "host": "host",
    "ncu": "profile",
    "decode": "serving",
    "model": "serving",
}


def write_text(path: Path, text: str) -> None:
    """Write a file by renaming a finished one into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, data: Record, kind: str) -> None:
    """Check a record and write it, or leave what was there."""
    validate(data, kind, str(path))
    write_text(path, json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n")


def header(
    kind: str,
    *,
    run: str,
    suite: str | None,
    content: Mapping[str, Any],
    provenance: Mapping[str, Any],
    subjects: Mapping[str, Any],
) -> Record:
    """The fields that every raw file starts with."""
    return {
        "schema": schema_id(kind),
        "run": run,
        "suite": suite,
        "content": dict(content),
        "provenance": dict(provenance),
        "subjects": dict(subjects),
    }


def problem_fields(problem: Problem) -> dict[str, Any]:
    """A problem as it stands in a record."""
    return {**asdict(problem), "suites": list(problem.suites)}


def problem_of(fields: Mapping[str, Any]) -> Problem:
    """The problem that a record describes."""
    return Problem(**{**fields, "suites": tuple(fields["suites"])})


def content_key(
    content: Mapping[str, Any], problem: Mapping[str, Any], subject_hashes: Mapping[str, str]
) -> str:
    """Sixteen hex digits that change when a measurement has to be made again."""
    shape = {name: value for name, value in problem.items() if name != "suites"}
    text = json.dumps([content, shape, subject_hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stale(record: Record, subject: str) -> str | None:
    """Why a recorded subject no longer stands for the source that is here, or None.

    A sentence with the commit the record came from: its kernel changed, or is gone, or the entry
    that users call changed, where that was recorded.
    """
    name = subject.split("#")[0]
    commit = str(record["provenance"]["commit"])[:12]
    recorded = record["subjects"].get(name)
    if recorded is None:
        return f"{subject} is not in the record of commit {commit}"
    if not is_known(name):
        return f"{subject} was recorded at commit {commit} and has no source here"
    found = source_hash(name)
    if recorded["kernel_hash"] != found:
        return (
            f"{subject} was recorded at commit {commit} with kernel hash"
            f" {recorded['kernel_hash']}; the source here has {found}: measure it again"
        )
    entry = recorded.get("entry_hash")
    if entry is not None and entry != entry_hash(name):
        return (
            f"{subject} was recorded at commit {commit} through an entry with hash {entry}; the"
            f" source here has {entry_hash(name)}: measure it again"
        )
    return None


def stale_problem(
    record: Record, recorded: Mapping[str, Any], known: Mapping[str, Problem]
) -> str | None:
    """Why a recorded problem is not the one of the table, or None. Its suites do not matter."""
    commit = str(record["provenance"]["commit"])[:12]
    name = recorded["id"]
    if name not in known:
        return f"problem {name} was recorded at commit {commit} and is not in the table"
    current = problem_fields(known[name])
    changed = [f for f in current if f != "suites" and current[f] != recorded.get(f)]
    if changed:
        return (
            f"problem {name} was recorded at commit {commit} with other values of"
            f" {', '.join(changed)}: measure it again"
        )
    return None


def constraints_sha256(path: Path) -> str | None:
    """Hash of the hypotheses as data, so that comments and layout do not count. None if absent."""
    if not path.is_file():
        return None
    import yaml

    canonical = json.dumps(yaml.safe_load(path.read_text()), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


PREDICTIONS = Path("config/predictions.csv")
"""What `attn-profiling predict` wrote; `provenance` carries its hash."""


def predictions_sha256(path: Path = PREDICTIONS) -> str | None:
    """Hash of the predictions that a run is compared with, byte for byte. None if absent."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
