"""What each pretraining objective is worth: churn and propensity from frozen embeddings.

Runs where only torch, numpy, pyarrow, safetensors and scikit-learn are installed, on a folder that
`objectives_data.py` wrote:

    python benchmarks/objectives.py --data DIR --seeds 0,1,2 --out DIR

Each variant is trained on the same sequences for as many steps of as many tokens, embeds both
cutoffs and is judged by the probes of the comparison: fitted at the train cutoff, tested at the
test cutoff. Finished variants are kept under --out; started again, the command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from figures import measured
from kept_results import KeptResults, Result, cell, mean_and_spread, table
from quality_data import Cut, Prepared, PreparedFolder

from behavior_pipeline.downstream.blocks import Block, Blocks, random_vectors
from behavior_pipeline.downstream.probes import PROBES, fit_probes
from behavior_pipeline.downstream.statistics import estimate_auroc
from behavior_pipeline.downstream.tasks import Task, churn_task, propensity_task
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import load_checkpoint, read_vocabulary_facts
from behavior_pipeline.encoder.configuration import (
    PRESETS,
    EncoderConfig,
    ObjectiveWeights,
    TrainingConfig,
)
from behavior_pipeline.encoder.parallel import pick_device
from behavior_pipeline.encoder.train import train
from behavior_pipeline.encoder.training_run import Report
from behavior_pipeline.errors import PipelineError

OFF = ObjectiveWeights(0.0, 0.0, 0.0, 0.0, 0.0)
DEFAULT = "default"
VARIANTS = {
    "masked": replace(OFF, masked_event=1.0),
    "next": replace(OFF, next_event=1.0),
    "contrastive": replace(OFF, contrastive=1.0),
    "future": replace(OFF, future_window=1.0),
    "silence": replace(OFF, silence=1.0),
    "beat": replace(ObjectiveWeights(), silence=0.0, future_window=0.0),
    DEFAULT: ObjectiveWeights(),
    "all": replace(ObjectiveWeights(), future_window=0.5),
}
WITHOUT_SEED = ("rfm", "aggregates")
CUTOFFS = ("train", "test")
CONTROLS = ("random", "untrained")
COMBINED = "aggregates+default"
SHORT = {"logistic_regression": "lr", "gradient_boosting": "gbm"}
COLUMNS = ("churn_lr", "churn_gbm", "propensity_lr", "propensity_gbm")
ALL_PASSES = 1e9  # the number of steps was asked for: passes do not bound it
NEVER = 10**9  # validations or steps: all steps are taken, no state is written
PROBE_SEED = 0  # of the probes' held-out quarter: what varies is the encoder

Pair = tuple[np.ndarray, np.ndarray]
"""Columns (N, F) at the train and at the test cutoff."""


class Bench:
    """The users at both cutoffs and what is measured on them.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.data = Prepared.at(given.data)
        self.variants = dict(VARIANTS, **dict(map(parse_weights, given.weights)))
        self.kept = kept_results(given, self.data, "max_users")

    @cached_property
    def device(self) -> torch.device:
        """Where encoders compute."""
        return pick_device(self.given.device)

    @cached_property
    def cuts(self) -> tuple[Cut, Cut]:
        """The train and the test cutoff."""
        train_cut, test_cut = (self.data.cut(role, self.given.max_users) for role in CUTOFFS)
        return train_cut, test_cut

    @cached_property
    def tasks(self) -> tuple[Task, Task]:
        """Churn and propensity."""
        populations = [cut.population for cut in self.cuts]
        return churn_task(*populations), propensity_task(*populations)

    def judge(self, train_blocks: Blocks, test_blocks: Blocks) -> Result:
        """Return AUROC by task and probe: of propensity the mean over targets."""
        scores: Result = {}
        for task in self.tasks:
            for probe in PROBES if task.targets else ():
                fitted = fit_probes(
                    probe, train_blocks, task.train_labels, PROBE_SEED, self.given.threads
                )
                pairs = zip(task.test_labels, fitted.predict(test_blocks), strict=True)
                values = [estimate_auroc(y, p[:, 1], no_resamples(y)).value for y, p in pairs]
                scores[f"{task.name}_{SHORT[probe]}"] = float(np.mean(values))
        return scores

    def vectors(self, encoder: Encoder) -> Pair:
        """Return the embeddings at both cutoffs."""
        before, after = (cut.embed(encoder) for cut in self.cuts)
        return before, after

    def aggregates(self) -> tuple[Block, Block]:
        """Return the aggregates at both cutoffs."""
        before, after = (Block("aggregates", cut.aggregates) for cut in self.cuts)
        return before, after


