"""The warehouse at real size: SQL and sequences beside a bare sort, pandas, nights, 169 M events.

    python benchmarks/warehouse.py [--events N] [--path-events N] [--repeats N] [--folder DIR]

At `--events` (50 M): everything from canonical events to tables, and token sequences, beside
DuckDB's `COPY (SELECT * … ORDER BY user_id, occurred_at)` of the same files; the same tables in
pandas on a slice of 2 M events; nights that touch .1 to 10 % of the users beside building
everybody. At `--path-events` (169 M): the whole path from raw Parquet in a process of its own,
with the memory of its process tree. Simulated events are kept in `--folder` for the next run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import duckdb
import matplotlib as mpl
import numpy as np
import pandas as pd
import pandas_tables
import psutil
from figures import figure, measured, publish
from night import write_night

from behavior_pipeline.ingest.arrivals import loaded_arrivals
from behavior_pipeline.ingest.load import HISTORY, load_arrival
from behavior_pipeline.ingest.presets import load_preset
from behavior_pipeline.ingest.simulator import simulate
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.vocabulary import (
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
)
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import file_list, open_engine
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.build import WarehouseSummary, build_warehouse
from behavior_pipeline.windows import EvaluationWindows, midnight

mpl.use("Agg")

T = TypeVar("T")
SHOWN_SECONDS = 0.05  # models that take less are left out of the lists

START, NUM_DAYS = date(2026, 1, 1), 180
HORIZON, LOOKBACK = timedelta(days=30), timedelta(days=90)
FIRST_NIGHT = START + timedelta(days=NUM_DAYS)  # the day after the history's last
SHARES = (0.01, 0.001, 0.003, 0.01, 0.03, 0.1)  # of the users that a night touches
SLICE_EVENTS = 2_000_000
PRESET = load_preset("simulated")
PICTURE = Path(__file__).parents[1] / "docs" / "night-cost.png"


@dataclass(frozen=True)
class Home:
    """A history's raw files, and the home that they are loaded into."""

    raw: Path
    storage: Storage
    settings: Settings


