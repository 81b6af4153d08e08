"""Every number of the paper's prose comes from the results, and the paper compiles."""

import os
import re
import shutil
import subprocess
from statistics import median

import pytest
import synthetic

from attn_profiling import metrics, record
from paper import figures, numbers, tables
from paper.evidence import Value, interval, load

MAIN = synthetic.ROOT / "paper" / "main.tex"
REFS = synthetic.ROOT / "paper" / "refs.bib"
KNOWN = {  # capitalised commands that are LaTeX's
    "Alph", "DeclareRobustCommand",
}  # fmt: skip


@pytest.fixture(scope="module")
def evidence():
    results = synthetic.shared() / "results"
    return load(results, synthetic.PROBLEMS, synthetic.CONSTRAINTS)


def used_macros(text):
    return set(re.findall(r"\\([A-Z][A-Za-z]+)", text)) - KNOWN


def test_every_macro_of_the_prose_is_a_number_of_the_run(evidence):
    defined = {name[1:] for name in numbers.numbers(evidence)}
    text = MAIN.read_text()
    assert len(used_macros(text)) > 50
    assert used_macros(text) - defined == set()
    assert used_macros(text + r"\TopSpeedOfLight") - defined == {"TopSpeedOfLight"}


def test_every_macro_is_there_where_all_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "stale", lambda data, subject: "its kernel changed")
    synthetic.derive(synthetic.shared() / "measurements" / "h100-sxm-80gb", tmp_path)
    found = numbers.numbers(load(tmp_path, synthetic.PROBLEMS, synthetic.CONSTRAINTS))
    assert used_macros(MAIN.read_text()) <= {name[1:] for name in found}
    assert found[r"\TopOverFaThreeMedianSpaced"] == numbers.MISSING


def test_macros_hold_what_the_tables_hold(evidence):
    found = numbers.numbers(evidence)
    assert found[r"\GridProblems"] == "24" and found[r"\InconclusiveSpaced"] == "1"
    assert found[r"\FaThreeKernels"] == "2"
    assert found[r"\StageTwoGateRatio"].startswith("0.62")
    assert found[r"\VerdictSync"] == "refuted"
    assert found[r"\Confirmatory"] == "confirmatory"
    assert (found[r"\TopIdenticalRuns"], found[r"\TopIdenticalProblems"]) == ("1000", "5")
    assert found[r"\FailedChecks"] == ""
    problem = evidence.problems["grid-d128-full-s8192"]
    ratio = evidence.speedup("grid", problem.id, "stage5", "fa3")
    assert found[r"\LongFullOverFaThree"] == interval(ratio, 3)
    for macro, metric, digits in (
        ("TensorPipe", "tensor_pipe", 1), ("IdleSmCycles", "idle_sm_cycles", 1),
        ("DramThroughput", "dram_throughput", 1), ("ProfiledClock", "profiled_clock", 0),
    ):  # fmt: skip
        value = evidence.anywhere(problem, "stage5", metric)
        assert found[rf"\LongFull{macro}"] == numbers.text(value, digits)
    assert found[r"\LongFullRounds"] == "15.5"  # 2,048 tiles for 132 SMs
    assert found[r"\ShortFullOverFaThree"].startswith("1.1")
    assert found[r"\MeasuringFlushLTwoFactor"] == "2"
    assert float(found[r"\TopHalfMoreWide"]) == pytest.approx(
        100 * (median(over_bf16_of(evidence, "stage5", 128)) - 1), abs=0.06
    )
    full = [
        value.value
        for p in evidence.suite("grid256")
        if not p.causal and (value := evidence.speedup("grid256", p.id, "stage5", "fa3"))
    ]
    assert found[r"\WideFullOverFaThree"] == f"{median(full):.2f}"
    assert (
        found[r"\ShortFullLimit"]
        == evidence.roofline(evidence.problems["grid-d128-full-s512"], "stage5").limit
    )


def over_bf16_of(evidence, name, headdim):
    times = evidence.all_of("grid_fp16", "over_bf16", "spaced")
    return [
        value.value
        for (problem, subject), value in times.items()
        if subject == name and evidence.problems[problem].headdim == headdim
    ]


def test_host_costs_are_those_of_problems_whose_pair_agrees(evidence, monkeypatch):
    found = numbers.numbers(evidence)
    assert found[r"\HostProblems"] == "7 of the 7"
    ratios = evidence.all_of("gate", "host_over_fa3")
    ours = sorted(v.value for (_, name), v in ratios.items() if name == "stage5")
    assert found[r"\TopHostOverFaThree"] == f"{ours[0]:.3f} to {ours[-1]:.3f}"
    kept = dict(evidence._metrics)
    monkeypatch.setattr(evidence, "_metrics", kept)
    kept["gate", "gate-b16", "fa3", "aa_eager_host_us", "-"] = {"value": 1.42}
    kept["gate", "gate-b16", "stage5", "eager_host_us", "-"] = {"median": 999.0}
    found = numbers.numbers(evidence)
    assert found[r"\HostProblems"] == "6 of the 7" and "999" not in found[r"\TopHostUs"]
    below = int(found[r"\TopHostBelowCudnn"])
    kept["gate", "gate-b1", "cudnn", "eager_host_us", "-"] = {"median": 0.1}
    assert int(numbers.numbers(evidence)[r"\TopHostBelowCudnn"]) == max(0, below - 1)


