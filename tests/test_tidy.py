"""From raw files to tidy tables, on a synthetic run of known truth."""

import csv
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import synthetic

from attn_ladder.problem import read_problems
from attn_profiling import metrics, ncu_rep, record, tidy, verdict

NOISY = "grid-d64-causal-s16384"


def rows_of(name):
    with (synthetic.shared() / "results" / name).open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def metric_rows():
    return rows_of("metrics.csv")


@pytest.fixture(scope="module")
def speedup_rows():
    return rows_of("speedups.csv")


@pytest.fixture(scope="module")
def provenance():
    return json.loads((synthetic.shared() / "results" / "provenance.json").read_text())


def pick(rows, **wanted):
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


@pytest.fixture
def small(tmp_path):
    """A run of its own: device, one suite of checks, timings, host costs and counters."""
    maker = synthetic.Maker(tmp_path / "run")
    maker.device()
    maker.check("gate")
    maker.timing("gate", "spaced")
    maker.host("gate")
    maker.ncu("profile")
    return tmp_path / "run"


def read(raw):
    return tidy.tidy(raw, "replay", synthetic.PROBLEMS, synthetic.open_report)


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_columns_are_those_of_the_design(metric_rows, speedup_rows):
    assert list(metric_rows[0]) == [
        "run", "device", "suite", "problem", "dtype", "subject", "regime", "metric", "unit",
        "statistic", "value",
    ]  # fmt: skip
    assert list(speedup_rows[0]) == [
        "run", "device", "suite", "problem", "dtype", "regime", "subject", "peer", "ratio",
        "ci_low", "ci_high", "n_processes", "n",
    ]  # fmt: skip
    assert {r["device"] for r in metric_rows} == {"h100-sxm-80gb"}


def test_times_are_the_true_ones(metric_rows):
    problem = synthetic.Maker(synthetic.shared()).problems["gate-b16"]
    for subject in ("fa3", "stage1", "cudnn"):
        found = {
            r["statistic"]: float(r["value"])
            for r in pick(
                metric_rows, suite="gate", problem="gate-b16", subject=subject, metric="gpu_us"
            )
        }
        assert found["ci_low"] <= synthetic.true_us(problem, subject) <= found["ci_high"]
        assert found["n_processes"] == 3 and found["n"] == 90
        (rate,) = pick(
            metric_rows, suite="gate", problem="gate-b16", subject=subject, metric="tflops",
            statistic="median",
        )  # fmt: skip
        assert float(rate["value"]) == pytest.approx(
            problem.convention_flops / found["median"] / 1e6
        )


def test_ratios_are_the_true_ones(speedup_rows):
    found = pick(speedup_rows, suite="grid", regime="spaced", subject="stage1", peer="fa3")
    single = [r for r in found if not r["problem"].startswith("(")]
    assert len(single) == 24
    inside = sum(float(r["ci_low"]) <= 0.45 <= float(r["ci_high"]) for r in single)
    assert inside >= 22
    (median,) = pick(found, problem=tidy.MEDIAN)
    (least,) = pick(found, problem=tidy.MINIMUM)
    assert float(median["ratio"]) == pytest.approx(0.45, rel=0.01)
    assert float(least["ratio"]) <= float(median["ratio"])


def test_the_best_peer_of_a_problem(speedup_rows):
    (best,) = pick(speedup_rows, suite="gate", problem="gate-b16", subject="stage1", peer=tidy.BEST)
    (fa4,) = pick(speedup_rows, suite="gate", problem="gate-b16", subject="stage1", peer="fa4")
    assert best["ratio"] == fa4["ratio"]


def test_an_inconclusive_problem_is_shown_and_left_out_of_medians(
    metric_rows, speedup_rows, provenance
):
    (row,) = pick(metric_rows, problem=NOISY, regime="spaced", metric="conclusive")
    assert row["value"] == "0"
    (attempts,) = pick(metric_rows, problem=NOISY, regime="spaced", metric="attempts")
    assert attempts["value"] == "3"
    assert [i["problem"] for i in provenance["inconclusive"]] == [NOISY]
    assert pick(speedup_rows, problem=NOISY, subject="stage1", peer="fa3", regime="spaced")
    medians = pick(speedup_rows, suite="grid", problem=tidy.MEDIAN, subject="stage1", peer="fa3")
    counts = {r["regime"]: int(r["n"]) for r in medians}
    assert counts == {"spaced": 23 * 90, "sustained": 24 * 3}


