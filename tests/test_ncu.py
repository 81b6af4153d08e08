"""Nsight Compute, played by a shell script that prints what the real one prints."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from fake_gpu import SMALL, fake_gpu

from attn_profiling import device, ncu, ncu_rep, record, settings
from attn_profiling.metrics import Kernel, ncu_metrics
from attn_profiling.ncu import Ask, NcuError
from attn_profiling.session import Session

SUBJECTS = ["fa3", "stage1"]

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "Version 2025.3.1.0 (build 1)"; exit 0; fi
printf '%s\\n' "$@" > "$FAKE_NCU/arguments"
out=$2
for request in "$@"; do :; done
if [ -f "$FAKE_NCU/diary" ]; then cp "$FAKE_NCU/diary" "${request%.json}.diary"; fi
if [ -f "$FAKE_NCU/report" ]; then cp "$FAKE_NCU/report" "$out"; fi
cat "$FAKE_NCU/says"
exit "$(cat "$FAKE_NCU/status")"
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(says=..., status=..., kernels=..., diary=...) sets what ncu and the worker do; gives
    its folder."""
    folder = tmp_path / "fake"
    folder.mkdir()
    script = folder / "ncu"
    script.write_text(FAKE)
    script.chmod(0o755)
    monkeypatch.setenv("FAKE_NCU", str(folder))
    monkeypatch.setenv("ATTN_LADDER_NCU", str(script))
    monkeypatch.setattr(
        ncu, "kernel_ranges",
        lambda data, name: [(k.name, k.ranges) for k in synthetic.open_report(data, name, [])],
    )  # fmt: skip
    device.ncu_version.cache_clear()

    def behave(says="==PROF== Disconnected from process 1\n", status=0, kernels=None, diary=()):
        (folder / "says").write_text(says)
        (folder / "status").write_text(str(status))
        (folder / "report").unlink(missing_ok=True)
        (folder / "diary").unlink(missing_ok=True)
        if diary:
            (folder / "diary").write_text("".join(json.dumps(line) + "\n" for line in diary))
        if kernels is not None:
            (folder / "report").write_bytes(synthetic.pack(kernels))
        return folder

    yield behave
    device.ncu_version.cache_clear()


def kernels(*pairs, problem="small"):
    return [Kernel(name, (f"{problem}.{subject}",), {}, ()) for subject, name in pairs]


GOOD = kernels(("fa3", "memset"), ("fa3", "attention"), ("stage1", "attention"))


def take(tmp_path, ids=("small",), sections="full", subjects=SUBJECTS, expected=()):
    """One process of ncu over problems of these names."""
    chosen = {"fa3": {"num_splits": 2}}
    asks = [Ask(replace(SMALL, id=i), list(subjects), chosen, dict(expected)) for i in ids]
    folder = tmp_path / "ncu" / "tiny"
    return ncu.profile(os.environ["ATTN_LADDER_NCU"], asks, sections, folder, 0, {})


def profile(tmp_path, sections="full", subjects=SUBJECTS, expected=()):
    """One problem: its report, sha256 and counts. What fails is raised."""
    found = take(tmp_path, ("small",), sections, subjects, expected)
    if found.failed:
        raise NcuError(found.failed["small"])
    return tmp_path / "ncu" / "tiny" / found.file, (found.sha256, found.counts["small"])


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
    assert words[words.index("--metrics") + 1].split(",") == ncu_metrics([SMALL.dtype])
    assert words[words.index("--apply-rules") + 1] == "no"
    request = json.loads((report.parent / ".partial" / "small.request.json").read_text())
    assert request["problems"][0]["chosen"] == {"fa3": {"num_splits": 2}, "stage1": None}


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
    monkeypatch.setattr(ncu, "kernel_ranges", ncu_rep.kernel_ranges)
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


# -- several problems in one process


THREE = ("one", "two", "three")


def of(*ids):
    return [k for i in ids for k in kernels(("fa3", "x"), ("stage1", "x"), problem=i)]


def diary(*lines):
    """`begin` of every problem named, and how it ended."""
    return [x for name, end in lines for x in ({"begin": name}, {end: name, "why": f"{name}: no"})
            if end or "begin" in x]  # fmt: skip


