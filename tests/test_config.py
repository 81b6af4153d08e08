"""A good configuration is read; a bad one says which key, what it holds and what would be right."""

import copy
import shutil
from pathlib import Path

import pytest
import yaml

from attn_profiling.config import ConfigError, coerced, raw_files, validate

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
SMOKE = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())


def changed(**keys):
    """The default configuration with keys changed: `a__b=1` sets config["a"]["b"]."""
    config = copy.deepcopy(DEFAULT)
    for name, value in keys.items():
        *groups, last = name.split("__")
        at = config
        for group in groups:
            at = at[group]
        at[last] = value
    return config


def merged(base, over):
    """As Snakemake merges a --configfile into the default."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def error_of(config, root=ROOT) -> str:
    with pytest.raises(ConfigError) as error:
        validate(config, root)
    return str(error.value)


def test_the_default_is_valid():
    selection = validate(DEFAULT, ROOT)
    assert selection.subjects[0] == "stage1"
    assert len(selection.problems["grid"]) == 24


def test_counters_are_read_on_the_whole_grid_and_the_gate():
    assert {"grid", "gate"} <= set(DEFAULT["suites"]["profile"])
    assert validate(changed(suites__profile=["profile", "control"]), ROOT)


def test_a_suite_that_would_profile_nothing_is_an_error():
    wrong = changed(suites__profile=["grid", "gate", "profile"])
    assert "all problems of 'profile' are in suites before it" in error_of(wrong)
    part = changed(suites__profile=["grid", "profile"])  # gate-b16 is left
    assert validate(part, ROOT)


def test_smoke_is_valid_and_small():
    config = merged(DEFAULT, SMOKE)
    selection = validate(config, ROOT)
    assert set(selection.problems) == {"smoke", "smoke_decode"}
    assert raw_files(config)[-1] == "serving/smoke_decode.json"
    assert "timing/smoke.sustained.json" in raw_files(config)


def test_text_of_a_command_line_becomes_what_the_schema_asks_for():
    given = changed(run=7, paper="false", measuring__rounds="9", measuring__aa_tolerance="0.02")
    read = coerced(given, ROOT)
    assert read == changed(run="7", paper=False, measuring__rounds=9, measuring__aa_tolerance=0.02)
    assert coerced(changed(run="null"), ROOT)["run"] is None
    assert coerced(DEFAULT, ROOT) == DEFAULT


@pytest.mark.parametrize("text", ["nine", "", "[9]", "null"])
def test_text_that_is_no_number_stays_and_is_refused(text):
    config = coerced(changed(measuring__rounds=text), ROOT)
    assert f"measuring.rounds={text!r} must be an integer" in error_of(config)


def test_every_key_has_a_comment():
    lines = (ROOT / "config" / "config.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if line and not line.startswith((" ", "#")) and line not in ("measuring:", "container:"):
            assert lines[number - 1].startswith("#"), line


def test_subjects_keep_the_order_of_the_ladder():
    assert validate(changed(subjects=["fa3", "stage1"]), ROOT).subjects == ("stage1", "fa3")


def test_serving_can_be_measured_alone():
    alone = {"check": [], "time": {"spaced": [], "sustained": []}, "host": [], "profile": []}
    config = changed(suites={**alone, "serving": ["decode"]})
    assert "decode" in validate(config, ROOT).problems
    assert raw_files(config) == ["device.json", "serving/decode.json"]
    none = {**alone, "serving": []}
    assert "selects nothing" in error_of(changed(suites=none))
    model = changed(suites=none, model="README.md")
    assert validate(model, ROOT).problems == {}
    assert raw_files(model) == ["device.json", "serving/model.json"]


def test_raw_files_of_a_run():
    config = changed(suites={
        "check": ["gate", "smoke"], "time": {"spaced": ["gate"], "sustained": []},
        "host": ["gate"], "profile": [],
    })  # fmt: skip
    assert raw_files(config) == [
        "device.json",
        "check/gate.json",
        "check/smoke.json",
        "timing/gate.spaced.json",
        "host/gate.json",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teir": "replay"}, "'teir' is not a key; did you mean 'tier'?"),
        (
            {"measuring__round": 3},
            "'measuring.round' is not a key; did you mean 'rounds'?",
        ),
        ({"container__engin": "docker"}, "'container.engin' is not a key"),
        ({"tier": "mesure"}, "tier='mesure' must be one of auto, replay, measure; did you mean"),
        ({"measuring__rounds": "30"}, "measuring.rounds='30' must be an integer"),
        ({"measuring__rounds": True}, "measuring.rounds=True must be an integer"),
        ({"measuring__processes": 0}, "measuring.processes=0 must be at least 1"),
        ({"measuring__max_attempts": 4}, "measuring.max_attempts=4 must be at most 3"),
        ({"measuring__aa_tolerance": 0}, "measuring.aa_tolerance=0 must be more than 0"),
        ({"measuring": 3}, "measuring=3 must be a group of keys"),
        ({"paper": "yes"}, "paper='yes' must be true or false"),
        ({"run": "../up"}, "run='../up' must match"),
        ({"suites__check": []}, "which no suite of suites.check covers"),
        ({"suites__check": [], "suites__serving": []}, "suites.check=[] selects nothing; name at"),
        ({"suites__time__spaced": [], "suites__serving": []}, "suites.time.spaced=[] selects"),
        ({"suites__check": ["grid", "grid"]}, "names something twice"),
        ({"suites__host": ["gat"]}, "suites.host: suite='gat' selects no problem; known suites"),
        ({"suites__host": ["gat"]}, "did you mean 'gate'?"),
        ({"suites__check": ["smoke"]}, "which no suite of suites.check covers"),
        ({"subjects": []}, "subjects=[] selects nothing; name at least one"),
        ({"subjects": "fa3"}, "subjects='fa3' must be all, or a list"),
        ({"subjects": ["stage1", "fa33"]}, "'fa33' is unknown; did you mean 'fa3'?"),
        ({"only__gate": ["fa33"]}, "only.gate: 'fa33' is unknown; did you mean 'fa3'?"),
        ({"only__gate": []}, "only.gate=[] selects nothing"),
        ({"only__sustain": ["fa3"]}, "'only.sustain' is neither a step nor a suite; did you mean"),
        ({"problems": "config/nothing.tsv"}, "problems='config/nothing.tsv' is not a file"),
        ({"suites__serving": ["decod"]}, "suites.serving: suite='decod' selects no problem"),
        (
            {"suites__serving": ["gate"]},
            "'gate' holds gate-b1, which is no decoding: seqlen_q=2048",
        ),
        ({"suites__host": ["decode"]}, "has pages, which no subject of this step reads"),
        ({"model": "nothing.gguf"}, "model='nothing.gguf' is not a file in"),
        ({"model": ""}, "model"),
        ({"constraints": "config/nothing.yaml"}, "constraints='config/nothing.yaml' is not"),
        ({"fa3_module": "my-build"}, "fa3_module='my-build' must match"),
        ({"container__engine": "lxc"}, "container.engine='lxc' must be one of auto, none, docker"),
    ],
)
def test_a_bad_configuration_says_what_is_wrong(change, said):
    assert said in error_of(changed(**change))


def test_a_missing_key_is_named():
    config = copy.deepcopy(DEFAULT)
    del config["measuring"]["seed"]
    assert "'measuring.seed' is missing; config/config.yaml has its default" in error_of(config)


def test_all_errors_are_said_at_once():
    said = error_of(changed(teir="replay", paper=3, measuring__seed=-1))
    assert len(said.splitlines()) == 3


def test_a_bad_problem_row_is_named(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    validate(DEFAULT, tmp_path)
    table = tmp_path / "config" / "problems.tsv"
    table.write_text(table.read_text().replace("\tbf16\t", "\tbf17\t", 1))
    said = error_of(DEFAULT, tmp_path)
    assert "problems.tsv:2: " in said
    assert "dtype='bf17' must be one of bf16, fp16" in said