def test_host_costs_and_derived_shares(metric_rows):
    problem = synthetic.Maker(synthetic.shared()).problems["gate-b32"]
    (share,) = pick(
        metric_rows, problem="gate-b32", subject="fa3", metric="launch_share", statistic="median"
    )
    gpu = synthetic.true_us(problem, "fa3")
    truth = 100 * (1 - gpu / (gpu + synthetic.HOST_US["fa3"] + 6))
    assert float(share["value"]) == pytest.approx(truth, abs=1)
    for metric in ("per_sequence_eager", "per_sequence_gpu"):
        found = pick(metric_rows, subject="fa3", metric=metric, statistic="median")
        assert len(found) == 6 and all(float(r["value"]) > 1 for r in found)
    gain = pick(metric_rows, subject="stage3", metric="eager_gain", statistic="median")
    assert len(gain) == 7 and not pick(metric_rows, subject="stage1", metric="eager_gain")


def test_the_first_call_is_that_of_the_slowest_process(metric_rows):
    found = pick(metric_rows, suite="gate", subject="stage5", metric="first_call_ms")
    assert {(r["regime"], r["unit"], r["statistic"]) for r in found} == {("-", "ms", "value")}
    values = {r["problem"]: float(r["value"]) for r in found}
    assert len(found) == 7 and values.pop("gate-b1") == max(synthetic.FIRST_CALL_MS)
    assert set(values.values()) == {synthetic.LATER_CALL_MS}


@pytest.mark.parametrize(
    ("slowest", "said"),
    [(500.0, verdict.SUPPORTED), (500.5, verdict.REFUTED), (None, verdict.INCONCLUSIVE)],
)
def test_first_calls_decide_a_criterion(small, slowest, said):
    def change(data):
        for entry in data["problems"]:
            taken = entry["samples"]["stage5"]
            if slowest is None:
                del taken["first_call_ms"]
            elif entry["problem"]["id"] == "gate-b8":
                taken["first_call_ms"][1] = slowest

    edit(small / "host" / "gate.json", change)
    criterion = verdict.Hypothesis(
        id="first-call", role="criterion", claim="a claim", suites=("gate",), at_most=500,
        witness={
            "kind": "counter", "subject": "stage5", "metric": "first_call_ms", "reduce": "max",
        },
    )  # fmt: skip
    claims = verdict.Constraints({}, (criterion,), "sha")
    tables = read(small)
    (row,) = verdict.judge(
        claims, tables.metrics, [],
        {**tables.provenance, "constraints_sha256": ["sha"]},
    )  # fmt: skip
    assert row["verdict"] == said and row["effect"] == ("" if slowest is None else slowest)


def test_fp16_is_compared_with_the_same_problem_in_bf16(metric_rows):
    """The synthetic times do not depend on the dtype."""
    found = pick(metric_rows, suite="grid_fp16", subject="stage5", metric="over_bf16")
    assert len(found) == 23  # one problem of the grid is inconclusive
    assert all(float(r["value"]) == pytest.approx(1, abs=0.01) for r in found)
    assert not pick(metric_rows, suite="grid", metric="over_bf16")


def test_counters_count_for_every_profiled_suite_that_holds_the_problem(metric_rows):
    def held(suite):
        rows = pick(metric_rows, suite=suite, subject="fa3", metric="tensor_pipe")
        return {r["problem"] for r in rows}

    grid = {p.id for p in read_problems(synthetic.PROBLEMS).values() if "grid" in p.suites}
    assert held("grid") == grid and len(held("gate")) == 7
    assert held("profile") & grid and not held("variant")