def kept_results(given: argparse.Namespace, data: Prepared, *options: str) -> KeptResults:
    """Return the results under --out that count for this command line.

    Args:
        given: the command line.
        data: what is measured on.
        options: those that results depend on, beside what every such command has.
    """
    names = ("preset", "steps", "batch_tokens", *options)
    about = {**data.about, **{name: getattr(given, name) for name in names}}
    about["device"] = kind_of_device(given.device)
    return KeptResults(given.out, about, is_finished=given.finished)


def kind_of_device(name: str) -> str:
    """Return cpu or cuda; a GPU that is named need not be there to show what it measured."""
    return pick_device(name).type if name == "auto" else name


def no_resamples(labels: np.ndarray) -> np.ndarray:
    """Return the counts of no resample of users: the spread wanted is that over seeds."""
    return np.empty((0, len(labels)), np.uint16)


def measure_without_seed(bench: Bench, name: str) -> Result:
    """Judge RFM or the aggregates."""
    if name == "rfm":
        before, after = (Block("rfm", cut.population.rfm) for cut in bench.cuts)
    else:
        before, after = bench.aggregates()
    return {name: bench.judge((before,), (after,))}


def measure_control(bench: Bench, name: str, seed: int) -> Result:
    """Judge random vectors, or an encoder as it is before training."""
    facts = read_vocabulary_facts(bench.data.vocabulary)
    shape = EncoderConfig.named(bench.given.preset, facts.field_sizes)
    if name == "random":
        people = [cut.population for cut in bench.cuts]
        pair = [random_vectors(p.user_ids, p.cutoff, shape.width, seed) for p in people]
    else:
        torch.manual_seed(seed)
        pair = list(bench.vectors(Encoder(shape).eval().to(bench.device)))
    before, after = (Block("vector", values) for values in pair)
    return {name: bench.judge((before,), (after,))}


def measure_variant(bench: Bench, name: str, seed: int) -> Result:
    """Train a variant and judge its embeddings; the default also beside the aggregates."""
    folder = bench.given.out / "checkpoints" / f"{name}-{seed}"
    summary = train(
        bench.data.sequences("train"), bench.data.vocabulary, folder,
        training_config(bench.given, bench.variants[name], seed, bench.data, bench.device),
        report=tell_steps(name, seed), unfinished="discard",
    )  # fmt: skip
    encoder = load_checkpoint(summary.folder, str(bench.device)).encoder
    before, after = (Block("vector", values) for values in bench.vectors(encoder))
    result: Result = {name: bench.judge((before,), (after,))}
    if name == DEFAULT:
        known = bench.aggregates()
        result[COMBINED] = bench.judge((known[0], before), (known[1], after))
    shutil.rmtree(folder)
    facts = {"num_steps": summary.num_steps, "best_step": summary.best_step}
    return {**result, **facts, "seconds": round(summary.seconds, 1)}


def training_config(
    given: argparse.Namespace,
    weights: ObjectiveWeights,
    seed: int,
    data: PreparedFolder,
    device: torch.device,
) -> TrainingConfig:
    """Return how an encoder is trained; --steps are taken whatever the passes over the data."""
    return TrainingConfig.named(
        given.preset,
        seed=seed,
        weights=weights,
        max_steps=given.steps,
        max_passes=ALL_PASSES if given.steps else None,
        batch_tokens=given.batch_tokens,
        horizon_days=float(data.about["horizon_days"]),
        device=given.device,
        compile=given.compile,
        threads=given.threads if device.type == "cpu" else None,
    )