def main() -> None:
    """Measure and print."""
    options = _options()
    if options.run_path:
        _run_path(options.folder, options.path_events)
        return
    with tempfile.TemporaryDirectory(prefix="bench-warehouse-") as temporary:
        folder = options.folder or Path(temporary)
        home = _home(folder, options.events, num_buckets=8)
        lines, full_seconds = _everybody(home, options.repeats)
        _show(lines)
        for more in ([_pandas(home, options.repeats)], _nights(home, full_seconds)):
            _show(more)
            lines += more
        lines += _path(folder, options.path_events)
        publish("warehouse", lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=50_000_000)
    parser.add_argument("--path-events", type=int, default=169_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--run-path", action="store_true", help="used by the benchmark itself")
    return parser.parse_args()


def _say(text: str) -> None:
    """Tell how far the benchmark is, apart from its figures."""
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


def _show(lines: list[dict[str, object]]) -> None:
    """Tell figures as they come; all of them are printed at the end."""
    for line in lines:
        _say(f"{line['figure']} {line['value']} {line['unit']}, ratio {line.get('ratio', '-')}")


def _home(folder: Path, events: int, num_buckets: int) -> Home:
    """Simulate a history, 169 events a user, unless the folder has it."""
    raw = folder / f"raw-{events}"
    _say(f"simulating {events:,} events")
    simulate(raw, round(events / 169), NUM_DAYS, 0, START, num_events=events)
    settings = Settings(memory_limit="6GB", threads=2, num_buckets=num_buckets)
    storage = Storage(folder / f"home-{events}")
    shutil.rmtree(storage.home, ignore_errors=True)
    return Home(raw, storage, settings)


def _windows(day: date) -> EvaluationWindows:
    """Return the windows of the night that ends a day, its train cutoff a horizon before."""
    cutoff = midnight(day) + timedelta(days=1)
    return EvaluationWindows(cutoff, cutoff - HORIZON, cutoff, HORIZON, LOOKBACK)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Run some work; return its seconds and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _load(home: Home, arrival: str, path: Path) -> float:
    """Load raw files as an arrival; return the seconds."""
    now = datetime.now(UTC)
    seconds, _ = _timed(
        lambda: load_arrival(PRESET, str(path), home.storage, home.settings, arrival, now)
    )
    return seconds


def _build(home: Home, day: date, *, from_nothing: bool) -> tuple[float, WarehouseSummary]:
    """Build the warehouse for a night; return the seconds and what was done."""
    seconds, summary = _timed(
        lambda: build_warehouse(
            home.storage, home.settings, PRESET, _windows(day), from_nothing=from_nothing
        )
    )
    return seconds, summary


def _tokenize(home: Home, day: date, *, with_earlier: bool) -> float:
    """Write the night's sequences; return the seconds."""
    cutoff = _windows(day).cutoff
    folder = home.storage.sequences(cutoff)
    earlier = sorted(folder.parent.glob("cutoff=*")) if with_earlier else []
    vocabulary = load_vocabulary(home.storage.vocabulary)
    seconds, _ = _timed(
        lambda: write_sequences(
            home.storage, home.settings, vocabulary, cutoff, folder, earlier=earlier
        )
    )
    return seconds


def _vocabulary(home: Home, day: date) -> float:
    """Count the vocabulary as of a night's train cutoff; return the seconds."""
    cutoff = _windows(day).train_cutoff
    seconds, _ = _timed(
        lambda: save_vocabulary(
            build_vocabulary(home.storage, home.settings, (), cutoff), home.storage.vocabulary
        )
    )
    return seconds


def _bare_sort(home: Home) -> float:
    """Sort the same canonical files to one Parquet file; return the seconds."""
    files = [file for arrival in loaded_arrivals(home.storage) for file in arrival.event_files()]
    target = home.storage.home / "sorted.parquet"
    limit, threads = home.settings.memory_limit, home.settings.threads
    with open_engine(limit, threads, home.storage.scratch) as connection:
        seconds, _ = _timed(
            lambda: connection.execute(
                f"COPY (SELECT * FROM read_parquet({file_list(files)}, hive_partitioning = false) "
                f"ORDER BY user_id, occurred_at) TO '{target}' (FORMAT parquet)"
            )
        )
    target.unlink()
    return seconds


def _everybody(home: Home, repeats: int) -> tuple[list[dict[str, object]], float]:
    """Build everybody beside a bare sort, in turns; return the lines and the whole's seconds."""
    night = FIRST_NIGHT - timedelta(days=1)
    _say("loading the history")
    loading = _load(home, HISTORY, home.raw)
    sorts, builds, models, counts, tokens, summaries = [], [], [], [], [], []
    for number in range(repeats):
        _say(f"sorting, building and tokenizing everybody ({number + 1} of {repeats})")
        sorts.append(_bare_sort(home))
        seconds, summary = _build(home, night, from_nothing=True)
        builds.append(seconds)
        models.append(sum(summary.seconds.values()))
        summaries.append(summary)
        counts.append(_vocabulary(home, night))
        tokens.append(_tokenize(home, night, with_earlier=False))
    peer = "DuckDB COPY (SELECT * ORDER BY user_id, occurred_at) of the same files"
    full = loading + sum(float(np.median(each)) for each in (builds, counts, tokens))
    per_model = {
        name: round(s, 2) for name, s in summaries[-1].seconds.items() if s > SHOWN_SECONDS
    }
    return [
        measured("load_50m", loading, "s", note="raw Parquet to canonical events"),
        figure("sql_over_sort", models, peer, sorts, "s") | {"per_model": per_model},
        measured("build_50m", float(np.median(builds)), "s", note="models, data tests, swap"),
        measured("vocabulary_50m", float(np.median(counts)), "s", note="counted once, not nightly"),
        figure("sequences_over_sort", tokens, peer, sorts, "s"),
    ], full


def _pandas(home: Home, repeats: int) -> dict[str, object]:
    """Build the same tables of a slice of whole users in pandas and here."""
    _say("the same tables in pandas, on a slice")
    files = loaded_arrivals(home.storage)[0].event_files(0)
    slice_home = Home(home.raw, Storage(home.storage.home / "slice"), home.settings)
    raw = slice_home.storage.home / "raw.parquet"
    raw.parent.mkdir(exist_ok=True)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        relation = f"read_parquet({file_list(files)}, hive_partitioning = false)"
        connection.execute(
            f"COPY (SELECT event_id::BIGINT AS event_id, user_id, event_type, "
            "occurred_at AS event_time, item_id AS product_id, category, location AS region, "
            f"context AS device, amount FROM {relation} ORDER BY user_id LIMIT {SLICE_EVENTS}) "
            f"TO '{raw}' (FORMAT parquet)"
        )
    _load(slice_home, HISTORY, raw)
    (events,) = loaded_arrivals(slice_home.storage)[0].event_files()
    night = FIRST_NIGHT - timedelta(days=1)
    windows = _windows(night)
    cutoffs = [pd.Timestamp(cutoff) for cutoff in (windows.train_cutoff, windows.cutoff)]

    def with_pandas() -> None:
        tables = pandas_tables.build(events, cutoffs, HORIZON.days, LOOKBACK.days)
        for name, table in tables.items():
            table.to_parquet(raw.with_name(f"{name}.parquet"))

    ours, theirs = [], []
    for _ in range(repeats):
        _, summary = _build(slice_home, night, from_nothing=True)
        ours.append(sum(summary.seconds.values()))
        theirs.append(_timed(with_pandas)[0])
    return figure("pandas_over_sql", theirs, "the models' SQL on the same slice", ours, "s")


def _nights(home: Home, full_seconds: float) -> list[dict[str, object]]:
    """Work nights in that touch different shares of the users; fit a line to what they cost."""
    points: list[tuple[int, float]] = []
    parts: list[dict[str, float]] = []
    for number, share in enumerate(SHARES):
        day = FIRST_NIGHT + timedelta(days=number)
        raw = home.storage.home / f"night-{day}.parquet"
        write_night(home.raw, f"{day}", share, raw, seed=number)
        _say(f"a night that touches {share:.1%} of the users")
        loading = _load(home, f"{day}", raw)
        building, summary = _build(home, day, from_nothing=False)
        if summary.rebuilt:
            raise RuntimeError(f"everybody was rebuilt: {summary.rebuilt}")
        tokens = _tokenize(home, day, with_earlier=True)
        points.append((summary.num_users_touched, loading + building + tokens))
        parts.append({"load": loading, "build": building, "sequences": tokens})
    slope, intercept, fit = _line(points[1:])
    _plot(points[1:], slope, intercept, full_seconds, home)
    nights = [points[number][1] for number, share in enumerate(SHARES) if share == 0.01]  # noqa: PLR2004
    line = figure(
        "nightly_over_full", nights, "load, build and tokenize everybody", [full_seconds], "s"
    )
    return [
        line | {"parts": [{k: round(v, 2) for k, v in part.items()} for part in parts]},
        measured(
            "night_cost_line_r2", fit, "R²",
            note=f"{intercept:.2f} s + {slope * 1000:.3f} s per 1,000 users touched",
            points=[(users, round(seconds, 2)) for users, seconds in points],
        ),
    ]  # fmt: skip


def _line(points: list[tuple[int, float]]) -> tuple[float, float, float]:
    """Return slope, intercept and R² of the least-squares line."""
    users, seconds = np.array(points, dtype=float).T
    slope, intercept = np.polyfit(users, seconds, 1)
    rest = seconds - (slope * users + intercept)
    return float(slope), float(intercept), float(1 - rest.var() / seconds.var())


def _plot(
    points: list[tuple[int, float]], slope: float, intercept: float, full: float, home: Home
) -> None:
    """Draw the cost of a night against the users that it touches."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    users, seconds = np.array(points, dtype=float).T
    figure_, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(users, slope * users + intercept, color="#888", label="least-squares line")
    axes.plot(users, seconds, "o", color="#1f77b4", label="nights: load, build, tokenize")
    axes.axhline(full * 0.05, color="#d62728", linestyle=":", label="5 % of building everybody")
    axes.set(xlabel="users touched", ylabel="seconds, 2 cores", xlim=(0, None), ylim=(0, None))
    size = home.raw.name.partition("-")[2]
    axes.set_title(f"What a night costs on a history of {int(size):,} events")
    axes.legend(frameon=False)
    figure_.savefig(PICTURE, dpi=130)
    plt.close(figure_)


def _path(folder: Path, events: int) -> list[dict[str, object]]:
    """Run the whole path in a process of its own and watch the memory of its tree."""
    _home(folder, events, num_buckets=16)
    _say(f"the whole path at {events:,} events")
    command = [sys.executable, __file__, "--run-path", "--folder", str(folder)]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--path-events", str(events)], stdout=subprocess.PIPE, text=True
    ) as process:
        peak = _watch(process)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError("the path failed")
    minutes = (time.perf_counter() - started) / 60
    steps = json.loads(output.strip().splitlines()[-1])
    return [
        measured("path_169m_minutes", minutes, "min", events=events, seconds=steps),
        measured("path_169m_peak_gb", peak / 1e9, "GB", note="resident, whole process tree"),
    ]


def _watch(process: subprocess.Popen[str]) -> int:
    """Return the most bytes that a process and its children had resident, twice a second."""
    peak, root = 0, psutil.Process(process.pid)
    while process.poll() is None:
        tree = [root, *root.children(recursive=True)]
        resident = 0
        for member in tree:
            try:
                resident += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, resident)
        time.sleep(0.5)
    return peak


def _run_path(folder: Path, events: int) -> None:
    """Go from raw Parquet to tables and sequences; print the seconds of each step and model."""
    home = _home(folder, events, num_buckets=16)
    night = FIRST_NIGHT - timedelta(days=1)
    steps = {"load": _load(home, HISTORY, home.raw)}
    _say("built: loading; next: the models")
    steps["build"], summary = _build(home, night, from_nothing=True)
    _say("built: the models; next: sequences")
    steps["vocabulary"] = _vocabulary(home, night)
    steps["sequences"] = _tokenize(home, night, with_earlier=False)
    models = {name: round(s, 1) for name, s in summary.seconds.items() if s > SHOWN_SECONDS}
    rows = {name: count for name, count in summary.rows.items() if count}
    print(
        json.dumps({**{k: round(v, 1) for k, v in steps.items()}, "models": models, "rows": rows})
    )


if __name__ == "__main__":
    main()
