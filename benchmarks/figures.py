"""One JSON line per figure, with the peer measured in the same run beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def seconds_of(work: Callable[[], object], repeats: int = 3) -> list[float]:
    """Run some work a few times and return the wall seconds of each."""
    measured = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        measured.append(time.perf_counter() - started)
    return measured


def measured(name: str, value: float, unit: str, **more: object) -> dict[str, object]:
    """Return the line of a figure that has no peer."""
    return {"figure": name, "value": round(value, 4), "unit": unit, **more, **_circumstances()}


def figure(
    name: str, ours: list[float], peer: str, theirs: list[float], unit: str
) -> dict[str, object]:
    """Return the line of a figure: medians, spread, and ours over the peer's."""
    value, peer_value = statistics.median(ours), statistics.median(theirs)
    return {
        "figure": name,
        "value": round(value, 4),
        "unit": unit,
        "spread": [round(min(ours), 4), round(max(ours), 4)],
        "peer": peer,
        "peer_value": round(peer_value, 4),
        "ratio": round(value / peer_value, 4),
        **_circumstances(),
    }


def _circumstances() -> dict[str, object]:
    """Return where and how a figure was measured."""
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.python_version()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def publish(benchmark: str, lines: list[dict[str, object]], *, is_kept: bool = True) -> None:
    """Print the lines and keep them, unless told otherwise, as the benchmark's last full run."""
    written = "".join(json.dumps(line) + "\n" for line in lines)
    if is_kept:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{benchmark}.jsonl").write_text(written)
    print(written, end="")