def test_where_a_claim_holds_is_said_whatever_the_verdict(evidence, monkeypatch):
    kept = dict(evidence._metrics)
    monkeypatch.setattr(evidence, "_metrics", kept)
    for (suite, problem), value in {
        ("grid", "grid-d128-causal-s512"): 28.9, ("gate", "gate-b1"): 73.9,
    }.items():  # fmt: skip
        for p in evidence.suite(suite):
            metric = "stall_memory" if suite == "grid" else "launch_share"
            share = value if p.id == problem else 1.0
            kept[suite, p.id, "fa3", metric, "-"] = {"value": share}
    found = numbers.numbers(evidence)
    assert found[r"\MemoryClaimed"] == (
        r"on 1 of 24 problems of the grid (128 causal 512: 28.9\,\%)"
    )
    said = r"on 1 of 7 problems of the gate whose A/A pair agrees (batch 1: 73.9\,\%)"
    assert found[r"\LaunchClaimed"] == said
    kept["gate", "gate-b1", "fa3", "aa_eager_latency_us", "-"] = {"value": 1.2}
    found = numbers.numbers(evidence)[r"\LaunchClaimed"]
    assert found == "on 0 of 6 problems of the gate whose A/A pair agrees"


def test_the_paper_says_whether_another_run_repeats_the_headline(evidence, monkeypatch):
    row = {"run": "r5", "suite": "grid", "regime": "spaced", "subject": "stage5"}
    row |= {"fresh": "1.152", "verdict": "AMBIGUOUS", "note": "its kernel has changed since; x"}
    assert "No other run repeats" in numbers._replicated(evidence)
    monkeypatch.setattr(evidence, "replications", [row])
    said = numbers._replicated(evidence)
    assert said.endswith("AMBIGUOUS in run r5, which has 1.152 of another kernel of that stage.")
    monkeypatch.setattr(evidence, "replications", [{**row, "verdict": "PASS", "run": "r8"}])
    assert numbers._replicated(evidence).endswith("is repeated by run r8.")


def test_the_places_of_bursts_follow_from_how_many_there_are(evidence, monkeypatch):
    measuring = evidence.provenance["content"]["measuring"]
    for bursts, said in ((2, "not every"), (len(evidence.subjects) + 1, "every")):
        monkeypatch.setitem(measuring, "sustained_bursts", bursts)
        assert numbers.numbers(evidence)[r"\BurstPlaces"] == said


