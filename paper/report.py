"""One self-contained HTML page of everything derived: tables, figures, what was left out.

python -m paper.report --results results --out results/report.html
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated

import jinja2
import typer
from markupsafe import Markup

from attn_profiling.record import write_text
from paper.evidence import Evidence, load
from paper.figures import FIGURES, note, save
from paper.tables import TABLES, verdict_rows

TEMPLATES = Path(__file__).parent / "templates"

SECTIONS = (
    ("The constraints", ("constraints", "verdicts"), ("branching", "launch", "sync", "memory",
                                                      "controls")),
    ("Speed", ("grid", "grid_stages", "grid_fp16", "grid256"), ("grid", "ratio")),
    ("The ladder and its gates", ("ladder", "foretold", "variants", "criteria"), ()),
    ("Which FA3 this is", ("which_fa3", "published", "locks"), ()),
    ("The model", ("prediction", "predictions", "roofline"), ("prediction",)),
    ("Counters", ("witnesses", "stalls"), ()),
    ("Calls, clocks and energy", ("host", "regimes"), ("two_clocks",)),
    ("In use", ("decode", "tokens", "token_differences", "serving_speed"), ()),
    ("Correctness, and what was left out", ("checks", "left_out"), ()),
    ("Measured again", ("replication",), ()),
)  # fmt: skip

TITLES = {
    "constraints": "The four constraints",
    "verdicts": "Every hypothesis about them",
    "grid": "The grid, bf16",
    "grid_fp16": "The grid, fp16",
    "grid256": "Headdim 256, bf16",
    "grid_stages": "Every stage on the grid",
    "ladder": "The ladder on the gate problem",
    "foretold": "What each stage foretold and what was found",
    "variants": "What a part is worth",
    "criteria": "Gates and success criteria",
    "which_fa3": "Peers and software",
    "locks": "Where the environment of the run is not that of the locks",
    "published": "FA3 as published and as measured here",
    "roofline": "What each resource needs at least, µs",
    "prediction": "Prediction and measurement",
    "predictions": "Every prediction, µs",
    "witnesses": "Witnesses on the gate problem",
    "stalls": "Where the warps are",
    "host": "Cost and latency of a call",
    "regimes": "Clock, power and energy",
    "decode": "Decoding beside FA3",
    "tokens": "Tokens of a model",
    "token_differences": "Where tokens differ",
    "serving_speed": "Tokens a second",
    "checks": "The green gate",
    "replication": "The recorded ratios in other runs",
    "left_out": "In the record, not in the tables",
    "ratio": "Speed over FA3",
    "two_clocks": "Two ways of timing: events minus activity records",
    "branching": "C1, branching",
    "launch": "C2, launch",
    "sync": "C3, synchronisation",
    "memory": "C4, memory",
    "controls": "Dose response of the witnesses",
}


def svg(evidence: Evidence, name: str) -> Markup:
    """A figure as inline SVG; its ids are made its own, since all share one page."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.svg"
        save(FIGURES[name](evidence), path)
        text = path.read_text()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    return Markup(text)


def render(evidence: Evidence) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    sections = [
        {
            "title": title,
            "tables": [(TITLES[name], TABLES[name](evidence)) for name in tables],
            "figures": [
                (TITLES[name], svg(evidence, name), note(evidence, name)) for name in figures
            ],
        }
        for title, tables, figures in SECTIONS
    ]
    provenance = evidence.provenance
    return environment.get_template("report.html.j2").render(
        stamp=evidence.stamp,
        provenance=provenance,
        content=provenance["content"],
        constraints=evidence.constraints.constraints,
        overall={r["constraint"]: r["verdict"] for r in evidence.verdicts if r["suite"] == "(all)"},
        sections=sections,
        primary=verdict_rows(evidence, ("primary",)),
    )


def main(
    out: Annotated[Path, typer.Option("--out")],
    results: Annotated[Path, typer.Option("--results")] = Path("results"),
    problems: Annotated[Path, typer.Option("--problems")] = Path("config/problems.tsv"),
    constraints: Annotated[Path, typer.Option("--constraints")] = Path("config/constraints.yaml"),
) -> None:
    """Write the report."""
    write_text(out, render(load(results, problems, constraints)))


if __name__ == "__main__":
    typer.run(main)
