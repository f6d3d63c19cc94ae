"""The report: one self-contained page that says first what the embedding is worth.

Everything is read from what the stages left on disk, so that the page can be written again at any
time; a part whose file is missing says so. The page reaches for nothing over the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from behavior_pipeline.downstream import plots, wording
from behavior_pipeline.downstream.calibration import NUM_BINS
from behavior_pipeline.downstream.comparison import CALIBRATION_FILE, COMPARISON_FILE
from behavior_pipeline.downstream.drift.history import read_history
from behavior_pipeline.downstream.drift.picture import drift_svg
from behavior_pipeline.downstream.drift.verdicts import judge_nights
from behavior_pipeline.downstream.probes import BOOSTING, PENALTIES
from behavior_pipeline.downstream.representations import BASELINE, CONTROLS, STRONG_BASELINE
from behavior_pipeline.downstream.segmentation import MAP_FILE, PROFILES_FILE
from behavior_pipeline.downstream.verdict import (
    FURTHER,
    HEADLINES,
    TITLES,
    Score,
    Verdict,
    probe_verdicts,
    verdicts,
)
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, read_json, writing_file
from behavior_pipeline.windows import EvaluationWindows

REPORT_FILE: Final = "report.html"
LIFT_PICTURE_FILE: Final = "lift.png"
TEMPLATE: Final = "report.html.j2"
MAX_TRAINING_PLOTS: Final = 6
NO_TRAINING: Final[dict[str, Any]] = dict.fromkeys(
    ("num_steps", "best_step", "num_parameters", "trained_through")
)
COLUMNS: Final = (
    BASELINE,
    STRONG_BASELINE,
    "embedding",
    "rfm+embedding",
    "aggregates+embedding",
    *reversed(CONTROLS),
)
"""Representations from left to right: the question first, the controls last."""


@dataclass(frozen=True)
class WrittenReport:
    """What was written.

    Attributes:
        page: the report itself.
        lift_picture: its most important picture as a PNG.
    """

    page: Path
    lift_picture: Path


def write_report(
    storage: Storage,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    report: Report = report_nothing,
) -> WrittenReport:
    """Write `report.html` and `lift.png` from what comparison, segments and training left.

    Raises:
        PipelineError: if there is no comparison at the cutoff.
    """
    folder = storage.reports(windows.cutoff)
    comparison = _require_comparison(folder)
    report(1, 2, "drawing")
    context = _context(storage, settings, preset, windows, comparison)
    with writing_file(folder / LIFT_PICTURE_FILE) as aside:
        plots.write_lift_picture(_panels(comparison), aside)
    page = _environment().get_template(TEMPLATE).render(context)
    with writing_file(folder / REPORT_FILE) as aside:
        aside.write_text(page, encoding="utf-8")
    report(2, 2, "written")
    return WrittenReport(folder / REPORT_FILE, folder / LIFT_PICTURE_FILE)


def _require_comparison(folder: Path) -> dict[str, Any]:
    """Read the comparison."""
    path = folder / COMPARISON_FILE
    if not path.is_file():
        raise PipelineError(f"There is no {path}.", "Run the comparison for this cutoff first.")
    content: dict[str, Any] = read_json(path)
    return content


def _environment() -> Environment:
    """Return the template engine: everything from the data is escaped, nothing may be missing."""
    environment = Environment(
        loader=PackageLoader("behavior_pipeline.downstream", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.number,
        "signed": wording.signed,
        "words": wording.in_words,
        "interval": wording.interval,
        "signed_interval": wording.signed_interval,
    }
    return environment


def _context(
    storage: Storage,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    comparison: dict[str, Any],
) -> dict[str, Any]:
    """Return what the template shows."""
    found = verdicts(comparison)
    folder = storage.reports(windows.cutoff)
    segments = storage.segments(windows.cutoff)
    flat_map = _read(segments / MAP_FILE)
    training = _read(storage.checkpoints / comparison["checkpoint_id"] / "training.json") or {}
    return {
        "comparison": comparison,
        "preset": preset,
        "cutoff": f"{windows.cutoff:%Y-%m-%d}",
        "headline": wording.headline_sentence(found),
        "verdicts": [(verdict, wording.verdict_sentence(verdict)) for verdict in found],
        "signs": wording.SIGNS,
        "controls": wording.control_sentence(found),
        "naive_sentence": wording.naive_sentence(comparison),
        "left_out": wording.left_out_sentences(comparison),
        "lift_plots": _lift_plots(comparison),
        "score_rows": _headline_rows(comparison),
        "all_rows": _all_rows(comparison),
        "naive": [(row, Score.of(row)) for row in comparison["naive"]],
        "representations": COLUMNS,
        "profiles": _read(segments / PROFILES_FILE) or [],
        "map_plot": _picture(plots.map_plot(flat_map)) if flat_map else None,
        "flat_map": flat_map,
        "num_colors": plots.NUM_SEGMENT_COLORS,
        "calibration": _calibration(folder),
        "drift": _drift(storage, settings, windows),
        "training": NO_TRAINING | training,
        "training_plots": _training_plots(training),
        "light": plots.LIGHT,
        "dark": DARK,
        "penalties": PENALTIES,
        "boosting": BOOSTING,
        "num_bins": NUM_BINS,
        "num_segments": settings.num_segments,
    }


DARK: Final = {
    "ink": "#e8ecf2",
    "muted": "#a3adbb",
    "line": "#39424f",
    "surface": "#1b212b",
    "untrained": "#95a0b0",
    "embedding": "#79aaff",
    "rfm-embedding": "#4cc9b0",
    "aggregates": "#d9bb3f",
    "aggregates-embedding": "#e28cf0",
    "rfm": "#f0a050",
    "s0": "#79aaff",
    "s1": "#f59e5b",
    "s2": "#4cc9b0",
    "s3": "#e28cf0",
    "s4": "#d9bb3f",
    "s5": "#ff8aa0",
    "s6": "#a9b5f5",
    "s7": "#9ccb63",
}
"""Colors of the dark theme; every one has the light theme's name."""


