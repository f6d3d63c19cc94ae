"""The losses of a training as a picture, for the page of its run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from behavior_pipeline.downstream.plots import LIGHT, STYLE

_COLORS = ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7")
_WIDTH = 2.4  # inches of each panel
_HEIGHT = 2.1


def draw_losses(history: Sequence[Mapping[str, float]]) -> bytes:
    """Return a PNG with a panel per objective: training dashed, validation solid, over steps.

    Args:
        history: one entry per validation, as a training keeps it.
    """
    prefix = "train_"
    names = [name.removeprefix(prefix) for name in history[0] if name.startswith(prefix)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH * len(names), _HEIGHT), facecolor=LIGHT["surface"])
        FigureCanvasAgg(figure)
        for place, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), place + 1)
            _draw(axes, history, name, LIGHT[_COLORS[place % len(_COLORS)]])
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _draw(axes: Axes, history: Sequence[Mapping[str, float]], name: str, color: str) -> None:
    """Draw the losses of one objective."""
    for kind, line in (("train", "--"), ("validation", "-")):
        points = [
            (entry["step"], entry[f"{kind}_{name}"])
            for entry in history
            if f"{kind}_{name}" in entry
        ]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=color, label=kind, marker=".")
    axes.set_title(name.replace("_", " "))
    axes.set_xlabel("step")
    axes.legend()
