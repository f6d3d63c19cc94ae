"""The report's pictures: SVG for the page, and one PNG for places that show no SVG.

The SVG's colors are the page's CSS variables, so that one drawing suits light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from behavior_pipeline.downstream.verdict import Score, Verdict
from behavior_pipeline.downstream.wording import in_words

Colors = Mapping[str, str]

LIGHT: Final[Colors] = {
    "ink": "#1c2430",
    "muted": "#5b6675",
    "line": "#d5dae1",
    "surface": "#ffffff",
    "untrained": "#7a8594",
    "embedding": "#2563c9",
    "rfm-embedding": "#0b7a6b",
    "aggregates": "#8a6d00",
    "aggregates-embedding": "#a21caf",
    "rfm": "#b45309",
    "s0": "#2563c9",
    "s1": "#c2570c",
    "s2": "#0b7a6b",
    "s3": "#a21caf",
    "s4": "#8a6d00",
    "s5": "#be123c",
    "s6": "#4d5b9e",
    "s7": "#4b7a1b",
}
"""Colors of the light theme, by the name of the page's CSS variable."""

TOKENS: Final[Colors] = {name: f"#0000{10 + place:02x}" for place, name in enumerate(LIGHT)}
"""Stand-ins that matplotlib draws with; each becomes `var(--name)` in the SVG."""

NUM_SEGMENT_COLORS: Final = 8
LIFT_REPRESENTATIONS: Final = (
    "untrained",
    "embedding",
    "rfm+embedding",
    "aggregates",
    "aggregates+embedding",
)
MARKERS: Final = {"logistic_regression": "o", "gradient_boosting": "s"}
WIDTH: Final = 4.3  # inches: on a phone's width the text stays readable
STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "behavior-pipeline",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
}


def lift_plot(verdicts: Sequence[Verdict], title: str) -> str:
    """Draw the lifts against RFM of one task under each probe, with intervals."""
    return _svg(f"lift-{title}", (WIDTH, 2.7), lambda ax, c: _draw_lifts(ax, verdicts, title, c))


