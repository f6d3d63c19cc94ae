"""Progress of long work: a bar in a terminal, lines in a log. Stages take it as an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what was done last)."""


def report_nothing(_done: int, _total: int, _message: str) -> None:
    """Ignore progress: the default of every stage function."""


def counting(report: Report, num_steps: int) -> Callable[[str], None]:
    """Return what to call with the name of each step that is done."""
    done = 0

    def finished(name: str) -> None:
        nonlocal done
        done += 1
        report(done, num_steps, name)

    return finished


@contextmanager
def progress_bar(title: str, console: Console | None = None) -> Iterator[Report]:
    """Yield a report that draws one bar in the terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def report(done: int, total: int, message: str) -> None:
            progress.update(
                task, completed=done, total=total, description=f"{title} {message}".rstrip()
            )

        yield report


def log_report(title: str, log: Callable[[str], None], lines: int = 10) -> Report:
    """Return a report that writes about `lines` lines to a log, the first and the last included."""
    last_line = -1

    def report(done: int, total: int, message: str) -> None:
        nonlocal last_line
        line = done * lines // max(total, 1)
        if line != last_line or done == total:
            last_line = line
            log(f"{title}: {done:,} of {total:,} {message}".rstrip())

    return report
