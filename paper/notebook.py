"""Execute a stripped notebook, so that the same results give the same bytes.

python -m paper.notebook notebooks/explore.ipynb --out results/explore.ipynb
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient

from attn_profiling.record import write_text


def execute(notebook: Path, out: Path, folder: Path) -> None:
    """Run every cell in `folder` and write the executed notebook, or nothing where a cell fails."""
    found = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        found,
        kernel_name="python3",
        record_timing=False,
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    found.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    write_text(out, nbformat.writes(found) + "\n")


def main(notebook: Path, out: Annotated[Path, typer.Option("--out")]) -> None:
    """Run a notebook from the root of the checkout."""
    execute(notebook, out, Path.cwd())


if __name__ == "__main__":
    typer.run(main)
