"""Results of long measurements, a file each: a run that was cut off goes on where it was."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from behavior_pipeline.storage import read_json, write_json

DIGITS = 4

Result = dict[str, Any]


class KeptResults:
    """A folder of results.

    Args:
        folder: `<name>-<seed>.json` are in it.
        about: what a result depends on beside its name and seed; one of other circumstances does
            not count and is measured anew.
        is_finished: whether nothing is to be measured: what is there is all there is.
    """

    def __init__(self, folder: Path, about: dict[str, Any], *, is_finished: bool = False) -> None:
        self.folder = folder
        self.is_finished = is_finished
        self.about = json.loads(json.dumps(about))

    def result(
        self, name: str, seed: int, measure: Callable[[], Result], **more: object
    ) -> Result | None:
        """Return a result that is there, or measure it and keep it; None if that is not wanted.

        Args:
            name: of the result.
            seed: of the result.
            measure: measures it.
            more: what this result depends on beside `about`.
        """
        path = self.folder / f"{name}-{seed}.json"
        about = self.about | json.loads(json.dumps(more))
        if path.is_file():
            content = read_json(path)
            if content["about"] == about:
                return content["result"]
        if self.is_finished:
            return None
        result = measure()
        write_json(path, {"about": about, "result": result})
        print(f"{name}, seed {seed}: {in_words(result)}", file=sys.stderr, flush=True)
        return result


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation over seeds, which one seed does not have."""
    mean, spread = _statistics(values)
    return round(mean, DIGITS), None if spread is None else round(spread, DIGITS)


def cell(values: list[float]) -> str:
    """Return mean and standard deviation as a table shows them, `.731 (.004)`."""
    mean, spread = _statistics(values)
    words = f"{mean:.3f}" if spread is None else f"{mean:.3f} ({spread:.3f})"
    return words.replace("0.", ".")


def _statistics(values: list[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation as they are."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_words(result: Result) -> str:
    """Return a result on one line."""
    return json.dumps(result, default=lambda value: round(float(value), DIGITS))
