"""Nsight Compute, played by a shell script that prints what the real one prints."""

import json
import os
import sys
from dataclasses import replace

import pytest
import synthetic
from fake_gpu import SMALL, fake_gpu

from attn_profiling import device, ncu, ncu_rep, record
from attn_profiling.metrics import Kernel, ncu_metrics
from attn_profiling.ncu import NcuError

SUBJECTS = ["fa3", "stage1"]

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "Version 2025.3.1.0 (build 1)"; exit 0; fi
printf '%s\\n' "$@" > "$FAKE_NCU/arguments"
while [ $# -gt 0 ]; do
  if [ "$1" = --export ]; then out=$2; fi
  shift
done
if [ -f "$FAKE_NCU/report" ]; then cp "$FAKE_NCU/report" "$out"; fi
cat "$FAKE_NCU/says"
exit "$(cat "$FAKE_NCU/status")"
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(says=..., status=..., kernels=...) sets what ncu does; gives its folder."""
    folder = tmp_path / "fake"
    folder.mkdir()
    script = folder / "ncu"
    script.write_text(FAKE)
    script.chmod(0o755)
    monkeypatch.setenv("FAKE_NCU", str(folder))
    monkeypatch.setenv("ATTN_LADDER_NCU", str(script))
    monkeypatch.setattr(ncu, "open_report", synthetic.open_report)
    device.ncu_version.cache_clear()

    def behave(says="==PROF== Disconnected from process 1\n", status=0, kernels=None):
        (folder / "says").write_text(says)
        (folder / "status").write_text(str(status))
        (folder / "report").unlink(missing_ok=True)
        if kernels is not None:
            (folder / "report").write_bytes(synthetic.pack(kernels))
        return folder

    yield behave
    device.ncu_version.cache_clear()


def kernels(*pairs, problem="small"):
    return [Kernel(name, (f"{problem}.{subject}",), {}, ()) for subject, name in pairs]


GOOD = kernels(("fa3", "memset"), ("fa3", "attention"), ("stage1", "attention"))


def profile(tmp_path, sections="full", subjects=SUBJECTS, expected=()):
    report = tmp_path / "ncu" / "tiny" / "small.ncu-rep"
    found = ncu.profile_problem(
        os.environ["ATTN_LADDER_NCU"], SMALL, subjects, {"fa3": {"num_splits": 2}}, sections,
        report, 0, {}, dict(expected),
    )  # fmt: skip
    return report, found


def test_kernels_of_each_range_are_counted(fake, tmp_path):
    folder = fake(kernels=GOOD)
    report, (sha256, counts) = profile(tmp_path)
    assert counts == {"fa3": 2, "stage1": 1}
    assert report.is_file() and len(sha256) == 64
    words = (folder / "arguments").read_text().splitlines()
    assert words[words.index("--clock-control") + 1] == "none"
    assert words[words.index("--set") + 1] == "full"
    included = [words[i + 1] for i, w in enumerate(words) if w == "--nvtx-include"]
    assert included == ["attn_ladder@small.fa3/", "attn_ladder@small.stage1/"]
    assert words[words.index("--metrics") + 1].split(",") == ncu_metrics()
    request = json.loads((report.parent / ".partial" / "small.request.json").read_text())
    assert request["chosen"] == {"fa3": {"num_splits": 2}, "stage1": None}


def test_listed_counters_come_with_those_of_single_instructions(fake, tmp_path):
    folder = fake(kernels=GOOD)
    profile(tmp_path, "listed")
    words = (folder / "arguments").read_text().splitlines()
    assert "--set" not in words
    assert words[words.index("--section") + 1] == "SourceCounters"


@pytest.mark.parametrize(
    ("says", "status", "message"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU"
            " Performance Counters on the target device 0.\n",
            1,
            "no permission to read hardware counters .* NVreg_RestrictProfilingToAdminUsers=0",
        ),
        (
            "==ERROR== Failed to find metric regex:sm__made_up.sum\n==ERROR== Failed to access"
            " the following metrics: sm__made_up.sum\n",
            1,
            r"ncu 2025.3.1.0 does not know the counter sm__made_up.sum; .*metrics.py",
        ),
        ("==WARNING== No kernels were profiled.\n", 0, "no range matched --nvtx-include"),
        ("==ERROR== The application returned an error code (1).\n", 1, "application returned"),
    ],
)
def test_what_ncu_says_is_explained(fake, tmp_path, says, status, message):
    fake(says, status)
    with pytest.raises(NcuError, match=message):
        profile(tmp_path)
    left = [p.name for p in (tmp_path / "ncu" / "tiny").iterdir()]
    assert left == [".partial"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (kernels(("fa3", "attention")), "no kernel was profiled in the range small.stage1"),
        (GOOD + kernels(("fa3", "x"), problem="other"), "the report is of another problem"),
        (GOOD + [Kernel("stray", (), {}, ())], r"kernel stray lies in the ranges \[\]"),
    ],
)
def test_a_report_of_something_else_is_refused(fake, tmp_path, found, message):
    fake(kernels=found)
    with pytest.raises(NcuError, match=message):
        profile(tmp_path)
    assert not (tmp_path / "ncu" / "tiny" / "small.ncu-rep").exists()


def test_another_number_of_kernels_than_when_timed_is_refused(fake, tmp_path):
    fake(kernels=GOOD)
    assert profile(tmp_path, expected={"fa3": 2, "stage1": 1})[1][1]["fa3"] == 2
    with pytest.raises(NcuError, match="2 kernels of fa3 were profiled, but it launches 1"):
        profile(tmp_path, expected={"fa3": 1})


def test_memsets_are_not_expected_of_ncu(tmp_path):
    maker = synthetic.Maker(tmp_path)
    maker.timing("smoke", "spaced")
    path = tmp_path / "timing" / "smoke.spaced.json"
    data = json.loads(path.read_text())
    sample = data["problems"][0]["attempts"][-1]["samples"]["fa3"]
    sample["kernels"] = {"Memset (Device)": 1, "attention": 2}
    path.write_text(json.dumps(data))
    name = data["problems"][0]["problem"]["id"]
    assert ncu.timed_kernels(tmp_path, "profile")[name]["fa3"] == 2


def test_a_truncated_report_is_refused(fake, tmp_path, monkeypatch):
    folder = fake(kernels=GOOD)
    monkeypatch.setattr(ncu, "open_report", ncu_rep.open_report)
    (folder / "report").write_bytes(b"NVR\x00 and then nothing")
    with pytest.raises(NcuError, match="small.ncu-rep: "):
        profile(tmp_path)


def test_a_refused_report_leaves_the_one_that_was_there(fake, tmp_path):
    fake(kernels=GOOD)
    report, _ = profile(tmp_path)
    before = report.read_bytes()
    fake("==ERROR== out of disk\n", 1)
    with pytest.raises(NcuError):
        profile(tmp_path)
    assert report.read_bytes() == before


@pytest.mark.parametrize("name", ["a/b", "a@b", "a,b", "a]b", "a b"])
def test_names_that_break_the_filter_are_refused(name):
    with pytest.raises(ValueError, match="takes for syntax"):
        ncu.range_name("small", name)
    assert ncu.range_name("small", "control_sync.4") == "small.control_sync.4"


# -- a whole suite


@pytest.fixture
def suite(fake, monkeypatch, tmp_path):
    from attn_profiling import settings
    from attn_profiling.session import Session

    problems = synthetic.read_problems(synthetic.PROBLEMS)
    smoke = [p for p in problems.values() if "smoke" in p.suites]
    monkeypatch.setattr(ncu, "Session", lambda s, names: Session(s, names, fake_gpu()))
    monkeypatch.setattr(
        ncu, "gate",
        lambda run, asked, names: {
            p.id: {"fa3": None, "stage1": "unsupported: no sm_90"} for p in asked
        },
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"subjects": SUBJECTS}))
    calls = []
    real = ncu.profile_problem

    def one(tool, problem, subjects, *rest):
        calls.append(problem.id)
        fake(kernels=kernels(*((s, "attention") for s in subjects), problem=problem.id))
        return real(tool, problem, subjects, *rest)

    monkeypatch.setattr(ncu, "profile_problem", one)

    def run(sections=None):
        calls.clear()
        chosen = settings.load(tmp_path / "config.json", tmp_path)
        data = ncu.run(chosen, "smoke", sections, tmp_path / "ncu" / "smoke.json")
        return data, list(calls)

    run.smoke = smoke
    run.folder = tmp_path
    run.one = one
    return run


def test_the_index_names_every_report(suite):
    data, calls = suite()
    assert calls == [p.id for p in suite.smoke]
    assert record.read(suite.folder / "ncu" / "smoke.json", "ncu") == data
    for entry in data["reports"]:
        assert (suite.folder / entry["file"]).is_file()
        assert entry["subjects"] == {"fa3": 1}
        assert entry["left_out"] == {"stage1": "unsupported: no sm_90"}
        assert entry["sections"] == "listed"


def test_an_interrupted_suite_keeps_its_reports(suite, monkeypatch):
    def dies(tool, problem, *rest):
        if problem.id == suite.smoke[-1].id:
            raise KeyboardInterrupt
        return suite.one(tool, problem, *rest)

    monkeypatch.setattr(ncu, "profile_problem", dies)
    with pytest.raises(KeyboardInterrupt):
        suite()
    monkeypatch.setattr(ncu, "profile_problem", suite.one)
    data, calls = suite()
    assert calls == [suite.smoke[-1].id]
    assert len(data["reports"]) == len(suite.smoke)


def test_no_ncu_says_how_to_get_it(suite, monkeypatch):
    monkeypatch.setenv("ATTN_LADDER_NCU", "/nowhere/ncu")
    with pytest.raises(NcuError, match=r"\(ncu\) was not found: install .*suites.profile"):
        suite()


def test_all_sections_only_for_the_suite_profile(suite):
    with pytest.raises(ValueError, match="sections='some' must be full or listed"):
        suite("some")
    data, _ = suite("full")
    assert {entry["sections"] for entry in data["reports"]} == {"full"}


def test_the_worker_pushes_one_range_for_each_subject(monkeypatch, tmp_path):
    """On the CPU, with a recorder in place of nvtx and of the subjects."""
    from types import SimpleNamespace

    import torch
    from fake_gpu import right

    from attn_ladder import stage
    from attn_profiling import inputs

    events = []
    fake_nvtx = SimpleNamespace(
        push_range=lambda name, domain: events.append((domain, name)),
        pop_range=lambda domain: events.append((domain, None)),
    )

    def forward(*args, **kwargs):
        events.append("call")
        return right(*args, **kwargs)

    monkeypatch.setitem(sys.modules, "nvtx", fake_nvtx)
    monkeypatch.setattr(stage, "load", lambda name: SimpleNamespace(forward=forward))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rotation = inputs.Rotation
    monkeypatch.setattr(
        inputs, "Rotation", lambda t, p, count, seed, device: rotation(t, p, count, seed, "cpu")
    )
    request = tmp_path / "request.json"
    problem = replace(SMALL, id="small")
    request.write_text(
        json.dumps(
            {
                "problem": record.problem_fields(problem),
                "subjects": SUBJECTS,
                "chosen": {"fa3": {"num_splits": 2}, "stage1": None},
                "seed": 0,
            }
        )
    )
    ncu.work(request)
    domain = "attn_ladder"
    assert events == [
        "call", (domain, "small.fa3"), "call", (domain, None),
        "call", (domain, "small.stage1"), "call", (domain, None),
    ]  # fmt: skip
