"""What older records lack is read where it is there, and missing where it is not."""

import json
from types import SimpleNamespace

import pytest
import synthetic

from attn_profiling import record, tidy

UNIT = ("unit_reference_error", "unit_bound", "unit_share")


@pytest.fixture
def run(tmp_path):
    maker = synthetic.Maker(tmp_path / "run")
    maker.device()
    maker.check("smoke")
    maker.host("smoke")

    def edited(name, kind, change):
        path = maker.folder / name
        data = json.loads(path.read_text())
        change(data)
        record.write(path, data, kind)

    def rows(*metrics):
        found = tidy.tidy(maker.folder, "replay", synthetic.PROBLEMS).metrics
        return [row for row in found if row["metric"] in metrics]

    return SimpleNamespace(edited=edited, rows=rows)


def test_the_bound_at_unit_scale(run):
    found = {row["metric"]: row["value"] for row in run.rows(*UNIT)}
    assert found == {"unit_reference_error": 0.0021, "unit_bound": 0.0043, "unit_share": 0.45}

    def older(data):
        for row in data["results"]:
            for name in UNIT:
                del row[name]

    run.edited("check/smoke.json", "check", older)
    assert run.rows(*UNIT) == [] and run.rows("unit_error")


def test_the_attempts_of_host_costs(run):
    """The samples of earlier ones do not count."""
    before = run.rows("eager_host_us", "aa_eager_host_us", "host_over_fa3")
    assert run.rows("attempts") == []

    def again(data):
        entry = next(e for e in data["problems"] if "fa3#2" in e["samples"])
        off = json.loads(json.dumps(entry["samples"]))
        off["fa3#2"]["eager_host_us"] = [
            [1.42 * us for us in p] for p in off["fa3#2"]["eager_host_us"]
        ]
        entry["earlier"] = [off, off]

    run.edited("host/smoke.json", "host", again)
    (row,) = run.rows("attempts")
    assert (row["subject"], row["regime"], row["value"]) == ("fa3", "-", 3)
    assert run.rows("eager_host_us", "aa_eager_host_us", "host_over_fa3") == before
