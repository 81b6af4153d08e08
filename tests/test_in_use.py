"""What the paper says of decoding and of a model, from a synthetic run and from one without."""

import pytest
import synthetic

from attn_profiling import record
from paper import in_use, numbers, report, tables
from paper.evidence import load


@pytest.fixture(scope="module")
def evidence():
    results = synthetic.shared() / "results"
    return load(results, synthetic.PROBLEMS, synthetic.CONSTRAINTS)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A run whose configuration named no model, and none of decoding."""
    folder = tmp_path_factory.mktemp("without")
    maker = synthetic.Maker(folder / "raw")
    maker.device()
    maker.check("smoke")
    maker.timing("smoke", "spaced")
    maker.model(reason="not measured: no model named")
    synthetic.derive(folder / "raw", folder / "results")
    return load(folder / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)


def test_the_decode_table_has_every_shape_with_its_interval(evidence):
    table = in_use.decode(evidence)
    assert len(table.rows) == 23 + 3
    first = dict(zip(table.header, table.rows[0], strict=True))
    assert (first["batch"], first["heads"], first["keys"], first["MB"]) == (
        "1",
        "32/8",
        "512",
        "2.1",
    )
    assert first["over FA3"].startswith("1.2") and "[" in first["over FA3"]
    assert 0.97 < float(first["pages of 256"].split()[0]) < 0.99
    named = {row[1]: row[7] for row in table.rows[-3:]}
    assert named["median, under 64 MiB"].startswith("1.25")
    large = named["median, from 64 MiB"].split()[0]
    assert float(large) == pytest.approx(1.10, abs=0.005)
    assert named["least"].startswith("1.")
    assert "Checks before: 12 right, 0 wrong." in table.note
    assert "fastest for FA3 there in a short try; all else" in table.note


def test_a_record_that_tried_nothing_behind_the_flush_that_reads_says_so(evidence, monkeypatch):
    known = type(evidence).all_of

    def without(self, suite, metric, only=None):
        return {} if metric in lacking else known(self, suite, metric, only)

    monkeypatch.setattr(type(evidence), "all_of", without)
    lacking = ["tried_there"]
    note = in_use.decode(evidence).note
    assert "in a short try, and not measured again where the A/A pair was off; all else" in note
    lacking = ["tried_there", "chosen_there"]
    assert "with the same choice for FA3, and not measured again" in in_use.decode(evidence).note


def test_the_token_tables_have_cases_and_first_differences(evidence):
    rows = {tuple(row[:5]): row[5:] for row in in_use.tokens(evidence).rows}
    assert rows["bf16", "alone", "dynamic", "ours", "sdpa"] == ["3", "2", "1", "0"]
    assert rows["bf16", "alone", "dynamic", "sdpa", "eager"] == ["3", "2", "1", "0"]
    assert rows["fp16", "alone", "static", "ours", "eager"] == ["3", "3", "0", "0"]
    assert rows["bf16", "all", "", "ours", ""] == ["12", "11", "1", "0"]
    assert rows["all", "all", "", "ours", ""] == ["23", "22", "1", "0"]
    assert rows["all", "all", "", "sdpa", ""] == ["11", "10", "1", "0"]
    ours, sdpa = in_use.token_differences(evidence).rows
    figures = ["1", "2, 2", "2, 2", "0.15, 0.15", "0.5, 0.5", "1"]
    assert ours == ["bf16", "ours", "sdpa", *figures]
    assert sdpa == ["bf16", "sdpa", "eager", *figures]


def test_the_case_of_a_bounded_cache_keeps_its_comma():
    found = in_use._case("batch of the short, bounded, past, fp16, against eager", "attn_ladder")
    assert found == ["fp16", "batch of the short", "bounded, past", "ours", "eager"]


def test_the_speed_table_has_a_row_for_each_measurement(evidence):
    rows = {row[0]: row[1:] for row in in_use.serving_speed(evidence).rows}
    assert set(rows) == {"decode, graph, batch 1, after 1024", "prefill, batch 1",
                         "prefill, batch 8"}  # fmt: skip
    ours, sdpa, fa3, ratio = rows["prefill, batch 8"]
    assert ours.startswith("819200 [") and sdpa.startswith("655360 [")
    assert (fa3, ratio) == ("–", "1.25")
    assert "implementations in turn;" in in_use.serving_speed(evidence).note


def test_the_prose_has_its_numbers(evidence):
    found = numbers.numbers(evidence)
    assert found[r"\DecodeMeasured"] == found[r"\ModelMeasured"] == "1"
    assert found[r"\DecodeOverFaThreeSmall"].startswith("1.25")
    assert found[r"\DecodeCleanLarge"].startswith("1.15")
    assert found[r"\DecodeCleanLargeMeasured"] == "1"
    assert found[r"\DecodeChecksWrong"] == "0" and found[r"\TokenTies"] == "1"
    assert found[r"\TokensBfloatOursPercent"] == "91.7"
    assert found[r"\TokensHalfOursPercent"] == "100.0"
    assert found[r"\TokensBfloatReferencesPercent"] == "83.3"
    assert found[r"\TokenAgreementPercent"] == "95.7" and found[r"\TokenDifferences"] == "0"
    assert (found[r"\CacheMegabytes"], found[r"\ExpandedMegabytes"]) == ("377", "1132")
    assert int(found[r"\DecodeOfCopyLeast"]) > 80


def test_what_was_not_measured_says_so(without):
    found = numbers.numbers(without)
    assert found[r"\DecodeMeasured"] == found[r"\ModelMeasured"] == "0"
    assert found[r"\DecodeOverFaThreeSmall"] == found[r"\TokenPrompts"] == numbers.MISSING
    assert found[r"\DecodeCleanLargeMeasured"] == found[r"\DecodeCleanLeastMeasured"] == "0"
    for name in ("decode", "tokens", "token_differences", "serving_speed"):
        assert tables.TABLES[name](without).is_empty, name
        assert "not measured in this run" in tables.latex(tables.TABLES[name](without), "stamp")
    main = (synthetic.ROOT / "paper" / "main.tex").read_text()
    section = main.split(r"\section{In use}")[1].split(r"\section")[0]
    assert section.count("not measured in this run.") == 2


def test_where_decoding_is_stale_its_numbers_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "source_hash", lambda name: "0" * 16)
    maker = synthetic.Maker(tmp_path / "raw")
    maker.device()
    maker.decode("smoke_decode")
    synthetic.derive(tmp_path / "raw", tmp_path / "results")
    found = load(tmp_path / "results", synthetic.PROBLEMS, synthetic.CONSTRAINTS)
    assert numbers.numbers(found)[r"\DecodeMeasured"] == "0"
    assert in_use.decode(found).is_empty


def test_the_report_shows_them():
    shown = [name for _, names, _ in report.SECTIONS for name in names]
    assert set(shown) == set(tables.TABLES) and set(shown) <= set(report.TITLES)
