"""A run becomes the recorded one whole, or nothing changes."""

import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path

import pytest
import synthetic

from attn_profiling import promote, record, tidy
from attn_profiling.promote import NotPromoted

CONFIG = {
    "suites": {
        "check": ["smoke"],
        "time": {"spaced": ["smoke"], "sustained": ["smoke"]},
        "host": ["smoke"],
        "profile": ["smoke"],
    }
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    maker = synthetic.Maker(tmp_path_factory.mktemp("made"))
    maker.device()
    maker.check("smoke")
    maker.timing("smoke", "spaced")
    maker.timing("smoke", "sustained")
    maker.host("smoke")
    maker.ncu("smoke")
    (maker.folder / "config.json").write_text(json.dumps(CONFIG))
    (maker.folder / "timing" / ".partial").mkdir()
    (maker.folder / "timing" / ".partial" / "left").touch()
    (maker.folder / "logs").mkdir()
    (maker.folder / "logs" / "x.log").touch()
    return maker.folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run to break."""
    return Path(shutil.copytree(made, tmp_path / "runs" / "one"))


@pytest.fixture
def recorded(tmp_path):
    folder = tmp_path / "measurements" / "h100-sxm-80gb"
    (folder / "timing").mkdir(parents=True)
    (folder / "timing" / "old.spaced.json").write_text("old")
    return folder


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_complete_run_replaces_what_was_recorded(run, recorded):
    target, total = promote.promote(run, recorded)
    assert target == recorded
    files = tree(recorded)
    assert "timing/old.spaced.json" not in files and "logs/x.log" not in files
    assert not [name for name in files if ".partial" in name or name.endswith(".ncu-rep")]
    assert total == sum((recorded / name).stat().st_size for name in files)
    index = record.read(recorded / "ncu" / "smoke.json", "ncu")
    for entry in index["reports"]:
        packed = recorded / (entry["file"] + ".xz")
        assert lzma.decompress(packed.read_bytes()) == (run / entry["file"]).read_bytes()
    assert [p.name for p in recorded.parent.iterdir()] == ["h100-sxm-80gb"]


def test_a_run_of_fewer_suites_is_promoted_without_what_it_does_not_name(run, recorded):
    """What the last invocation asked for is the run; files of a wider one before it stay behind."""
    narrow = json.loads(json.dumps(CONFIG))
    narrow["suites"] |= {"time": {"spaced": ["smoke"], "sustained": []}, "profile": []}
    (run / "config.json").write_text(json.dumps(narrow))
    (run / "host" / "smoke.json").write_text("broken")
    refused(run, recorded, "host/smoke.json: not valid JSON")
    narrow["suites"]["host"] = []
    (run / "config.json").write_text(json.dumps(narrow))
    promote.promote(run, recorded)
    held = ["check/smoke.json", "config.json", "device.json", "timing/smoke.spaced.json"]
    assert tree(recorded) == held
    tables = tidy.tidy(recorded, "replay", synthetic.PROBLEMS)
    assert tables.provenance["suites"] == [("check", "smoke"), ("device", ""), ("timing", "smoke")]
    assert tables.provenance["stale"] == [] and tables.speedups


def test_the_place_follows_from_the_device(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target, _ = promote.promote(run)
    assert str(target) == "measurements/h100-sxm-80gb"


def refused(run, recorded, message, **more):
    with pytest.raises(NotPromoted, match=message) as error:
        promote.promote(run, recorded, **more)
    assert tree(recorded) == ["timing/old.spaced.json"]
    assert [p.name for p in recorded.parent.iterdir()] == ["h100-sxm-80gb"]
    return str(error.value)


def test_everything_that_is_missing_is_listed(run, recorded):
    (run / "host" / "smoke.json").unlink()
    (run / "timing" / "smoke.sustained.json").write_text('{"schema": ')
    text = refused(run, recorded, "is not complete")
    assert "host/smoke.json: no such file; `attn-profiling host` writes it" in text
    assert "timing/smoke.sustained.json: not valid JSON" in text
    assert "--config run=one" in text


def test_missing_and_foreign_reports_are_listed(run, recorded):
    reports = sorted((run / "ncu" / "smoke").glob("*.ncu-rep"))
    reports[0].unlink()
    reports[1].write_bytes(b"something else")
    text = refused(run, recorded, "no such report")
    assert "its sha256 is not the recorded one" in text


def share_a_report(run):
    """All problems in one report, as one process of ncu leaves it."""
    index = run / "ncu" / "smoke.json"
    entries = json.loads(index.read_text())["reports"]
    paths = [run / entry["file"] for entry in entries]
    data = synthetic.joined([path.read_bytes() for path in paths])
    for path in paths:
        path.unlink()
    shared = "ncu/smoke/shared-0123.ncu-rep"
    (run / shared).write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    edit(index, lambda d: [e.update(file=shared, sha256=sha256) for e in d["reports"]])
    return run / shared


def test_a_report_of_several_problems_is_packed_once(run, recorded):
    shared = share_a_report(run)
    data = shared.read_bytes()
    shared.write_bytes(data + b" ")
    assert "its sha256 is not the recorded one" in refused(run, recorded, "not complete")
    shared.write_bytes(data)
    told = []
    promote.promote(run, recorded, tell=told.append)
    assert told.count("ncu/smoke/shared-0123.ncu-rep") == 1
    assert [p.name for p in (recorded / "ncu" / "smoke").iterdir()] == ["shared-0123.ncu-rep.xz"]


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_two_machines_do_not_make_one_run(run, recorded):
    edit(run / "host" / "smoke.json", lambda d: d["content"].update(driver="999"))
    refused(run, recorded, "host/smoke.json: driver='999', but device.json has '580.0'")


def test_two_boards_do_not_make_one_run(run, recorded):
    edit(run / "ncu" / "smoke.json", lambda d: d["provenance"].update(gpu_uuid="GPU-2"))
    refused(run, recorded, "gpu_uuid='GPU-2'")


def test_a_kernel_that_changed_within_the_run_is_seen(run, recorded):
    edit(
        run / "timing" / "smoke.spaced.json",
        lambda d: d["subjects"]["stage1"].update(kernel_hash="0" * 16),
    )
    refused(run, recorded, "its kernel changed within the run")


def test_too_large_a_run_is_refused(run, recorded):
    refused(run, recorded, r"more than 0.0 MB; .* Largest: ", limit_bytes=1000)


def test_a_folder_that_is_no_run_is_refused(tmp_path, recorded):
    refused(tmp_path / "nowhere", recorded, "no config.json, so this is no run")


@pytest.mark.parametrize("step", ["_copy", "pack"])
def test_a_failure_half_way_changes_nothing(run, recorded, monkeypatch, step):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(promote, step, full)
    with pytest.raises(OSError, match="No space left"):
        promote.promote(run, recorded)
    assert tree(recorded) == ["timing/old.spaced.json"]
    assert [p.name for p in recorded.parent.iterdir()] == ["h100-sxm-80gb"]


def test_a_failed_swap_puts_the_old_one_back(run, recorded, monkeypatch):
    rename = os.rename
    count = iter(range(9))

    def second_fails(a, b):
        if next(count) == 1:
            raise OSError("busy")
        rename(a, b)

    monkeypatch.setattr(promote.os, "rename", second_fails)
    with pytest.raises(OSError, match="busy"):
        promote.promote(run, recorded)
    assert tree(recorded) == ["timing/old.spaced.json"]