def test_where_counter_and_ablation_disagree_the_paper_says_so():
    results = synthetic.shared() / "results"
    evidence = load(results, synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    found = numbers.numbers(evidence)
    assert "disagree: the counter says refuted" in found[r"\AgreementSync"]
    assert found[r"\AgreementLaunch"] == (
        "The ablation does not say one thing: refuted by eager latency (gate); supported by GPU"
        " time (gate)."
    )
    gains = [
        row
        for h, _, row in tables.judged(evidence)
        if (h.constraint, h.role) == ("launch", "ablation")
    ]
    for row in gains:
        row["verdict"] = "REFUTED"
    assert numbers.agreement(evidence, "launch").startswith(
        "Counter and ablation agree: both say refuted"
    )
    for row in evidence.verdicts:
        row["verdict"] = "INCONCLUSIVE"
    assert "cannot be set against each other" in numbers.agreement(evidence, "sync")


def test_a_verdict_that_differs_between_suites_names_them(evidence, monkeypatch):
    assert numbers.numbers(evidence)[r"\VerdictBranching"] == "refuted"
    parts = "PARTLY: REFUTED in grid/causal, INCONCLUSIVE in gate"
    rows = [dict(row) for row in evidence.verdicts]
    for row in rows:
        if (row["constraint"], row["suite"]) == ("branching", "(all)"):
            row["verdict"] = parts
    monkeypatch.setattr(evidence, "verdicts", rows)
    found = numbers.numbers(evidence)[r"\VerdictBranching"]
    assert found == "refuted in grid/causal, inconclusive in gate"


def test_counters_are_medians_over_the_grid_or_over_what_was_profiled(evidence, monkeypatch):
    def put(values):
        for problem, value in values.items():
            for suite in evidence.problems[problem].suites:
                key = (suite, problem, "fa3", "tensor_pipe", "-")
                if key in kept:
                    kept[key] = {"value": value}

    kept = dict(evidence._metrics)
    monkeypatch.setattr(evidence, "_metrics", kept)
    grid = [p.id for p in evidence.suite("grid")]
    put({name: float(n) for n, name in enumerate(grid)})
    found = numbers.numbers(evidence)
    assert found[r"\FaThreeTensorPipe"] == "11.5"  # between the two in the middle
    assert found[r"\CounterProblems"] == "the 24 problems of the grid"
    assert "all 24 problems of the grid and all 7 of the gate" in found[r"\CounterSentence"]

    for key in [k for k in kept if k[0] in ("grid", "gate") and k[3] in metrics.BY_ID]:
        del kept[key]
    profiled = [p.id for p in evidence.suite("profile")]
    put({name: 100.0 + n for n, name in enumerate(profiled)})
    monkeypatch.setattr(
        evidence, "_counted", {(s, p) for s, p, _, m, _ in kept if m in metrics.BY_ID}
    )
    found = numbers.numbers(evidence)
    assert found[r"\FaThreeTensorPipe"] == "104.0"
    assert found[r"\CounterProblems"] == "the 9 problems of the suite profile"
    assert "suite profile for the grid and the gate" in found[r"\CounterSentence"]


def test_the_gain_of_the_launch_is_a_latency_against_the_stage_before(evidence, monkeypatch):
    found = numbers.numbers(evidence)
    assert (
        found[r"\StageThreeEagerGain"].startswith("1.2") and "[" in found[r"\StageThreeEagerGain"]
    )
    assert (found[r"\ClaimLaunchGain"], found[r"\ClaimLaunchGainGpu"]) == ("1.67", "1.10")
    kept = {key: value for key, value in evidence._metrics.items() if key[3] != "eager_gain"}
    monkeypatch.setattr(evidence, "_metrics", kept)
    assert numbers.numbers(evidence)[r"\StageThreeEagerGain"] == numbers.MISSING


def test_names_of_macros():
    assert numbers.macro("stage5", "gate ratio") == r"\StageFiveGateRatio"
    assert numbers.macro("top over", "fa3", "median", "spaced") == r"\TopOverFaThreeMedianSpaced"


def test_what_was_not_measured_says_so():
    assert numbers.text(None, 2) == numbers.MISSING
    assert numbers.with_interval(None, 2) == numbers.MISSING
    assert numbers.with_interval(Value(1.5, 1.4, 1.6), 1) == "1.5 [1.4, 1.6]"


def test_no_measured_number_is_typed():
    """Ratios, TFLOPS and shares with decimals are macros; what is left are the plan's numbers."""
    body = MAIN.read_text().split(r"\begin{abstract}")[1]
    body = re.sub(r"\\(?:begin|end|vspace|setlength|includegraphics)[^\n]*", "", body)
    typed = set(re.findall(r"(?<![\w.])\d+\.\d+(?!\w)", body))
    assert typed <= {"1.1", "1.3"}, typed
    assert re.findall(r"(?<![\w.])\d+\.\d+", "it runs at 1.16 of FA3") == ["1.16"]


def test_every_citation_is_in_the_bibliography():
    keys = set(re.findall(r"^@\w+\{([^,]+),", REFS.read_text(), re.MULTILINE))
    cited = {
        key.strip()
        for group in re.findall(r"\\cite[tp]?\{([^}]+)\}", MAIN.read_text())
        for key in group.split(",")
    }
    assert cited and cited <= keys


def test_everything_that_is_included_is_generated():
    text = MAIN.read_text()
    assert set(re.findall(r"\\tab\{(\w+)\}", text)) == set(tables.TABLES)
    assert set(re.findall(r"\\fig\{(\w+)\}", text)) == set(figures.FIGURES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("latexmk") is None, reason="latexmk is not installed")
def test_the_paper_compiles_to_the_same_bytes(evidence, tmp_path):
    paper = tmp_path / "paper"
    generated = paper / "generated"
    generated.mkdir(parents=True)
    shutil.copy(MAIN, paper)
    shutil.copy(REFS, paper)
    for name, build in tables.TABLES.items():
        (generated / f"{name}.tex").write_text(tables.latex(build(evidence), evidence.stamp))
    (generated / "stages.tex").write_text(tables.stages(evidence))
    (generated / "numbers.tex").write_text(numbers.render(numbers.numbers(evidence)))
    for name, draw in figures.FIGURES.items():
        figures.save(draw(evidence), generated / f"{name}.pdf")
    made = []
    for n in (1, 2):
        command = ["latexmk", "-cd", "-pdf", "-interaction=nonstopmode", "-halt-on-error"]
        run = subprocess.run(
            [*command, f"-outdir=../out{n}", "paper/main.tex"],
            cwd=tmp_path,
            env={**os.environ, "SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1"},
            capture_output=True,
            text=True,
        )
        log = tmp_path / f"out{n}" / "main.log"
        assert run.returncode == 0, log.read_text(errors="replace")[-3000:]
        assert "undefined" not in log.read_text(errors="replace").lower()
        made.append((tmp_path / f"out{n}" / "main.pdf").read_bytes())
    assert made[0] == made[1]
