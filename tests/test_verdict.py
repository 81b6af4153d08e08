"""Verdicts: the claims are checked, the rules decide, and false verdicts are rare."""

import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic
import yaml

from attn_profiling import stats, verdict
from attn_profiling.stats import Interval
from attn_profiling.verdict import INCONCLUSIVE, REFUTED, SUPPORTED, Hypothesis

CLAIMS = yaml.safe_load(synthetic.CONSTRAINTS.read_text())
SCHEMA = synthetic.CONSTRAINTS.with_name("constraints.schema.json")


def written(tmp_path, claims):
    path = tmp_path / "constraints.yaml"
    path.write_text(yaml.safe_dump(claims, sort_keys=False))
    (tmp_path / SCHEMA.name).write_bytes(SCHEMA.read_bytes())
    return path


@pytest.fixture
def claims():
    return yaml.safe_load(synthetic.CONSTRAINTS.read_text())


def test_the_claims_are_read():
    found = verdict.read_constraints(synthetic.CONSTRAINTS)
    assert list(found.constraints) == ["branching", "launch", "sync", "memory"]
    assert len(found.sha256) == 64
    primary = [h.constraint for h in found.hypotheses if h.role == "primary"]
    assert sorted(primary) == sorted(found.constraints)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["hypotheses"][0].update(treshold=1), "hypotheses/0.*treshold"),
        (lambda c: c["hypotheses"][0].pop("falsifier"), "hypotheses/0.*falsifier"),
        (lambda c: c["hypotheses"][0].pop("at_least"), "hypotheses/0"),
        (lambda c: c["hypotheses"][0].update(at_most=9), "hypotheses/0"),
        (lambda c: c["hypotheses"][0].update(suites=[]), "hypotheses/0/suites"),
        (lambda c: c["hypotheses"][0].update(constraint="luck"), "constraint='luck' is unknown"),
        (lambda c: c["hypotheses"][1].update(id=c["hypotheses"][0]["id"]), "used twice"),
        (lambda c: c["hypotheses"][1].update(role="primary"), "has 2 primary hypotheses"),
        (lambda c: c["hypotheses"][0].update(role="witness"), "has 0 primary hypotheses"),
        (lambda c: c["constraints"]["sync"].pop("control"), "constraints/sync.*control"),
    ],
)
def test_wrong_claims_are_an_error_that_names_the_place(tmp_path, claims, change, said):
    verdict.read_constraints(written(tmp_path, claims))
    change(claims)
    with pytest.raises(verdict.ConstraintsError, match=said):
        verdict.read_constraints(written(tmp_path, claims))


def test_text_that_is_not_yaml_is_an_error(tmp_path):
    path = written(tmp_path, CLAIMS)
    path.write_text("constraints: [")
    with pytest.raises(verdict.ConstraintsError, match="not valid YAML"):
        verdict.read_constraints(path)


def test_the_hash_sees_claims_and_not_layout(tmp_path, claims):
    first = verdict.read_constraints(written(tmp_path, claims)).sha256
    path = written(tmp_path, claims)
    path.write_text("# a comment\n" + path.read_text())
    assert verdict.read_constraints(path).sha256 == first
    claims["hypotheses"][0]["at_least"] = 4.9
    assert verdict.read_constraints(written(tmp_path, claims)).sha256 != first


COUNTER = {"kind": "counter", "subject": "fa3", "metric": "inactive_threads"}


def claim(**changes):
    values = {
        "id": "x", "role": "primary", "claim": "a claim", "witness": COUNTER,
        "suites": ("profile",), "constraint": "branching", "at_least": 5, "smallest_effect": 1,
    }  # fmt: skip
    return Hypothesis(**{**values, **changes})


def found(low, high, processes=3, n=90):
    return Interval((low + high) / 2, low, high, max(processes - 1, 1), processes, n)


@pytest.mark.parametrize(
    ("hypothesis", "interval", "said"),
    [
        (claim(), found(5.1, 6), SUPPORTED),
        (claim(), found(4.9, 6), INCONCLUSIVE),
        (claim(), found(1, 3.9), REFUTED),
        (claim(), found(1, 4.5), INCONCLUSIVE),  # within the smallest effect of interest
        (claim(), None, INCONCLUSIVE),
        (claim(), found(5.1, 6, processes=2), INCONCLUSIVE),
        (claim(), found(5.1, 6, processes=1, n=2), INCONCLUSIVE),
        (claim(at_least=None, at_most=5), found(3, 4.9), SUPPORTED),
        (claim(at_least=None, at_most=5), found(6.1, 7), REFUTED),
        (claim(at_least=None, at_most=5), found(5.5, 7), INCONCLUSIVE),
        (claim(role="gate", smallest_effect=0), found(4, 7), SUPPORTED),
        (claim(role="gate", smallest_effect=0), found(3, 6), REFUTED),
        (claim(role="gate", smallest_effect=0), None, INCONCLUSIVE),
    ],
)
def test_rules(hypothesis, interval, said):
    assert verdict.decide(interval, hypothesis) == said


def test_the_noise_floor_widens_ratios():
    ratio = claim(at_least=1.02, smallest_effect=0.01, role="ablation")
    assert verdict.decide(found(1.025, 1.03), ratio) == SUPPORTED
    assert verdict.decide(found(1.025, 1.03), ratio, noise_floor=0.01) == INCONCLUSIVE


