"""The configuration, checked before anything else runs.

Errors name the key, its value, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from attn_ladder.problem import Problem, read_problems, select
from attn_ladder.stage import subjects as known_subjects
from attn_profiling.settings import once, selected

Config = Mapping[str, Any]
STEPS = ("check", "spaced", "sustained", "host", "profile")
MODEL = "model"
"""Stands beside the suites of the step `serving` for the model that a configuration names."""


class ConfigError(ValueError):
    """One or more things that are wrong with the configuration, a line each."""


@dataclass(frozen=True)
class Selection:
    """What a valid configuration selects: subjects by name, problems by suite."""

    subjects: tuple[str, ...]
    problems: Mapping[str, tuple[Problem, ...]]


def coerced(config: Config, root: Path) -> dict[str, Any]:
    """The configuration with numbers, booleans and nulls that a command line gave as text.

    Snakemake reads `--config measuring={rounds: 9}` as text, and `run=7` as a number.
    """
    schema = json.loads((root / "config" / "config.schema.json").read_text())

    def convert(value: Any, schema: Mapping[str, Any]) -> Any:
        if isinstance(value, Mapping):
            known = schema.get("properties", {})
            return {key: convert(item, known.get(key, {})) for key, item in value.items()}
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if isinstance(value, str) and (value == "null" or "string" not in kinds) and kinds:
            plain = yaml.safe_load(value)
            scalar = plain is None or isinstance(plain, bool | int | float)
            return plain if scalar and (plain is not None or "null" in kinds) else value
        if isinstance(value, int | float) and not isinstance(value, bool) and "string" in kinds:
            return str(value)
        return value

    return dict(convert(config, schema))


def suites(config: Config) -> dict[str, list[str]]:
    """The suites of each step, `time` split by regime."""
    chosen = config["suites"]
    steps = {"check": chosen["check"], "host": chosen["host"], "profile": chosen["profile"]}
    return steps | {f"time.{regime}": names for regime, names in chosen["time"].items()}


def serving_suites(config: Config) -> list[str]:
    """The suites of decoding; a run from before there were any names none."""
    return list(config["suites"].get("serving", []))


def serving_parts(config: Config) -> list[str]:
    """What is measured of serving: suites of decoding, and the model if one is named."""
    return serving_suites(config) + ([MODEL] if config.get("model") else [])


def raw_files(config: Config) -> list[str]:
    """The files of a complete run, relative to its folder."""
    chosen = suites(config)
    files = ["device.json"]
    files += [f"check/{suite}.json" for suite in chosen["check"]]
    for regime in config["suites"]["time"]:
        files += [f"timing/{suite}.{regime}.json" for suite in chosen[f"time.{regime}"]]
    files += [f"host/{suite}.json" for suite in chosen["host"]]
    files += [f"ncu/{suite}.json" for suite in chosen["profile"]]
    return files + [f"serving/{part}.json" for part in serving_parts(config)]


def _closest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _key(error: ValidationError, *more: str) -> str:
    return ".".join([*(str(part) for part in error.absolute_path), *more])


def _kind(wanted: object) -> str:
    names = {
        "integer": "an integer",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
    }
    names |= {"array": "a list", "object": "a group of keys", "null": "null"}
    wanted = wanted if isinstance(wanted, list) else [wanted]
    return " or ".join(names[str(name)] for name in wanted)


def _explain(error: ValidationError) -> list[str]:
    """An error of the schema in our words."""
    key, value, wanted = _key(error), error.instance, error.validator_value
    shown = f"{key}={value!r}"
    match error.validator:
        case "additionalProperties":
            known = list(error.schema["properties"])
            unknown = [name for name in value if name not in known]
            there = f"keys of {key}: " if key else "keys: "
            there += ", ".join(known)
            return [
                f"{_key(error, str(name))!r} is not a key{_closest(str(name), known)} ({there})"
                for name in unknown
            ]
        case "required":
            absent = [name for name in wanted if name not in value]
            return [
                f"{_key(error, name)!r} is missing; config/config.yaml has its default"
                for name in absent
            ]
        case "type":
            return [f"{shown} must be {_kind(wanted)}"]
        case "enum":
            return [f"{shown} must be one of {', '.join(wanted)}{_closest(str(value), wanted)}"]
        case "minItems":
            return [f"{shown} selects nothing; name at least one"]
        case "uniqueItems":
            return [f"{shown} names something twice"]
        case "oneOf" if key == "subjects":
            if value == []:
                return [f"{shown} selects nothing; name at least one, or write subjects: all"]
            return [f"{shown} must be all, or a list of different names"]
        case "pattern":
            return [f"{shown} must match {wanted}"]
        case "minimum" | "maximum" | "exclusiveMinimum":
            signs = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "more than"}
            return [f"{shown} must be {signs[error.validator]} {wanted}"]
        case _:
            return [f"{key}: {error.message}" if key else error.message]


def _check_shape(config: Config, schema: Path) -> None:
    validator = Draft202012Validator(json.loads(schema.read_text()))
    errors = sorted(
        validator.iter_errors(dict(config)), key=lambda error: [str(p) for p in error.absolute_path]
    )
    lines = list(dict.fromkeys(line for error in errors for line in _explain(error)))
    if lines:
        raise ConfigError("\n".join(f"config: {line}" for line in lines))


def _check_decoding(suite: str, problems: tuple[Problem, ...]) -> None:
    """Whether a suite holds what the step `serving` measures."""
    if suite == MODEL:
        raise ConfigError(f"config: suites.serving: a suite cannot be called {MODEL!r} here")
    shapes = {replace(p, id="x", suites=("x",), page_size=0) for p in problems if not p.page_size}
    for p in problems:
        if p.seqlen_q != 1 or not p.causal:
            raise ConfigError(
                f"config: suites.serving: {suite!r} holds {p.id}, which is no decoding:"
                f" seqlen_q={p.seqlen_q} must be 1 and causal={int(p.causal)} must be 1"
            )
        if p.page_size and p.seqlen_k % p.page_size:
            raise ConfigError(
                f"config: suites.serving: {suite!r} holds {p.id}, whose seqlen_k={p.seqlen_k} is"
                f" no multiple of page_size={p.page_size}"
            )
        if replace(p, id="x", suites=("x",), page_size=0) not in shapes:
            raise ConfigError(
                f"config: suites.serving: {suite!r} holds {p.id} and not the same shape with"
                " page_size=0, with which it is compared"
            )


def validate(config: Config, root: Path) -> Selection:
    """Check a merged configuration against its schema, the problem table and the subjects.

    `root` is the folder that paths in the configuration start from. Raises `ConfigError`.
    """
    _check_shape(config, root / "config" / "config.schema.json")
    table = root / config["problems"]
    for key in ("problems", "constraints"):
        if not (root / config[key]).is_file():
            raise ConfigError(f"config: {key}={config[key]!r} is not a file in {root}")
    try:
        problems = read_problems(table)
    except ValueError as error:
        raise ConfigError(f"config: problems: {error}") from None

    chosen: dict[str, tuple[Problem, ...]] = {}
    suites_there = sorted({suite for problem in problems.values() for suite in problem.suites})
    for step, names in suites(config).items():
        for name in names:
            try:
                chosen[name] = tuple(select(problems, name))
            except ValueError as error:
                raise ConfigError(
                    f"config: suites.{step}: {error}{_closest(name, suites_there)}"
                ) from None
        paged = [problem.id for name in names for problem in chosen[name] if problem.page_size]
        if paged:
            raise ConfigError(
                f"config: suites.{step}: {paged[0]} has pages, which no subject of this step reads;"
                " only suites.serving measures it"
            )
    for step in ("check", "time.spaced"):
        if not suites(config)[step] and not serving_parts(config):
            raise ConfigError(
                f"config: suites.{step}=[] selects nothing; name at least one, or a suite of"
                " suites.serving or a model alone"
            )
    checked = {problem.id for suite in config["suites"]["check"] for problem in chosen[suite]}
    for step, names in suites(config).items():
        for name in names:
            unchecked = [problem.id for problem in chosen[name] if problem.id not in checked]
            if unchecked:
                raise ConfigError(
                    f"config: suites.{step}: {name!r} holds {', '.join(unchecked)}, which no suite"
                    " of suites.check covers; only what passed its check is measured, so add a"
                    " suite that holds it"
                )

    for name in serving_suites(config):
        try:
            chosen[name] = tuple(select(problems, name))
        except ValueError as error:
            raise ConfigError(
                f"config: suites.serving: {error}{_closest(name, suites_there)}"
            ) from None
        _check_decoding(name, chosen[name])
    if config["model"] is not None and not (root / config["model"]).is_file():
        raise ConfigError(
            f"config: model={config['model']!r} is not a file in {root}; name a GGUF file of a"
            " Llama-architecture model, or null"
        )

    places = [*STEPS, *suites_there]
    for place in config["only"]:
        if place not in places:
            raise ConfigError(
                f"config: 'only.{place}' is neither a step nor a suite{_closest(place, places)};"
                f" known: {', '.join(places)}"
            )
    only = config["only"]
    names = list(known_subjects())
    lists = {f"only.{where}": some for where, some in config["only"].items()}
    if config["subjects"] != "all":
        lists["subjects"] = config["subjects"]
    for key, some in lists.items():
        for name in some:
            if name not in names:
                raise ConfigError(
                    f"config: {key}: {name!r} is unknown{_closest(name, names)}; known"
                    f" subjects: {', '.join(names)}"
                )
    names = [name for name in names if name in lists.get("subjects", names)]
    order = config["suites"]["profile"]
    subjects_of = lambda suite: selected(names, only, suite, "profile")
    for suite in order:
        if not once(suite, order, chosen.__getitem__, subjects_of):
            raise ConfigError(
                f"config: suites.profile: all problems of {suite!r} are in suites before it, so it"
                " would profile nothing; name it before them"
            )
    return Selection(tuple(names), chosen)