def test_every_kernel_of_a_profiled_call_counts(metric_rows):
    found = {
        (r["problem"], r["subject"]): float(r["value"])
        for r in pick(metric_rows, suite="profile", metric="kernels_per_call")
    }
    assert found[("gate-b16", "fa3")] == 2 and found[("gate-b16", "stage1")] == 1
    assert found[("grid-d64-full-s1024", "fa3")] == 1
    assert not pick(metric_rows, suite="profile", metric="gpu_us")  # no duration from a profiler


def test_a_second_run_gives_the_same_bytes(tmp_path):
    raw = synthetic.shared() / "measurements" / "h100-sxm-80gb"
    synthetic.derive(raw, tmp_path)
    for name in ("metrics.csv", "speedups.csv", "provenance.json", "verdicts.csv"):
        first = (synthetic.shared() / "results" / name).read_bytes()
        assert first == (tmp_path / name).read_bytes(), name


def test_a_stale_subject_is_listed_and_left_out(small):
    assert read(small).provenance["stale"] == []

    def old(data):
        data["subjects"]["stage1"]["kernel_hash"] = "0" * 16

    edit(small / "timing" / "gate.spaced.json", old)
    tables = read(small)
    (stale,) = tables.provenance["stale"]
    assert stale["what"] == "stage1" and stale["commit"] == synthetic.COMMIT
    assert "measure it again" in stale["reason"]
    assert not [r for r in tables.speedups if r["subject"] == "stage1"]
    assert [r for r in tables.speedups if r["subject"] == "stage2"]
    left = {r["metric"] for r in tables.metrics if r["subject"] == "stage1"}
    assert "gpu_us" not in left and "tensor_pipe" in left  # the counters are another file


def test_a_subject_that_is_gone_is_stale(small):
    def rename(data):
        for entry in data["problems"]:
            samples = entry["attempts"][0]["samples"]
            samples["stage9"] = samples.pop("stage1")

    edit(small / "timing" / "gate.spaced.json", rename)
    found = {s["what"] for s in read(small).provenance["stale"]}
    assert found == {"stage9"}


def test_a_changed_problem_is_stale(small, tmp_path):
    table = tmp_path / "problems.tsv"
    old = "gate-b8\tgate\tbf16\t8\t"
    text = synthetic.PROBLEMS.read_text()
    assert text.count(old) == 1
    table.write_text(text.replace(old, "gate-b8\tgate\tbf16\t9\t"))
    tables = tidy.tidy(small, "replay", table, synthetic.open_report)
    assert {s["what"] for s in tables.provenance["stale"]} == {"gate-b8"}
    assert "gate-b8" not in {r["problem"] for r in tables.metrics}


def test_a_failed_check_is_reported(small):
    def fail(data):
        result = next(r for r in data["results"] if r["subject"] == "stage1")
        result |= {"ok": False, "status": "failed", "message": "error 0.5 above its bound"}

    edit(small / "check" / "gate.json", fail)
    tables = read(small)
    (out,) = [e for e in tables.provenance["excluded"] if e["status"] == "failed"]
    assert out["subject"] == "stage1" and "above its bound" in out["reason"]
    wrong = [r for r in tables.metrics if r["metric"] == "correct" and r["value"] == 0]
    assert [(r["subject"], r["problem"]) for r in wrong] == [("stage1", "gate-b1")]


@pytest.mark.parametrize(("status", "values"), [("error", {0, 1}), ("unsupported", {1})])
def test_a_subject_that_crashes_is_not_correct(small, status, values):
    def crash(data):
        results = [r for r in data["results"] if r["subject"] == "stage5"]
        for result in results[1:]:
            result |= {"ok": False, "status": status, "message": "a fault", "max_error": None}

    edit(small / "check" / "gate.json", crash)
    rows = [
        r for r in read(small).metrics
        if (r["metric"], r["subject"], r["suite"]) == ("correct", "stage5", "gate")
    ]  # fmt: skip
    assert {r["value"] for r in rows} == values
    assert len(rows) == (7 if status == "error" else 1)


