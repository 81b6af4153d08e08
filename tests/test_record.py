"""Raw files: checked when read, whole when written, stale when their source changed."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import synthetic

from attn_ladder.problem import read_problems
from attn_profiling import record, sources
from attn_profiling.record import RecordError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    maker = synthetic.Maker(tmp_path_factory.mktemp("made"))
    maker.device()
    maker.check("smoke")
    maker.timing("smoke", "spaced")
    maker.timing("smoke", "sustained")
    maker.host("smoke")
    maker.ncu("smoke")
    maker.decode("smoke_decode")
    maker.model()
    return maker.folder


@pytest.fixture
def maker(made, tmp_path):
    """A copy of the run to break."""
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    return SimpleNamespace(folder=folder)


FILES = {
    "device": "device.json",
    "check": "check/smoke.json",
    "timing": "timing/smoke.sustained.json",
    "host": "host/smoke.json",
    "ncu": "ncu/smoke.json",
    "decode": "serving/smoke_decode.json",
    "model": "serving/model.json",
}


@pytest.mark.parametrize("kind", record.KINDS)
def test_each_kind_is_read_back(maker, kind):
    data = record.read(maker.folder / FILES[kind], kind)
    assert data["schema"] == f"attn-ladder/{kind}/1"


@pytest.mark.parametrize("kind", record.KINDS)
def test_an_unknown_field_is_named(maker, kind):
    path = maker.folder / FILES[kind]
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "surprise": 1}))
    with pytest.raises(RecordError, match=rf"{path.name}: .*'surprise' was unexpected"):
        record.read(path, kind)


def edited(maker, kind, edit):
    path = maker.folder / FILES[kind]
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("device", lambda d: d["content"].pop("driver"), "content: 'driver' is a required"),
        ("device", lambda d: d["properties"].update(sms="132"), "properties/sms: '132' is not"),
        ("check", lambda d: d["results"][0].update(status="fine"), "results/0/status"),
        (
            "timing",
            lambda d: next(iter(d["problems"][1]["attempts"][0]["samples"].values()))[
                "gpu_us"
            ].__setitem__(0, [-1.0]),
            "problems/1/attempts/0/samples/.*/gpu_us/0/0: -1.0 is not positive",
        ),
        (
            "timing",
            lambda d: next(iter(d["problems"][0]["attempts"][0]["samples"].values()))[
                "clock_mhz"
            ].__setitem__(1, [1755.0, float("nan")]),
            "problems/0/attempts/0/samples/.*/clock_mhz/1/1: nan is not a finite number",
        ),
        ("timing", lambda d: d.update(regime="hot"), "regime: 'hot' is not one of"),
        ("host", lambda d: d["problems"][0].pop("samples"), "problems/0: 'samples' is a required"),
        ("ncu", lambda d: d["reports"][0].update(file="/etc/x"), "reports/0/file"),
        ("ncu", lambda d: d["provenance"]["before"].update(power="x"), "provenance/before"),
        (
            "decode",
            lambda d: d["problems"][0]["attempts"][0]["samples"]["decode"]["gpu_us"][1].clear(),
            "problems/0/attempts/0/samples/decode/gpu_us/1: no sample",
        ),
        ("decode", lambda d: d["problems"][0]["problem"].update(batch="1"), "problems/0/problem"),
        ("decode", lambda d: d["problems"][1]["problem"].pop("dtype"), "problems/1/problem"),
        ("decode", lambda d: d["checks"][0].update(ok="yes"), "checks/0/ok"),
        ("model", lambda d: d["token_agreement"][1].pop("margin"), "token_agreement/1"),
        ("model", lambda d: d["token_agreement"][0].pop("agree"), "token_agreement/0"),
        ("model", lambda d: d["speed"][0].pop("seconds"), "speed/0"),
        ("model", lambda d: d["model"].update(sha256="abc"), "model/sha256"),
    ],
)
def test_a_wrong_field_is_named(maker, kind, edit, message):
    path = edited(maker, kind, edit)
    with pytest.raises(RecordError, match=f"{path.name}: at {message}"):
        record.read(path, kind)


def test_missing_truncated_and_foreign_files_say_what_to_do(maker):
    absent = maker.folder / "timing" / "grid.spaced.json"
    with pytest.raises(RecordError, match="no such file; `attn-profiling time` writes it"):
        record.read(absent, "timing")
    path = maker.folder / FILES["host"]
    path.write_text(path.read_text()[:1000])
    with pytest.raises(RecordError, match=r"not valid JSON at line 1 .*cut off"):
        record.read(path, "host")
    with pytest.raises(RecordError, match="schema='attn-ladder/check/1', expected 'attn-ladder/d"):
        record.read(maker.folder / FILES["check"], "device")
    with pytest.raises(RecordError, match="schema='attn-ladder/model/1', expected .*decode/1"):
        record.read(maker.folder / FILES["model"], "decode")
    with pytest.raises(RecordError, match="no such file; `attn-profiling serving` writes it"):
        record.read(maker.folder / "serving" / "decode.json", "decode")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not a text file"):
        record.read(path, "host")


def test_what_does_not_pass_its_schema_is_not_written(maker):
    path = maker.folder / FILES["device"]
    before = path.read_bytes()
    with pytest.raises(RecordError):
        record.write(path, {**json.loads(before), "device": "H100!"}, "device")
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_no_other(maker, monkeypatch):
    path = maker.folder / FILES["device"]
    before = path.read_bytes()
    monkeypatch.setattr(record.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        record.write(path, json.loads(before), "device")
    assert path.read_bytes() == before
    assert [p.name for p in maker.folder.glob(".*")] == []


def test_a_changed_kernel_is_stale(maker):
    data = record.read(maker.folder / FILES["timing"], "timing")
    assert record.stale(data, "stage1") is None
    assert record.stale(data, "fa3#2") is None
    data["subjects"]["stage1"]["kernel_hash"] = "0" * 16
    sentence = record.stale(data, "stage1")
    assert sentence.startswith(f"stage1 was recorded at commit {'5' * 12} with kernel hash 0000")
    assert "is not in the record" in record.stale(data, "nobody")
    data["subjects"]["gone"] = data["subjects"]["stage1"]
    assert "has no source here" in record.stale(data, "gone")


def test_a_changed_entry_is_stale_where_it_was_recorded(maker):
    data = record.read(maker.folder / FILES["host"], "host")
    assert record.stale(data, "stage5") is None
    data["subjects"]["stage5"]["entry_hash"] = "0" * 16
    assert "through an entry with hash 0000" in record.stale(data, "stage5")
    del data["subjects"]["stage5"]["entry_hash"]  # as in older records
    record.validate(data, "host", "a file")
    assert record.stale(data, "stage5") is None


def test_the_hash_of_an_entry_sees_what_runs_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.stage, "PACKAGE", tmp_path)
    file = tmp_path / sources.ENTRIES["stage5"]

    def hashed(text):
        file.write_text(text)
        sources.entry_hash.cache_clear()
        return sources.entry_hash("stage5")

    try:
        before = hashed("import other\ndef attention(q):\n    return q\n")
        same = hashed('import other\ndef attention(q):\n    """Why."""\n    return q  # so\n')
        assert same == before != hashed("import other\ndef attention(q):\n    return 2 * q\n")
    finally:
        sources.entry_hash.cache_clear()
    assert sources.entry_hash("stage1") is None


def test_a_changed_problem_is_stale_but_not_for_its_suites(maker):
    known = read_problems(synthetic.PROBLEMS)
    data = record.read(maker.folder / FILES["check"], "check")
    row = data["results"][0]["problem"]
    assert record.stale_problem(data, row, known) is None
    more = {**known, row["id"]: replace(known[row["id"]], suites=("smoke", "another"))}
    assert record.stale_problem(data, row, more) is None
    other = {**known, row["id"]: replace(known[row["id"]], batch=7)}
    assert "with other values of batch" in record.stale_problem(data, row, other)
    assert "is not in the table" in record.stale_problem(data, row, {})


def test_the_content_key_follows_what_identifies_a_measurement():
    content = {"gpu": "H100", "driver": "580", "measuring": {"rounds": 30}}
    problem = {"id": "a", "suites": ["x"], "batch": 1}
    key = record.content_key(content, problem, {"fa3": "h"})
    assert key == record.content_key(content, {**problem, "suites": ["y"]}, {"fa3": "h"})
    for other in (
        ({**content, "driver": "581"}, problem, {"fa3": "h"}),
        ({**content, "measuring": {"rounds": 3}}, problem, {"fa3": "h"}),
        (content, {**problem, "batch": 2}, {"fa3": "h"}),
        (content, problem, {"fa3": "i"}),
    ):
        assert record.content_key(*other) != key


def test_the_hash_of_the_hypotheses_sees_data_not_comments(tmp_path):
    path = tmp_path / "constraints.yaml"
    assert record.constraints_sha256(path) is None
    path.write_text("a: 1\nb: [2, 3]\n")
    first = record.constraints_sha256(path)
    path.write_text("# why\nb: [2,3]\na:   1\n")
    assert record.constraints_sha256(path) == first
    path.write_text("a: 1.1\nb: [2, 3]\n")
    assert record.constraints_sha256(path) != first


def test_problems_survive_the_record():
    known = read_problems(synthetic.PROBLEMS)
    for problem in known.values():
        fields = json.loads(json.dumps(record.problem_fields(problem)))
        assert record.problem_of(fields) == problem


def test_settings_name_the_wrong_key(tmp_path):
    from attn_profiling import settings

    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="no such file; the workflow writes it"):
        settings.load(path, tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        settings.load(path, tmp_path)
    path.write_text(json.dumps({"measuring": {"round": 3}}))
    with pytest.raises(ValueError, match="measuring.round is unknown; known keys: aa_tolerance"):
        settings.load(path, tmp_path)
    path.write_text(json.dumps({"measuring": {"rounds": 0}}))
    with pytest.raises(ValueError, match="measuring.rounds=0 must be at least 1"):
        settings.load(path, tmp_path)
    path.write_text(json.dumps({"subjects": ["stage9"]}))
    with pytest.raises(ValueError, match="'stage9' is unknown"):
        settings.load(path, tmp_path)
    path.write_text(json.dumps({"subjects": ["stage1", "fa3"]}))
    chosen = settings.load(path, tmp_path)
    assert chosen.subjects_of("grid", "check") == ("stage1", "fa3")
    with pytest.raises(ValueError, match="'control' has no subject among stage1, fa3"):
        chosen.subjects_of("control", "check")


def test_a_header_has_all_its_fields(tmp_path, monkeypatch):
    from fake_gpu import fake_gpu

    from attn_profiling import settings
    from attn_profiling.session import Session

    monkeypatch.setenv("ATTN_LADDER_IMAGE_DIGEST", "sha256:" + "0" * 64)
    monkeypatch.setenv("ATTN_LADDER_ENGINE", "docker")
    (tmp_path / "config.json").write_text("{}")
    chosen = settings.load(tmp_path / "config.json", tmp_path)
    session = Session(chosen, ["stage1", "fa3"], fake_gpu())
    data = session.header("check", "smoke")
    record.validate({**data, "results": []}, "check", "test")
    assert data["provenance"]["engine"] == "docker"
    assert data["run"] == tmp_path.name
    assert data["subjects"]["stage1"]["version"] is None
    assert SimpleNamespace(**data["content"]).capability == [9, 0]
