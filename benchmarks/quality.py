"""What the embedding is worth: every representation on every data set, with verdicts.

Runs where only torch, numpy, pyarrow, safetensors and scikit-learn are installed, on folders that
`quality_prepare.py` wrote:

    python benchmarks/quality.py --data DIR DIR --seeds 0,1,2 --out DIR --table docs/quality.md

Encoders are trained one after the other, on a GPU if there is one; probes are fitted meanwhile in
`--threads` processes. Finished cells are kept under --out; started again, the command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from figures import measured
from kept_results import Result
from objectives import OFF, names, numbers
from quality_cells import (
    EVERYONE,
    REPRESENTATIONS,
    SHARES,
    SPLIT_REPRESENTATIONS,
    SPLITS,
    WITHOUT_SEED,
    Cell,
    Place,
    measure_cell,
)
from quality_cutoffs import Moments
from quality_lines import lines_of
from quality_statistics import Judged, judge
from quality_table import write_page
from quality_vectors import VECTORS, Maker, training_of

from behavior_pipeline.encoder.configuration import PRESETS, ObjectiveWeights
from behavior_pipeline.encoder.parallel import pick_device
from behavior_pipeline.errors import PipelineError

NEEDS = {"aggregates+embedding": "embedding"}
Waiting = list[tuple[Place, Cell, Future[Result | None]]]


def cells_of(given: argparse.Namespace, data: Moments, seed: int) -> Iterator[Cell]:
    """Yield the cells of a seed; what has no seed comes with the first, unless labels are drawn."""
    for representation in chosen(given, REPRESENTATIONS):
        for split in given.splits:
            if split != EVERYONE and representation not in SPLIT_REPRESENTATIONS:
                continue
            has_seed = representation not in WITHOUT_SEED or split in SHARES
            if has_seed or seed == given.seeds[0]:
                for pair in range(len(data.pairs)):
                    yield Cell(representation, seed, pair, split)


def chosen(given: argparse.Namespace, some: tuple[str, ...]) -> list[str]:
    """Return those of some representations that were asked for, or that others need."""
    wanted = set(given.only or REPRESENTATIONS)
    needed = {NEEDS[name] for name in wanted & NEEDS.keys()} if some is VECTORS else set()
    return [name for name in some if name in wanted | needed]


def place_of(given: argparse.Namespace, folder: Path) -> Place:
    """Return where a data set is and where its results go."""
    data = Moments.at(folder)
    device = pick_device(given.device).type if given.device == "auto" else given.device
    about = {**data.about, "coles_steps": given.coles_steps, "device": device}
    if given.preset != "small":
        about["preset"] = given.preset
    return Place(folder, given.out / data.name, about, training_of(given), given.finished)


def start_all(given: argparse.Namespace, pool: ProcessPoolExecutor) -> Waiting:
    """Train seed after seed and hand every cell to the pool as soon as its vectors are there."""
    waiting: Waiting = []
    for folder in given.data:
        place = place_of(given, folder)
        maker = Maker(given, place)
        for seed in given.seeds:
            for name in () if given.finished else chosen(given, VECTORS):
                maker.make(name, seed)
            for cell in cells_of(given, maker.data, seed):
                waiting.append((place, cell, start(maker, pool, cell)))
    return waiting


def start(maker: Maker, pool: ProcessPoolExecutor, cell: Cell) -> Future[Result | None]:
    """Measure a cell in another process; the supervised network here, where the GPU is."""
    if cell.representation != "supervised":
        return pool.submit(measure_cell, maker.place, cell)
    done: Future[Result | None] = Future()
    done.set_result(maker.supervise(cell))
    return done


def judge_all(
    given: argparse.Namespace, pool: ProcessPoolExecutor, waiting: Waiting
) -> dict[Path, list[Judged]]:
    """Return by data set every cell with its resamples."""
    found: dict[Path, list[Future[Judged]]] = {}
    for place, cell, future in waiting:
        result = future.result()
        if result is not None and place.scores(cell).is_file():
            task = pool.submit(judge, place, cell, result, given.samples)
            found.setdefault(place.data, []).append(task)
    return {folder: [each.result() for each in tasks] for folder, tasks in found.items()}


def publish(given: argparse.Namespace, judged: dict[Path, list[Judged]]) -> None:
    """Print a JSON line per figure, keep them, and write the page."""
    written: list[dict[str, Any]] = []
    for folder, cells in judged.items():
        about = place_of(given, folder).about | {"training": training_of(given)}
        facts = {"data": Moments.at(folder).name, "seeds": given.seeds}
        for line in lines_of(cells):
            value = line.pop("value")
            written.append(measured("quality", value, line.pop("unit"), **facts, **line))
        written.append(measured("quality_data", len(cells), "cells", **facts, about=about))
    text = "".join(json.dumps(line) + "\n" for line in written)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "quality.jsonl").write_text(text)
    page = write_page(written, given.machine)
    if given.table:
        head = given.table.read_text().partition(MARK)[0] if given.table.is_file() else ""
        given.table.write_text(head + MARK + "\n\n" + page)
    print(page)


MARK = "<!-- written by benchmarks/quality.py: everything below -->"


def parse_weights(text: str) -> ObjectiveWeights:
    """Read the weights of objectives, `masked_event=0.5,silence=1`; what is not named is off."""
    pairs = [part.split("=") for part in text.split(",")]
    return replace(OFF, **{objective: float(weight) for objective, weight in pairs})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="folders of quality_prepare.py")
    add("--out", type=Path, default=Path("quality"), help="finished results")
    add("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2")
    add("--preset", choices=PRESETS, default="small")
    add("--steps", type=int, help="of each training of ours; default the preset's")
    add("--coles-steps", type=int, help="of each training of CoLES; default ten passes")
    add("--batch-tokens", type=int, help="default the preset's")
    add("--weights", type=parse_weights, default=ObjectiveWeights(), help="of the objectives")
    add("--only", type=names, default=[], help="representations, such as rfm,embedding")
    add("--splits", type=names, default=list(SPLITS), help="such as '100%%,1%%,new users'")
    add("--samples", type=int, default=500, help="resamples behind an interval")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, default=False)
    add("--threads", type=int, default=min(16, os.cpu_count() or 1), help="processes of probes")
    add("--machine", default="", help="in words, for the page")
    add("--table", type=Path, help="page whose tables are replaced, such as docs/quality.md")
    add("--finished", action="store_true", help="measure nothing, show what is there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes: each has one core
    given = parse(arguments)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(given.threads, mp_context=context) as pool:
            publish(given, judge_all(given, pool, start_all(given, pool)))
    except (PipelineError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
