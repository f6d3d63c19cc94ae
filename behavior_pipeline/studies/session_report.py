"""The comparison of sessions for people: a table in the terminal, Markdown, a picture."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from behavior_pipeline.downstream.plots import LIGHT, STYLE
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import writing_file
from behavior_pipeline.studies.session_figures import QUANTILES, Agreement, SessionStudy

BEGIN: Final = "<!-- measured by `behavior-pipeline study sessions`: begin -->"
END: Final = "<!-- measured: end -->"

COLUMNS: Final[dict[str, Callable[[Agreement], str]]] = {
    "gap, min": lambda agreement: str(agreement.gap_minutes),
    "our sessions": lambda agreement: f"{agreement.num_ours:,}",
    "ARI": lambda agreement: f"{agreement.adjusted_rand_index:.4f}",
    "theirs exact": lambda agreement: f"{agreement.share_of_theirs:.4f}",
    "ours exact": lambda agreement: f"{agreement.share_of_ours:.4f}",
    "events split": lambda agreement: f"{agreement.share_split:.4f}",
    "events merged": lambda agreement: f"{agreement.share_merged:.4f}",
    "gaps cut": lambda agreement: f"{agreement.num_cut_gaps:,}",
    "ends missed": lambda agreement: f"{agreement.num_missed_boundaries:,}",
}

LINES: Final[tuple[tuple[str, str, str, Callable[[Agreement], float]], ...]] = (
    ("adjusted Rand index", "embedding", "o", lambda row: row.adjusted_rand_index),
    ("theirs reproduced exactly", "rfm-embedding", "s", lambda row: row.share_of_theirs),
    ("ours that are one of theirs", "rfm", "^", lambda row: row.share_of_ours),
)
"""Name, color, marker and value of each line of the picture."""


def study_table(study: SessionStudy) -> Table:
    """Return one row per gap, the best by adjusted Rand index in green; fits 80 columns."""
    table = Table(
        title=f"{study.source}: our sessions and '{study.session_column}'",
        caption="\n".join(sentences(study)),
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in COLUMNS:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for agreement in study.agreements:
        cells = [write(agreement) for write in COLUMNS.values()]
        table.add_row(*cells, style="green" if agreement == study.best else None)
    return table


def study_markdown(study: SessionStudy, path: str, today: date | None = None) -> str:
    """Return the table as Markdown, the best row bold, with how it was measured.

    Args:
        study: what was measured.
        path: the raw events; their place on this machine is left out.
        today: the day of the measurement; UTC's where absent.
    """
    rows = [list(COLUMNS), ["---:"] * len(COLUMNS)]
    for agreement in study.agreements:
        mark = "**" if agreement == study.best else ""
        rows.append([f"{mark}{write(agreement)}{mark}" for write in COLUMNS.values()])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    day = today or datetime.now(UTC).date()
    measured = f"Measured on {day:%Y-%m-%d} with {os.cpu_count()} CPU cores:"
    listed = "\n".join(f"- {sentence}" for sentence in sentences(study))
    return f"{measured}\n\n```sh\n{_command(study, path)}\n```\n\n{table}\n\n{listed}"


def sentences(study: SessionStudy) -> list[str]:
    """Say what was compared and what their sessions look like."""
    theirs = study.theirs
    return [
        f"{study.num_read:,} rows read; left out: {_left_out(study)}.",
        (
            f"{study.num_events:,} events of {study.num_users:,} users compared, "
            f"in {study.agreements[0].num_theirs:,} sessions of theirs."
        ),
        (
            f"Of these sessions, {theirs.num_several_users:,} span several users and "
            f"{theirs.num_overlapping:,} begin before an earlier one of the same user has ended."
        ),
        (
            f"{theirs.num_gaps_inside:,} gaps inside their sessions; quantiles in minutes: "
            f"{_quantiles(theirs.minutes_inside)}."
        ),
        (
            f"{theirs.num_boundaries:,} gaps where their session changes; quantiles in minutes: "
            f"{_quantiles(theirs.minutes_between)}."
        ),
        (
            f"Best by ARI: {study.best.gap_minutes} minutes; "
            f"the preset has {study.preset_gap_seconds / 60:g}."
        ),
    ]


def update_document(target: Path, part: str) -> None:
    """Put a part between the two marker lines of a document; without a document, begin one.

    Raises:
        PipelineError: if the document lacks the marker lines, or cannot be written.
    """
    try:
        text = target.read_text(encoding="utf-8") if target.exists() else f"{BEGIN}\n{END}\n"
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise PipelineError(
                f"'{target}' has no place for the table.",
                f"Put two lines where it shall stand:\n{BEGIN}\n{END}",
            )
        with writing_file(target) as aside:
            aside.write_text(f"{before}{BEGIN}\n\n{part}\n\n{END}{after}", encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"'{target}' cannot be written: {error}.") from None


def draw_picture(study: SessionStudy, target: Path) -> None:
    """Draw agreement against the gap as a PNG in the light theme.

    Raises:
        PipelineError: if the picture cannot be written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 3.6), facecolor=LIGHT["surface"])
        FigureCanvasAgg(figure)
        _draw(figure.add_subplot(), study)
        try:
            with writing_file(target) as aside:
                figure.savefig(aside, format="png", dpi=130, metadata={"Software": None})
        except OSError as error:
            raise PipelineError(f"'{target}' cannot be written: {error}.") from None