def test_one_process_of_ncu_profiles_several_problems(fake, tmp_path):
    folder = fake(kernels=of(*THREE), diary=diary(*((name, "done") for name in THREE)))
    taken = take(tmp_path, THREE)
    assert taken.counts == dict.fromkeys(THREE, {"fa3": 1, "stage1": 1})
    assert (taken.failed, taken.left) == ({}, [])
    assert taken.file == f"one-{taken.sha256[:8]}.ncu-rep"
    assert (tmp_path / "ncu" / "tiny" / taken.file).is_file()
    words = (folder / "arguments").read_text().splitlines()
    assert words.count("--nvtx-include") == 6
    assert "attn_ladder@three.stage1/" in words


def test_a_problem_that_fails_leaves_the_others(fake, tmp_path):
    ends = [("one", "done"), ("two", "failed"), ("three", "done")]
    fake(kernels=of("one", "three"), diary=diary(*ends))
    taken = take(tmp_path, THREE)
    assert list(taken.counts) == ["one", "three"]
    assert (taken.failed, taken.left) == ({"two": "two: no"}, [])


def test_a_wrong_number_of_kernels_leaves_the_other_problems(fake, tmp_path):
    fake(kernels=of("one", "two", "two", "three"))
    taken = take(tmp_path, THREE, expected={"fa3": 1})
    assert list(taken.counts) == ["one", "three"]
    assert "2 kernels of fa3 were profiled, but it launches 1" in taken.failed["two"]


def test_problems_behind_a_dead_worker_are_left(fake, tmp_path):
    ends = [("one", "done"), ("two", "")]
    fake("==ERROR== error code (139)\n", 139, of("one"), diary(*ends))
    taken = take(tmp_path, THREE)
    assert list(taken.counts) == ["one"]
    assert "two: ncu 2025.3.1.0 failed:\n  ==ERROR== error code (139)" in taken.failed["two"]
    assert [ask.problem.id for ask in taken.left] == ["three"]


@pytest.mark.parametrize("report", [None, kernels(("fa3", "x"), problem="other")])
def test_without_a_usable_report_only_the_problem_at_fault_is_given_up(fake, tmp_path, report):
    fake("==ERROR== killed\n", 9, report, diary(("one", "done"), ("two", "")))
    taken = take(tmp_path, THREE)
    assert (taken.file, taken.counts, list(taken.failed)) == ("", {}, ["two"])
    assert [ask.problem.id for ask in taken.left] == ["one", "three"]


@pytest.mark.parametrize(
    ("says", "status", "found", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM\n", 1, None, "no permission"),
        ("", 0, of(*THREE, "other"), "the report is of another problem"),
        ("==ERROR== out of disk\n", 1, of(*THREE), "out of disk"),
    ],
)
def test_what_concerns_all_problems_is_raised(fake, tmp_path, says, status, found, message):
    fake(says, status, found)
    with pytest.raises(NcuError, match=message):
        take(tmp_path, THREE)
    assert not list((tmp_path / "ncu" / "tiny").glob("*.ncu-rep"))


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(0, 3, []), (1, 3, [1]), (9, 3, [3, 3, 3]), (9, 4, [3, 3, 3]), (16, 8, [8, 8])],
)
def test_problems_are_dealt_evenly(count, most, sizes):
    parts = ncu.even(range(count), most)
    assert [len(part) for part in parts] == sizes
    assert [n for part in parts for n in part] == list(range(count))


@pytest.mark.parametrize(
    ("dtypes", "there"),
    [(["bf16"], {"bf16"}), (["fp16"], {"fp16"}), (["bf16", "fp16"], {"bf16", "fp16"})],
)
def test_counters_of_another_dtype_are_not_asked_for(dtypes, there):
    words = ncu.command("ncu", Path("x"), "full", [], dtypes, [])
    named = words[words.index("--metrics") + 1]
    assert {dtype for dtype in ("bf16", "fp16") if f"_src_{dtype}" in named} == there


@pytest.mark.parametrize("name", ["a/b", "a@b", "a,b", "a]b", "a b"])
def test_names_that_break_the_filter_are_refused(name):
    with pytest.raises(ValueError, match="takes for syntax"):
        ncu.range_name("small", name)
    assert ncu.range_name("small", "control_sync.4") == "small.control_sync.4"


