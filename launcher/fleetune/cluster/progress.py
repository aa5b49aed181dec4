"""What a person sees of a run: a bar in a terminal, a plain line every logging step elsewhere."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

_STEP = re.compile(r"^step +(\d+)/(\d+) +(.*)$")


@contextlib.contextmanager
def shown() -> Iterator[Callable[[str], None]]:
    """Yields what takes rank 0's lines."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(highlight=False)
    if not console.is_terminal:
        yield lambda line: print(line, flush=True)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task: list[int] = []  # made at the first step, so that preparing shows no empty bar

        def watch(line: str) -> None:
            match = _STEP.match(line)
            if match is None:
                console.print(line, markup=False)
                return
            if not task:
                task.append(bar.add_task("", total=int(match[2])))
            bar.update(task[0], completed=int(match[1]), description=match[3])  # type: ignore[arg-type]

        yield watch