def write_lift_picture(panels: Mapping[str, Sequence[Verdict]], target: Path) -> None:
    """Draw all lifts as one PNG in the light theme."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 2.7 * max(1, len(panels))), facecolor=LIGHT["surface"])
        FigureCanvasAgg(figure)
        for place, (title, verdicts) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(len(panels), 1, place)
            style_axes(axes, LIGHT)
            _draw_lifts(axes, verdicts, title, LIGHT)
        figure.savefig(target, format="png", dpi=110, metadata={"Software": None})


def training_plot(history: Sequence[Mapping[str, float]], loss: str) -> str:
    """Draw one training and validation loss over the steps."""

    def draw(axes: Axes, colors: Colors) -> None:
        series = (("train", "untrained", "training"), ("validation", "embedding", "validation"))
        for role, color, label in series:
            rows = [row for row in history if row.get(f"{role}_{loss}") is not None]
            steps = [row["step"] for row in rows]
            values = [row[f"{role}_{loss}"] for row in rows]
            if rows:
                axes.plot(steps, values, color=colors[color], label=label, marker=".", lw=1.6)
        axes.set_title(loss.replace("_", " ").capitalize(), color=colors["ink"])
        axes.set_xlabel("step", color=colors["muted"])
        _legend(axes, colors)

    return _svg(f"training-{loss}", (WIDTH, 2.3), draw)


def map_plot(flat_map: Mapping[str, Any]) -> str:
    """Draw users on the two directions in which they differ most, colored by segment."""

    def draw(axes: Axes, colors: Colors) -> None:
        x, y = np.array(flat_map["x"]), np.array(flat_map["y"])
        segments = np.array(flat_map["segment"])
        for segment in np.unique(segments):
            rows = segments == segment
            color = colors[f"s{segment % NUM_SEGMENT_COLORS}"]
            axes.scatter(x[rows], y[rows], s=5, color=color, alpha=0.55, linewidths=0)
        for segment in np.unique(segments):
            rows = segments == segment
            _label(axes, float(np.median(x[rows])), float(np.median(y[rows])), int(segment), colors)
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])

    return _svg("map", (WIDTH, 3.6), draw)


def reliability_plot(bins: Sequence[Mapping[str, float]]) -> str:
    """Draw the observed churn of users of like predicted probability."""

    def draw(axes: Axes, colors: Colors) -> None:
        axes.plot([0, 1], [0, 1], color=colors["muted"], lw=1, ls=(0, (4, 3)), label="perfect")
        predicted = [row["predicted"] for row in bins]
        observed = [row["observed"] for row in bins]
        axes.plot(
            predicted, observed, marker="o", color=colors["rfm-embedding"], lw=1.6, label="measured"
        )
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_aspect("equal")
        axes.set_xlabel("predicted probability of churn", color=colors["muted"])
        axes.set_ylabel("share that churned", color=colors["muted"])
        _legend(axes, colors)

    return _svg("reliability", (WIDTH, 3.6), draw)


def _draw_lifts(axes: Axes, verdicts: Sequence[Verdict], title: str, colors: Colors) -> None:
    """Draw one row per representation, the probes a little apart."""
    axes.axvline(0, color=colors["rfm"], lw=1.4)
    for place, name in enumerate(LIFT_REPRESENTATIONS):
        for number, verdict in enumerate(verdicts):
            height = place + (0.16 if number == 0 else -0.16)
            _draw_interval(
                axes,
                verdict.lifts[name],
                height,
                MARKERS[verdict.probe],
                colors[name.replace("+", "-")],
            )
    for verdict in verdicts:
        axes.plot(
            [], [], MARKERS[verdict.probe], color=colors["muted"], label=in_words(verdict.probe)
        )
    axes.set_yticks(range(len(LIFT_REPRESENTATIONS)))
    axes.set_yticklabels([in_words(name) for name in LIFT_REPRESENTATIONS], color=colors["ink"])
    axes.set_ylim(-0.5, len(LIFT_REPRESENTATIONS) - 0.5)
    axes.set_title(title, color=colors["ink"])
    axes.grid(axis="x", color=colors["line"], lw=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=6)


def _draw_interval(axes: Axes, score: Score, height: float, marker: str, color: str) -> None:
    """Draw a difference and its interval."""
    if score.ci_low is not None and score.ci_high is not None:
        axes.plot([score.ci_low, score.ci_high], [height, height], color=color, lw=1.8)
    axes.plot([score.value], [height], marker, color=color, markersize=5)


def _label(axes: Axes, x: float, y: float, segment: int, colors: Colors) -> None:
    """Write a segment's number where its users are."""
    box = {
        "boxstyle": "round,pad=0.25",
        "facecolor": colors["surface"],
        "edgecolor": colors[f"s{segment % NUM_SEGMENT_COLORS}"],
    }
    axes.text(x, y, str(segment), color=colors["ink"], ha="center", va="center", bbox=box)


def _legend(axes: Axes, colors: Colors) -> None:
    """Draw the legend in the page's ink."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(labelcolor=colors["ink"], fontsize=8.5)


def style_axes(axes: Axes, colors: Colors) -> None:
    """Give axes the page's colors."""
    axes.set_facecolor("none")
    axes.tick_params(colors=colors["muted"], length=0, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_color(colors["line"])


def _svg(name: str, inches: tuple[float, float], draw: Callable[[Axes, Colors], None]) -> str:
    """Return a drawing on one pair of axes as SVG to be set into a page."""

    def draw_figure(figure: Figure, colors: Colors) -> None:
        axes = figure.add_subplot()
        style_axes(axes, colors)
        draw(axes, colors)

    return page_drawing(name, inches, draw_figure)


def page_drawing(
    name: str, inches: tuple[float, float], draw: Callable[[Figure, Colors], None]
) -> str:
    """Return a drawing as SVG to be set into a page, its ids its own."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=inches, facecolor="none")
        draw(figure, TOKENS)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="none")
    return _for_page(buffer.getvalue(), re.sub(r"[^a-z]+", "-", name.lower()))


def _for_page(svg: str, name: str) -> str:
    """Strip what a page does not need, make ids unique, and let CSS choose colors and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"(font:[^;\"]*?px)[^;\"]*", r"\1 var(--font)", svg)
    for variable, token in TOKENS.items():
        svg = svg.replace(token, f"var(--{variable})")
    return svg
