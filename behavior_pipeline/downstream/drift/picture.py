"""The history of drift as small multiples: each figure, its alarm limits, alarms, retrainings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime
from math import ceil
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from numpy.typing import NDArray

from behavior_pipeline.downstream.drift.judgement import TYPE_PREFIX, is_type, with_names
from behavior_pipeline.downstream.drift.verdicts import Verdict
from behavior_pipeline.downstream.plots import (
    LIGHT,
    STYLE,
    Colors,
    page_drawing,
    style_axes,
)

MAX_NIGHTS: Final = 120
MAX_PANELS: Final = 24
COLUMNS: Final = 3
PANEL: Final = (2.9, 1.45)  # inches


def drift_png(verdicts: Sequence[Verdict]) -> bytes:
    """Return the last nights as a PNG in the light theme, for places that show no SVG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=_inches(verdicts), facecolor=LIGHT["surface"])
        FigureCanvasAgg(figure)
        _draw(figure, verdicts, LIGHT)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=90, metadata={"Software": None})
    return content.getvalue()


def drift_svg(verdicts: Sequence[Verdict]) -> str:
    """Return the last nights as SVG for the page, in its colors."""
    return page_drawing(
        "drift", _inches(verdicts), lambda figure, colors: _draw(figure, verdicts, colors)
    )


def _names(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the figures that get a panel."""
    return with_names(verdict.judgement for verdict in verdicts)[:MAX_PANELS]


def _inches(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """Return the size of the drawing."""
    rows = max(1, ceil(len(_names(verdicts)) / COLUMNS))
    return PANEL[0] * COLUMNS, PANEL[1] * rows


def _draw(figure: Figure, verdicts: Sequence[Verdict], colors: Colors) -> None:
    """Draw one panel per figure."""
    names = _names(verdicts)
    shown = verdicts[-MAX_NIGHTS:]
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(ceil(len(names) / COLUMNS), COLUMNS, place)
        style_axes(axes, colors)
        axes.set_title(_title(name), color=colors["ink"], fontsize=8.5)
        _draw_panel(axes, shown, name, colors)


def _title(name: str) -> str:
    """Return what stands over a panel."""
    if is_type(name):
        return f"share of '{name.removeprefix(TYPE_PREFIX)}'"
    return name.replace("psi_", "PSI of ").replace("psi", "PSI").replace("_", " ")


def _draw_panel(axes: Axes, verdicts: Sequence[Verdict], name: str, colors: Colors) -> None:
    """Draw a figure over the nights."""
    judged = [
        (verdict.night.cutoff, verdict.judgement.figures[name])
        for verdict in verdicts
        if name in verdict.judgement.figures
    ]
    nights = _places([night for night, _ in judged])
    values, low, high = (
        np.array([getattr(figure, column) for _, figure in judged], np.float64)
        for column in ("value", "low", "high")
    )
    is_limited = np.isfinite(high)
    low = np.where(np.isfinite(low), low, np.minimum(values, high))
    axes.fill_between(nights, low, high, where=is_limited, color=colors["line"], alpha=0.7, lw=0)
    axes.plot(nights, values, color=colors["embedding"], lw=1.2)
    is_alarm = np.array([figure.is_alarm for _, figure in judged], np.bool_)
    axes.plot(nights[is_alarm], values[is_alarm], "o", color=colors["rfm"], markersize=4)
    retrained = [verdict.night.cutoff for verdict in verdicts if verdict.judgement.is_retrained]
    for place in _places(retrained):
        axes.axvline(place, color=colors["muted"], lw=1, ls=(0, (3, 3)))
    locator = AutoDateLocator(maxticks=4)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.locator_params(axis="y", nbins=4)


def _places(nights: Sequence[datetime]) -> NDArray[np.float64]:
    """Return where nights stand on matplotlib's axis of days."""
    return np.array([float(date2num(night)) for night in nights])  # type: ignore[no-untyped-call]