def test_the_best_peer_is_that_of_all_processes(small):
    def swap(data):
        samples = data["problems"][0]["attempts"][0]["samples"]
        slow = samples["fa4"]["gpu_us"]
        samples["fa4"]["gpu_us"] = [[value / 3 for value in slow[0]], *([v * 3 for v in p]
                                    for p in slow[1:])]  # fmt: skip

    edit(small / "timing" / "gate.spaced.json", swap)
    ratio = {
        r["peer"]: r["ratio"] for r in read(small).speedups
        if (r["problem"], r["subject"]) == ("gate-b1", "stage1")
    }  # fmt: skip
    assert ratio["best"] == ratio["fa3"] != ratio["fa4"]


def test_doses_are_compared_with_the_smallest_of_their_file(speedup_rows):
    found = {
        (r["subject"], r["peer"])
        for r in pick(speedup_rows, suite="control", problem="control-d64-s1024")
    }
    assert {("control_launch.8", "control_launch.1"), ("control_sync.4", "control_sync.0")} <= found
    assert not any(subject in ("control_launch.1", "control_sync.0") for subject, _ in found)


def test_zero_doses():
    found = tidy.zero_doses()
    assert found["control_launch"] == "control_launch.1"
    assert found["control_memory"] == "control_memory.0" and len(found) == 4


@pytest.mark.parametrize("kind", ["fresh_pointer_host_us", "eager_latency_us"])
def test_a_host_pair_that_is_off_takes_what_is_made_of_it(small, kind):
    def rows(metric, problem):
        return [
            r["value"] for r in read(small).metrics
            if (r["metric"], r["problem"], r["regime"]) == (metric, problem, "-")
        ]  # fmt: skip

    assert rows("per_sequence_eager", "gate-b16")

    def off(data):
        (entry,) = (e for e in data["problems"] if e["problem"]["id"] == "gate-b16")
        twin = entry["samples"]["fa3#2"]
        twin[kind] = [[1.12 * v for v in p] for p in twin[kind]]

    edit(small / "host" / "gate.json", off)
    (pair,) = rows(f"aa_{kind}", "gate-b16")
    assert pair == pytest.approx(1.12, abs=0.01)
    assert bool(rows("per_sequence_eager", "gate-b16")) == (kind != "eager_latency_us")
    assert rows("per_sequence_eager", "gate-b32") and rows("eager_host_us", "gate-b16")
    (said,) = read(small).provenance["inconclusive"]
    assert said["problem"] == "gate-b16" and f"{kind} 1.1" in said["reason"]


def test_a_metric_of_host_times_needs_the_pairs_it_is_made_of():
    pairs = {"aa_eager_latency_us": 1.05, "aa_graph_gpu_us": 0.98, "aa_eager_host_us": 1.19}
    assert tidy.agree(pairs, "launch_share") and not tidy.agree(pairs, "host_over_fa3")
    assert not tidy.agree(pairs, "launch_share_graph")  # one pair was not measured
    assert not tidy.agree({**pairs, "aa_eager_latency_us": 0.89}, "launch_share")


def report_of(raw, problem="gate-b16"):
    return raw / "ncu" / "profile" / f"{problem}.ncu-rep"


def test_a_packed_report_is_read(small):
    path = report_of(small)
    path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes()))
    before = tidy.csv_text(tidy.METRICS_COLUMNS, read(small).metrics)
    path.unlink()
    assert tidy.csv_text(tidy.METRICS_COLUMNS, read(small).metrics) == before


def share_reports(raw, keep=lambda data: data):
    """All problems in one report, as one process of ncu leaves it."""
    index = raw / "ncu" / "profile.json"
    paths = [raw / entry["file"] for entry in json.loads(index.read_text())["reports"]]
    data = keep(synthetic.joined([path.read_bytes() for path in paths]))
    shared = paths[0].with_name("shared.ncu-rep")
    shared.write_bytes(data)
    for path in paths:
        path.unlink()
    named = {"file": "ncu/profile/shared.ncu-rep", "sha256": hashlib.sha256(data).hexdigest()}
    edit(index, lambda d: [entry.update(named) for entry in d["reports"]])


def test_problems_can_share_a_report(small):
    opened = []

    def counting(data, name, counters):
        opened.append(name)
        return synthetic.open_report(data, name, counters)

    before = tidy.csv_text(tidy.METRICS_COLUMNS, read(small).metrics)
    share_reports(small)
    tables = tidy.tidy(small, "replay", synthetic.PROBLEMS, counting)
    assert tidy.csv_text(tidy.METRICS_COLUMNS, tables.metrics) == before
    assert len(opened) == 1