@pytest.mark.parametrize("between", [0.0, 0.004])
@pytest.mark.parametrize("truth", [1.05, 1.04])
def test_false_verdicts_are_rare(truth, between):
    """At the threshold nothing may be refuted, at its margin nothing supported; and at the edges
    themselves at most 5 % of the experiments err."""
    hypothesis = claim(role="ablation", at_least=1.05, smallest_effect=0.01)
    rng = np.random.default_rng(3)
    false = 0
    for _ in range(300):
        ours, peer = (
            [list(t * math.exp(between * rng.standard_normal())
                  * (1 + 0.003 * rng.standard_normal(30))) for _ in range(3)]
            for t in (100.0, 100.0 * truth)
        )  # fmt: skip
        said = verdict.decide(stats.ratio_interval(ours, peer), hypothesis)
        false += said == (REFUTED if truth == 1.05 else SUPPORTED)
    assert false / 300 <= 0.05


def tables(control=None, inactive=1.75, hash_is=None, suites=("profile",)):
    """Rows of metrics.csv with FA3's inactive threads on eight problems, and a control."""
    base = {"run": "r", "device": "d", "dtype": "bf16", "regime": "-", "unit": "%"}
    rows = [
        {**base, "suite": suite, "problem": f"p{n}", "subject": "fa3",
         "metric": "inactive_threads", "statistic": "value", "value": str(value + 0.01 * n)}
        for suite, value in zip(suites, np.broadcast_to(inactive, len(suites)), strict=True)
        for n in range(8)
    ]  # fmt: skip
    for dose, value in (control or {}).items():
        rows.append(
            {**base, "suite": "control", "problem": "c", "subject": f"control_branching.{dose}",
             "metric": "inactive_threads", "statistic": "value", "value": str(value)}
        )  # fmt: skip
    claims = verdict.read_constraints(synthetic.CONSTRAINTS)
    provenance = {
        "run": "r", "device": "d", "constraints_sha256": [hash_is or claims.sha256],
    }  # fmt: skip
    return claims, rows, provenance


RISING = {0: 0.2, 1: 5.0, 2: 9.0, 4: 14.0, 8: 22.0}


def branching(claims, rows, provenance, suite="profile"):
    judged = verdict.judge(claims, rows, [], provenance)
    return next(
        r for r in judged
        if (r["constraint"], r["metric"], r["suite"]) == ("branching", "inactive_threads", suite)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("control", "column", "said"),
    [
        (RISING, "passed", REFUTED),
        (None, "not measured", INCONCLUSIVE),
        ({0: 0.2, 1: 5.0}, "not measured", INCONCLUSIVE),
        ({**RISING, 2: 3.0}, "failed", INCONCLUSIVE),
        (dict.fromkeys(RISING, 1.0), "failed", INCONCLUSIVE),
    ],
)
def test_a_verdict_needs_its_control(control, column, said):
    row = branching(*tables(control))
    assert (row["control"], row["verdict"]) == (column, said)


def test_a_constraint_without_a_control_is_inconclusive():
    claims, rows, provenance = tables(RISING)
    none = {name: {**c, "control": None} for name, c in claims.constraints.items()}
    row = branching(replace(claims, constraints=none), rows, provenance)
    assert (row["control"], row["verdict"]) == ("none", INCONCLUSIVE)


@pytest.mark.parametrize(("inactive", "said"), [(1.75, REFUTED), (7.0, SUPPORTED)])
def test_a_claim_is_decided_by_what_was_found(inactive, said):
    claims, rows, provenance = tables(RISING, inactive)
    assert branching(claims, rows, provenance)["verdict"] == said
    assert branching(claims, rows, provenance, "(all)")["verdict"] == said


def test_other_claims_than_the_record_had_are_post_hoc():
    row = branching(*tables(RISING, hash_is="0" * 64))
    assert row["verdict"] == "REFUTED (post hoc)"


def test_suites_that_differ_make_it_partly():
    claims, rows, provenance = tables(RISING, (1.75, 7.0), suites=("profile", "grid"))
    hypotheses = tuple(
        replace(h, suites=("profile", "grid")) if h.id == "branching-divergence" else h
        for h in claims.hypotheses
    )
    row = branching(replace(claims, hypotheses=hypotheses), rows, provenance, "(all)")
    assert row["verdict"] == "PARTLY: REFUTED in profile, SUPPORTED in grid"
    assert row["effect"] == ""


def test_what_was_not_measured_is_blank_and_inconclusive():
    claims, _, provenance = tables()
    for row in verdict.judge(claims, [], [], provenance):
        assert (row["effect"], row["ci_low"], row["verdict"]) == ("", "", INCONCLUSIVE)


def test_the_whole_table_on_a_synthetic_run():
    rows = verdict.read_rows(synthetic.shared() / "results" / "verdicts.csv")
    assert list(rows[0]) == [
        "run", "device", "constraint", "suite", "regime", "subject", "metric", "effect", "ci_low",
        "ci_high", "threshold", "control", "verdict",
    ]  # fmt: skip
    claims = verdict.read_constraints(synthetic.CONSTRAINTS)
    assert len(rows) == sum(len(h.suites) for h in claims.hypotheses) + len(claims.constraints)
    by = {(r["suite"], r["subject"], r["metric"], r["threshold"]): r for r in rows}
    gate = by[("gate", "stage2", "speedup over fa3, gate-b16", "0.58")]
    assert float(gate["ci_low"]) <= 0.62 <= float(gate["ci_high"])
    assert gate["verdict"] == SUPPORTED and gate["control"] == "A/A"
    sync = by[("grid", "stage2", "speedup over stage1, (median)", "1.02")]
    assert sync["verdict"] == SUPPORTED
    assert {r["verdict"] for r in rows if r["suite"] == "(all)"} == {REFUTED}
