"""What a run shows in a terminal: one line per finished step, a bar under the step at work."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Terminal:
    """A live view of a run that executes in this process."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("[cyan]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.console = console
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("starting", total=None)

    def show_step(self, name: str) -> None:
        """Turn the bar to the step that has begun."""
        self.progress.reset(self.task, total=None, description=name)

    def update(self, title: str, done: int, total: int, message: str) -> None:
        """Move the bar."""
        self.progress.update(
            self.task, completed=done, total=total, description=f"{title} {message}".rstrip()
        )

    def finish_step(self, name: str, seconds: float, figures: str) -> None:
        """Print the line of a step that has ended well."""
        line = f"[green]✓[/] {name:<24} {seconds:6.1f} s  [dim]{figures}[/]"
        self.console.print(line, highlight=False, no_wrap=True, overflow="ellipsis", crop=False)

    def show_failed_check(self, name: str, found: str, *, is_blocking: bool) -> None:
        """Print the line of a check that did not pass."""
        mark = "[red]✗ held back by" if is_blocking else "[yellow]! check"
        text = f"{mark}[/] {name}  [dim]{escape(found)}[/]"
        self.console.print(text, highlight=False, soft_wrap=True)


_active: Terminal | None = None


def set_active(terminal: Terminal | None) -> None:
    """Name the terminal that runs of this process show their progress in."""
    global _active  # noqa: PLW0603 - one terminal per process, as there is one standard output
    _active = terminal


def active() -> Terminal | None:
    """Return the terminal that this process shows its progress in, if any."""
    return _active