def test_a_shared_report_without_a_problem_is_an_error(small):
    def without(data):
        kernels = json.loads(data)
        return json.dumps([k for k in kernels if not k[1][0].startswith("gate-b16.")]).encode()

    share_reports(small, without)
    with pytest.raises(ncu_rep.BadReport, match=r"0 kernels in NVTX range gate-b16"):
        read(small)


def test_listed_counters_without_those_of_instructions_give_the_other_metrics(small):
    """A report with fewer sections than asked for everywhere else."""

    def bare(data, name, counters):
        kernels = synthetic.open_report(data, name, counters)
        return [replace(kernel, instructions=()) for kernel in kernels]

    edit(
        small / "ncu" / "profile.json",
        lambda d: [entry.update(sections="listed") for entry in d["reports"]],
    )
    tables = tidy.tidy(small, "replay", synthetic.PROBLEMS, bare)
    found = {row["metric"] for row in tables.metrics if row["problem"] == "gate-b16"}
    assert "stall_memory" in found and "cta_barriers" not in found
    assert not [note for note in tables.provenance["notes"] if "single instructions" in note]
    edit(
        small / "ncu" / "profile.json",
        lambda d: [entry.update(sections="full") for entry in d["reports"]],
    )
    tables = tidy.tidy(small, "replay", synthetic.PROBLEMS, bare)
    assert [note for note in tables.provenance["notes"] if "single instructions" in note]


def test_a_missing_report_is_an_error(small):
    report_of(small).unlink()
    with pytest.raises(ncu_rep.BadReport, match=r"gate-b16.ncu-rep: no such report"):
        read(small)


def test_a_truncated_report_is_an_error(small):
    path = report_of(small)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ncu_rep.BadReport, match="truncated, foreign or from another run"):
        read(small)


