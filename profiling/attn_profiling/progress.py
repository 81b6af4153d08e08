"""Progress on standard error: done, of how many, time passed and estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of `total` steps; calling what it yields takes one step and names it.

    Where standard error is no terminal, a line is printed at each tenth.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[step]}"),
        console=console,
        disable=not console.is_terminal,
    )
    done = 0
    with bar:
        task = bar.add_task(title, total=total, step="")

        def step(name: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, advance=1, step=name)
            if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                console.print(f"{title}: {done}/{total} ({name})", highlight=False)

        yield step