# -- a whole suite


@pytest.fixture
def suite(fake, monkeypatch, tmp_path):

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
    real = ncu.profile

    def one(tool, asks, *rest):
        calls.append([ask.problem.id for ask in asks])
        pairs = [(ask.problem.id, [(s, "attention") for s in ask.subjects]) for ask in asks]
        fake(kernels=[k for name, found in pairs for k in kernels(*found, problem=name)])
        return real(tool, asks, *rest)

    monkeypatch.setattr(ncu, "profile", one)

    def run(sections=None, which="smoke"):
        calls.clear()
        chosen = settings.load(tmp_path / "config.json", tmp_path)
        data = ncu.run(chosen, which, sections, tmp_path / "ncu" / f"{which}.json")
        return data, list(calls)

    run.smoke = smoke
    run.folder = tmp_path
    run.one = one
    run.calls = calls
    return run


def test_the_index_names_every_report(suite):
    data, calls = suite()
    assert calls == [[p.id for p in suite.smoke]]
    assert len({entry["file"] for entry in data["reports"]}) == 1
    assert record.read(suite.folder / "ncu" / "smoke.json", "ncu") == data
    for entry in data["reports"]:
        assert (suite.folder / entry["file"]).is_file()
        assert entry["subjects"] == {"fa3": 1}
        assert entry["left_out"] == {"stage1": "unsupported: no sm_90"}
        assert entry["sections"] == "listed"


def test_an_interrupted_suite_keeps_its_reports(suite, monkeypatch):
    monkeypatch.setattr(ncu, "MOST", {"listed": 2})
    last = suite.smoke[-1].id

    def dies(tool, asks, *rest):
        if last in [ask.problem.id for ask in asks]:
            raise KeyboardInterrupt
        return suite.one(tool, asks, *rest)

    monkeypatch.setattr(ncu, "profile", dies)
    with pytest.raises(KeyboardInterrupt):
        suite()
    before = [name for chunk in suite.calls for name in chunk]
    assert before and last not in before
    monkeypatch.setattr(ncu, "profile", suite.one)
    data, calls = suite()
    assert [p.id for p in suite.smoke] == before + [name for chunk in calls for name in chunk]
    assert [entry["problem"]["id"] for entry in data["reports"]] == [p.id for p in suite.smoke]


@pytest.fixture
def stopped(suite, monkeypatch):
    """ncu was stopped when FA3's kernel of each problem was whole and stage 1's was not there."""
    chosen = settings.load(suite.folder / "config.json", suite.folder)
    session = Session(chosen, SUBJECTS, fake_gpu())
    timing = {**session.header("timing", "smoke"), "regime": "spaced", "problems": []}
    record.write(suite.folder / "timing" / "smoke.spaced.json", timing, "timing")
    monkeypatch.setattr(
        ncu, "gate", lambda run, asked, names: {p.id: dict.fromkeys(SUBJECTS) for p in asked}
    )
    folder = suite.folder / "ncu" / "smoke"
    folder.mkdir(parents=True)
    for problem in suite.smoke:
        (folder / f".{problem.id}.77.ncu-rep").write_text(problem.id)

    def ranges(data, name):
        return [("attention", (f"{data.decode()}.fa3",))]

    monkeypatch.setattr(ncu, "kernel_ranges", ranges)
    suite.close = lambda: ncu.close(chosen, "smoke", None, suite.folder / "ncu" / "smoke.json")
    return suite


def test_a_suite_that_ncu_was_stopped_in_is_closed_with_the_subjects_that_are_whole(stopped):
    data = stopped.close()
    assert record.read(stopped.folder / "ncu" / "smoke.json", "ncu") == data
    for entry in data["reports"]:
        assert (stopped.folder / entry["file"]).is_file()
        assert entry["subjects"] == {"fa3": 1}
        assert entry["left_out"] == {"stage1": "interrupted before it was profiled"}
    assert data["provenance"]["closed"]["provenance_of"] == "timing/smoke.spaced.json"