def _panels(comparison: dict[str, Any]) -> dict[str, list[Verdict]]:
    """Return the headline figures under each probe by title."""
    found = {
        TITLES[task, metric]: probe_verdicts(comparison, task, target, metric)
        for task, target, metric in HEADLINES
        if task != "segments"
    }
    return {title: panel for title, panel in found.items() if panel}


def _lift_plots(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each lift plot with the words that stand for it."""
    return [
        {
            "title": title,
            "svg": _picture(plots.lift_plot(panel, title)),
            "alternative": f"{title}. " + " ".join(_lift_words(verdict) for verdict in panel),
        }
        for title, panel in _panels(comparison).items()
    ]


def _lift_words(verdict: Verdict) -> str:
    """Say in words what one probe's part of a lift plot shows."""
    told = [
        f"{wording.in_words(name)} {wording.signed(verdict.lifts[name].value)} "
        f"({wording.signed_interval(verdict.lifts[name])})"
        for name in plots.LIFT_REPRESENTATIONS
    ]
    return f"Lift against RFM under {wording.in_words(verdict.probe)}: {', '.join(told)}."


def _headline_rows(comparison: dict[str, Any]) -> list[Verdict]:
    """Return the headline figures, and those beside them, under both probes."""
    return [
        verdict
        for task, target, metric in HEADLINES + FURTHER
        for verdict in probe_verdicts(comparison, task, target, metric)
    ]


def _all_rows(comparison: dict[str, Any]) -> list[tuple[Verdict, dict[str, Any]]]:
    """Return every figure under both probes, each with a row of `results` for its numbers."""
    first = {
        (row["task"], row["target"], row["metric"]): row for row in reversed(comparison["results"])
    }
    return [
        (verdict, row)
        for (task, target, metric), row in reversed(first.items())
        for verdict in probe_verdicts(comparison, task, target, metric)
    ]


def _calibration(folder: Path) -> dict[str, Any] | None:
    """Return the calibration with its plot, if churn could be measured."""
    content = _read(folder / CALIBRATION_FILE)
    if not content:
        return None
    svg = _picture(plots.reliability_plot(content["bins"]))
    return {**content, "svg": svg}


def _drift(
    storage: Storage, settings: Settings, windows: EvaluationWindows
) -> dict[str, Any] | None:
    """Return the verdict of the night and the picture of those before it, if it was measured."""
    found = judge_nights(read_history(storage, windows.cutoff), settings)
    if not found or found[-1].night.cutoff != windows.cutoff:
        return None
    return {
        "findings": [str(finding) for finding in found[-1].findings],
        "num_nights": len(found),
        "svg": _picture(drift_svg(found)),
        "per_year": settings.drift_false_alarms_per_year,
        "calm_nights": settings.drift_calm_nights,
    }


def _training_plots(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one plot per loss in the encoder's history, the sum of all first."""
    history = training.get("history") or []
    names = {
        key.split("_", 1)[1]: None
        for row in history
        for key in row
        if key.startswith(("train_", "validation_"))
    }
    ordered = sorted(names, key=lambda name: (name != "total", name))[:MAX_TRAINING_PLOTS]
    return [
        {
            "title": name.replace("_", " "),
            "svg": _picture(plots.training_plot(history, name)),
            "alternative": _training_words(history, name),
        }
        for name in ordered
    ]


def _training_words(history: list[dict[str, float]], name: str) -> str:
    """Say in words where a loss began and ended."""
    told = [f"Loss {name.replace('_', ' ')} over the training steps."]
    for role in ("train", "validation"):
        values = [row[f"{role}_{name}"] for row in history if f"{role}_{name}" in row]
        if values:
            told.append(f"{role.capitalize()} from {values[0]:.3f} to {values[-1]:.3f}.")
    return " ".join(told)


def _picture(svg: str) -> Markup:
    """Let a drawing into the page as it is: matplotlib has escaped its texts."""
    return Markup(svg)  # noqa: S704


def _read(path: Path) -> Any:
    """Read a JSON file, or return None where it was not written."""
    return read_json(path) if path.is_file() else None