def _draw(axes: Axes, study: SessionStudy) -> None:
    """Draw one line per measure and the preset's gap."""
    gaps = [agreement.gap_minutes for agreement in study.agreements]
    for label, color, marker, value in LINES:
        values = [value(agreement) for agreement in study.agreements]
        axes.plot(gaps, values, color=LIGHT[color], marker=marker, ms=4.5, lw=1.7, label=label)
    chosen = study.preset_gap_seconds / 60
    style = (0, (4, 3))
    axes.axvline(chosen, color=LIGHT["muted"], lw=1, ls=style, label=f"preset: {chosen:g} minutes")
    axes.set_xlabel("session gap, minutes", color=LIGHT["muted"])
    axes.set_ylabel("agreement (1 is perfect)", color=LIGHT["muted"])
    title = f"Our sessions against {study.session_column} of {study.source}"
    axes.set_title(title, color=LIGHT["ink"])
    axes.tick_params(colors=LIGHT["muted"], length=0, labelsize=8.5)
    axes.grid(axis="y", color=LIGHT["line"], lw=0.6)
    for spine in axes.spines.values():
        spine.set_color(LIGHT["line"])
    axes.legend(labelcolor=LIGHT["ink"], fontsize=8.5, loc="lower right")


def _command(study: SessionStudy, path: str) -> str:
    """Return the command that measures it again."""
    gaps = ",".join(str(agreement.gap_minutes) for agreement in study.agreements)
    options = ("--source", study.source, "--path", Path(path).name)
    column = ("--session-column", study.session_column)
    line = shlex.join(("behavior-pipeline", "study", "sessions", *options))
    return f"{line} \\\n    {shlex.join((*column, '--gaps', gaps))}"


def _left_out(study: SessionStudy) -> str:
    """Count the rows that were not compared, by reason."""
    left_out = [f"{count:,} ({reason})" for reason, count in study.reasons.items()]
    left_out += [f"{study.num_repeated:,} (repeated)"] if study.num_repeated else []
    without = study.num_without_session
    left_out += [f"{without:,} ('{study.session_column}' is empty)"] if without else []
    return ", ".join(left_out) or "none"


def _quantiles(minutes: tuple[float, ...]) -> str:
    """Write quantiles with their order in percent."""
    pairs = zip(QUANTILES, minutes, strict=bool(minutes))
    return ", ".join(f"{value:,.1f} ({order:.0%})" for order, value in pairs) or "none"