@pytest.mark.parametrize("kernels", [0, 3])
def test_a_subject_whose_kernels_are_not_all_there_is_not_recorded(stopped, monkeypatch, kernels):
    monkeypatch.setattr(
        ncu, "timed_kernels", lambda run, suite: {p.id: {"fa3": 2} for p in stopped.smoke}
    )
    monkeypatch.setattr(
        ncu, "kernel_ranges",
        lambda data, name: [("attention", (f"{data.decode()}.fa3",))] * kernels,
    )  # fmt: skip
    with pytest.raises(NcuError, match="of 3 problems 0 are in reports"):
        stopped.close()
    assert not (stopped.folder / "ncu" / "smoke.json").exists()


def test_a_report_of_other_kernels_is_not_closed(stopped, monkeypatch):
    monkeypatch.setattr(ncu, "kernel_hash", lambda name: "changed")
    with pytest.raises(NcuError, match="fa3 is not the kernel that was timed in this run"):
        stopped.close()


def test_a_failed_problem_is_told_when_the_others_are_done(suite, monkeypatch):
    monkeypatch.setattr(ncu, "MOST", {"listed": 1})
    first = suite.smoke[0].id

    def fails(tool, asks, *rest):
        if asks[0].problem.id == first:
            return ncu.Taken("", "", {}, {first: f"{first}: out of GPU memory"}, [])
        return suite.one(tool, asks, *rest)

    monkeypatch.setattr(ncu, "profile", fails)
    with pytest.raises(
        NcuError, match=f"2 of 3 problems were .* kept.*\n{first}: out of GPU memory"
    ):
        suite()
    assert not (suite.folder / "ncu" / "smoke.json").exists()
    monkeypatch.setattr(ncu, "profile", suite.one)
    data, calls = suite()
    assert calls == [[first]] and len(data["reports"]) == 3


def test_what_a_process_did_not_come_to_is_profiled_next(suite, monkeypatch):
    def stops(tool, asks, *rest):
        taken = suite.one(tool, asks[:1], *rest)
        return replace(taken, left=asks[1:])

    monkeypatch.setattr(ncu, "profile", stops)
    data, calls = suite()
    assert calls == [[p.id] for p in suite.smoke]
    assert len({entry["file"] for entry in data["reports"]}) == len(suite.smoke)


def test_reports_that_nothing_names_are_removed(suite):
    left = suite.folder / "ncu" / "smoke" / "left-over.ncu-rep"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of an earlier try")
    data, _ = suite()
    there = {path.name for path in left.parent.glob("*.ncu-rep")}
    assert there == {entry["file"].split("/")[-1] for entry in data["reports"]}


def test_a_problem_is_profiled_in_the_first_suite_that_holds_it(suite):
    config = suite.folder / "config.json"
    text = {"subjects": SUBJECTS, "suites": {"profile": ["profile", "gate"]}}
    config.write_text(json.dumps(text))
    data, _ = suite(None, "gate")
    names = [entry["problem"]["id"] for entry in data["reports"]]
    assert "gate-b32" in names and "gate-b16" not in names
    assert {entry["sections"] for entry in data["reports"]} == {"listed"}
    assert "gate-b16" in [e["problem"]["id"] for e in suite(None, "profile")[0]["reports"]]
    config.write_text(json.dumps({**text, "only": {"profile": ["fa3"], "gate": ["fa3"]}}))
    assert "gate-b16" not in [e["problem"]["id"] for e in suite(None, "gate")[0]["reports"]]
    config.write_text(json.dumps({**text, "suites": {"profile": ["variant", "gate"]}}))
    narrower = {**text, "suites": {"profile": ["variant", "gate"]}, "only": {"variant": ["fa3"]}}
    config.write_text(json.dumps(narrower))
    assert "gate-b16" in [e["problem"]["id"] for e in suite(None, "gate")[0]["reports"]]


def test_no_ncu_says_how_to_get_it(suite, monkeypatch):
    monkeypatch.setenv("ATTN_LADDER_NCU", "/nowhere/ncu")
    with pytest.raises(NcuError, match=r"\(ncu\) was not found: install .*suites.profile"):
        suite()