def test_a_truncated_packed_report_is_an_error(small):
    path = report_of(small)
    packed = lzma.compress(path.read_bytes())
    path.with_name(path.name + ".xz").write_bytes(packed[: len(packed) // 2])
    path.unlink()
    with pytest.raises(ncu_rep.BadReport, match="cannot be unpacked"):
        read(small)


def test_a_foreign_report_is_an_error():
    for data in (b"", b"not a report", b"NVR\0" + b"x" * 100):
        with pytest.raises(ncu_rep.BadReport, match=r"foreign\.ncu-rep"):
            ncu_rep.open_report(data, "foreign.ncu-rep", metrics.ncu_metrics())


def test_a_report_is_read_in_a_process_of_its_own():
    """With a recorded one. The library that reads it would keep its memory."""
    folder = synthetic.ROOT / "measurements" / "h100-sxm-80gb" / "ncu"
    path = min(folder.glob("*/*.ncu-rep.xz"), key=lambda p: p.stat().st_size).with_suffix("")
    read_here = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from attn_profiling import ncu_rep

        def main():
            path, read = Path(sys.argv[1]), getattr(ncu_rep, sys.argv[2])
            kernels = read(ncu_rep.content(path), str(path), ["launch__block_size"])
            print(len(kernels), sum(len(k.instructions) for k in kernels), kernels[0].ranges,
                  kernels[0].counters, file=sys.stderr)
            print("ncu_report" in sys.modules)

        if __name__ == "__main__":
            main()
        """
    )

    def run(how):
        words = [sys.executable, "-c", read_here, str(path), how]
        path_of = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(words, env=path_of, capture_output=True, text=True, check=True)

    apart, here = run("open_apart"), run("open_report")
    assert apart.stderr == here.stderr and "block_size" in here.stderr
    assert (apart.stdout, here.stdout) == ("False\n", "True\n")
    with pytest.raises(ncu_rep.BadReport, match=r"foreign\.ncu-rep"):
        ncu_rep.open_apart(b"NVR\0", "foreign.ncu-rep", [])


def test_a_report_without_one_kernel_is_an_error(small):
    def more(data):
        report = next(r for r in data["reports"] if r["problem"]["id"] == "gate-b16")
        report["subjects"]["fa3"] = 3

    edit(small / "ncu" / "profile.json", more)
    with pytest.raises(ncu_rep.BadReport, match=r"2 kernels in NVTX range gate-b16\.fa3.*says 3"):
        read(small)


def test_a_missing_counter_names_file_and_version(small):
    def without(data, name, counters):
        kernels = synthetic.open_report(data, name, counters)
        for kernel in kernels:
            kernel.counters.pop("dram__bytes.sum")
        return kernels

    with pytest.raises(metrics.MissingCounter, match=r"dram__bytes\.sum") as error:
        tidy.tidy(small, "replay", synthetic.PROBLEMS, without)
    assert ".ncu-rep" in str(error.value) and "ncu 2025.3.1.0" in str(error.value)


def test_two_runs_in_one_folder_are_an_error(small):
    edit(small / "host" / "gate.json", lambda data: data.update(run="another"))
    with pytest.raises(ValueError, match="belongs to run 'another'.*ratios never cross runs"):
        read(small)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no device\.json; name a run's folder"):
        read(tmp_path)


def test_a_record_against_its_schema_is_an_error(small):
    edit(small / "host" / "gate.json", lambda data: data.pop("problems"))
    with pytest.raises(record.RecordError, match=r"gate\.json.*problems"):
        read(small)


def test_a_part_of_a_run_is_enough(tmp_path):
    maker = synthetic.Maker(tmp_path)
    maker.device()
    maker.timing("smoke", "spaced")
    tables = read(tmp_path)
    assert {r["suite"] for r in tables.metrics} == {"smoke"}


def test_cells():
    assert tidy.text(0.1 + 0.2) == "0.3" and tidy.text(True) == "1" and tidy.text("x") == "x"
    with pytest.raises(ValueError, match="must be finite"):
        tidy.text(float("nan"))


BLOCKED = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "triton"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Block())
    try:
        import torch
    except ImportError:
        pass
    else:
        raise SystemExit("the block does not work")
    from pathlib import Path
    import synthetic
    from paper import figures, numbers, report, tables
    from paper.evidence import load

    raw, results = Path(sys.argv[1]), Path(sys.argv[2])
    synthetic.derive(raw, results)
    evidence = load(results, synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    numbers.numbers(evidence)
    tables.headline(evidence)
    report.render(evidence)
"""


def test_nothing_right_of_the_raw_files_needs_torch_or_triton(small, tmp_path):
    folders = ("kernels", "profiling", "tests", ".")
    path = ":".join(str(synthetic.ROOT / folder) for folder in folders)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BLOCKED), str(small), str(tmp_path / "results")],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "MPLCONFIGDIR": str(tmp_path)},
        cwd=synthetic.ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_nothing_of_a_run_is_written_to(small):
    before = {p: p.read_bytes() for p in small.rglob("*") if p.is_file()}
    read(small)
    assert before == {p: p.read_bytes() for p in small.rglob("*") if p.is_file()}
    shutil.rmtree(small)


def test_energy_ratios_stand_beside_those_of_the_twin(metric_rows):
    pairs = pick(metric_rows, metric="energy_aa")
    assert {row["subject"] for row in pairs} == {"fa3"}
    (pair,) = pick(pairs, suite="grid", problem="grid-d64-full-s512")
    path = synthetic.shared() / "measurements/h100-sxm-80gb/timing/grid.sustained.json"
    rows = {r["problem"]["id"]: r for r in json.loads(path.read_text())["problems"]}
    taken = rows["grid-d64-full-s512"]["attempts"][-1]["samples"]
    energy = {name: np.mean(s["energy_mj"], axis=1) for name, s in taken.items()}

    def expected(name):
        return pytest.approx(np.median(energy[name] / energy["fa3"]))

    assert float(pair["value"]) == expected("fa3#2")
    (over,) = pick(metric_rows, suite="grid", problem="grid-d64-full-s512", subject="stage5",
                   metric="energy_over_fa3")  # fmt: skip
    assert float(over["value"]) == expected("stage5")