def tell_steps(name: str, seed: int, every: int = 100) -> Report:
    """Return what says on the error stream how far a training is, and after how long."""
    began = time.perf_counter()

    def report(done: int, total: int, message: str) -> None:
        if done % every == 0:
            spent = f"{time.perf_counter() - began:.0f} s"
            told = f"{name}, seed {seed}: {done}/{total} {spent} {message}"
            print(told, file=sys.stderr, flush=True)

    return report


def measure_all(bench: Bench) -> dict[str, list[dict[str, float]]]:
    """Return by row the scores of each seed, in the order of the table."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names_of_rows(bench)}
    for seed in bench.given.seeds:
        for result in filter(None, results_of(bench, seed)):
            for name in rows.keys() & result.keys():
                rows[name].append(result[name])
    return {name: scores for name, scores in rows.items() if scores}


def results_of(bench: Bench, seed: int) -> Iterator[Result | None]:
    """Yield the results of a seed, measured now or before."""
    result = bench.kept.result
    if seed == bench.given.seeds[0]:
        for name in chosen(bench, WITHOUT_SEED):
            yield result(name, seed, partial(measure_without_seed, bench, name))
    for name in chosen(bench, CONTROLS):
        yield result(name, seed, partial(measure_control, bench, name, seed))
    for name in chosen(bench, bench.variants):
        weights = asdict(bench.variants[name])
        measure = partial(measure_variant, bench, name, seed)
        yield result(name, seed, measure, weights=weights)


def chosen(bench: Bench, names: Iterable[str]) -> list[str]:
    """Return those of some rows that were asked for."""
    only = bench.given.only
    return [name for name in names if not only or name in only]


def names_of_rows(bench: Bench) -> list[str]:
    """Return the names of all rows that may come, in the order of the table."""
    return ["random", "untrained", *WITHOUT_SEED, *bench.variants, COMBINED]


def publish(bench: Bench, rows: dict[str, list[dict[str, float]]]) -> None:
    """Print one JSON line per row, then the table."""
    first = next(iter(rows.values()))[0] if rows else {}
    columns = [column for column in COLUMNS if column in first]
    train_cut, test_cut = bench.cuts
    sizes = {"train_users": len(train_cut.population), "test_users": len(test_cut.population)}
    for name, scores in rows.items():
        found = {column: mean_and_spread([each[column] for each in scores]) for column in columns}
        mean = float(np.mean([value for value, _ in found.values()]))
        more = {**bench.kept.about, **sizes, **found, "row": name, "seeds": len(scores)}
        if name in bench.variants:
            more["weights"] = asdict(bench.variants[name])
        print(json.dumps(measured("objectives", mean, "mean AUROC", **more)))
    lines = [
        [name, *(cell([each[column] for each in scores]) for column in columns)]
        for name, scores in rows.items()
    ]
    print(table([f"{bench.data.about['source']}, `{bench.given.preset}`", *columns], lines))


def parse_weights(text: str) -> tuple[str, ObjectiveWeights]:
    """Read a variant of one's own, `name:masked_event=0.5,silence=1`; what is not named is off."""
    name, _, parts = text.partition(":")
    pairs = [part.split("=") for part in parts.split(",")]
    return name, replace(OFF, **{objective: float(weight) for objective, weight in pairs})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "objectives")
    parser.add_argument("--only", type=names, default=[], help="rows, such as masked,default,rfm")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME:OBJECTIVE=WEIGHT,...",
        help="a further variant",
    )  # fmt: skip
    parser.add_argument("--max-users", type=int, default=20_000, help="probes' users at the most")
    return parser.parse_args(arguments)


def add_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add what every command has that trains variants of the encoder.

    Args:
        parser: gets the options.
        folder: where finished results are kept unless told otherwise.
    """
    parser.add_argument("--data", type=Path, required=True, help="what objectives_data.py wrote")
    parser.add_argument("--out", type=Path, default=Path(folder), help="finished results")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--steps", type=int, help="of each training; default the preset's")
    parser.add_argument("--batch-tokens", type=int, help="default the preset's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--finished", action="store_true", help="measure nothing, show what is there"
    )


def numbers(text: str) -> list[int]:
    """Read whole numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Read names with commas between them."""
    return text.split(",")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    try:
        bench = Bench(parse(arguments))
        publish(bench, measure_all(bench))
    except (PipelineError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