def test_all_sections_only_for_the_suite_profile(suite):
    with pytest.raises(ValueError, match="sections='some' must be full or listed"):
        suite("some")
    data, _ = suite("full")
    assert {entry["sections"] for entry in data["reports"]} == {"full"}


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """The worker on the CPU, with a recorder in place of nvtx and of the subjects: gives what
    happened, and the lines of its diary. `broken` maps a subject to what it raises on `two`."""
    from types import SimpleNamespace

    import torch
    from fake_gpu import right

    from attn_ladder import stage
    from attn_profiling import inputs

    events, broken = [], {}
    current = []

    def push_range(name, domain):
        events.append((domain, name))

    fake_nvtx = SimpleNamespace(
        push_range=push_range, pop_range=lambda domain: events.append((domain, None))
    )

    def load(name):
        def forward(*args, **kwargs):
            events.append("call")
            if name in broken and current[-1] == "two":
                raise broken[name]
            return right(*args, **kwargs)

        return SimpleNamespace(forward=forward)

    rotation = inputs.Rotation

    def on_cpu(torch, problem, count, seed, device):
        current.append(problem.id)
        return rotation(torch, problem, count, seed, "cpu")

    monkeypatch.setitem(sys.modules, "nvtx", fake_nvtx)
    monkeypatch.setattr(stage, "load", load)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("freed"))
    monkeypatch.setattr(inputs, "Rotation", on_cpu)

    def run(*ids):
        request = tmp_path / "x.request.json"
        entries = [
            {
                "problem": record.problem_fields(replace(SMALL, id=name)),
                "subjects": SUBJECTS,
                "chosen": {"fa3": {"num_splits": 2}, "stage1": None},
            }
            for name in ids
        ]
        request.write_text(json.dumps({"problems": entries, "seed": 0}))
        events.clear()
        ncu.work(request)
        lines = (tmp_path / "x.request.diary").read_text().splitlines()
        return list(events), [json.loads(line) for line in lines], ncu._read_diary(request)

    run.broken = broken
    return run


def of_problem(name):
    domain = "attn_ladder"
    return [
        "call", (domain, f"{name}.fa3"), "call", (domain, None),
        "call", (domain, f"{name}.stage1"), "call", (domain, None), "freed",
    ]  # fmt: skip


def test_the_worker_pushes_one_range_for_each_subject(worker):
    events, lines, read = worker("one", "two")
    assert events == of_problem("one") + of_problem("two")
    assert lines == [{"begin": "one"}, {"done": "one"}, {"begin": "two"}, {"done": "two"}]
    assert read == (None, {})


def test_the_worker_goes_on_after_a_problem_that_fails(worker):
    worker.broken["stage1"] = ValueError("no such tile")
    events, _, read = worker(*THREE)
    assert events[-len(of_problem("three")) :] == of_problem("three")
    assert read == (None, {"two": "two.stage1: ValueError: no such tile"})


def test_the_worker_stops_when_cuda_is_unusable(worker):
    worker.broken["fa3"] = RuntimeError("CUDA error: an illegal memory access")
    events, lines, (began, failed) = worker(*THREE)
    assert [line for line in lines if "begin" in line] == [{"begin": "one"}, {"begin": "two"}]
    assert began is None and list(failed) == ["two"]


class Action:
    """A kernel whose machine code is `lines`, four bytes apart."""

    def __init__(self, name, lines):
        self._name, self._lines, self.asked = name, lines, 0
        self.pcs = [4 * n for n in range(len(lines))]

    def name(self):
        return self._name

    def sass_by_pc(self, pc):
        self.asked += 1
        return self._lines[pc // 4]


def test_code_that_was_seen_before_is_not_disassembled_again():
    code, lines = ncu_rep.Disassembly(), [f"FADD R{n}, R1" for n in range(80)]
    first, again = Action("attention", lines), Action("attention", list(lines))
    assert code.of(first, first.pcs) == code.of(again, again.pcs) == lines
    assert again.asked == len(lines) // code.EACH


@pytest.mark.parametrize("change", ["name", "line", "length"])
def test_other_code_is_disassembled(change):
    code, lines = ncu_rep.Disassembly(), [f"FADD R{n}, R1" for n in range(80)]
    first = Action("attention", lines)
    assert code.of(first, first.pcs) == lines
    other = ["FMUL R0, R1", *lines[1:]] if change == "line" else [*lines[:79], "EXIT"]
    if change == "length":
        other.append("NOP")
    action = Action("memset" if change == "name" else "attention", other)
    assert code.of(action, action.pcs) == other
