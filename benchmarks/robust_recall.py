"""Does the robust loss serve rare actions? Recall of the next action in the test period.

Runs where only torch, numpy, pyarrow, safetensors and scikit-learn are installed, on a folder that
`objectives_data.py` wrote:

    python benchmarks/robust_recall.py --data DIR --seeds 0,1,2 --out DIR

The encoder is trained on the next event up to the train cutoff. All events between the train and
the test cutoff that have one before them are then predicted by the causal pass, the action that
ranks first of all counting. Recall is averaged over actions (macro) and over events (weighted).
Finished trainings are kept under --out; started again, the command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cached_property, partial

import numpy as np
import torch
from encoder_data import read_users
from figures import measured
from kept_results import Result, cell, mean_and_spread, table
from next_events import (
    ACTION,
    Windows,
    most_frequent,
    most_recent,
    predicted_actions,
    recalls,
    windows_from,
)
from objectives import ALL_PASSES, NEVER, add_options, kept_results, tell_steps
from quality_data import ALL_USERS, Prepared

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import read_vocabulary_facts
from behavior_pipeline.encoder.configuration import (
    EncoderConfig,
    ObjectiveWeights,
    TrainingConfig,
)
from behavior_pipeline.encoder.losses import FieldPrediction
from behavior_pipeline.encoder.meters import NoCurves
from behavior_pipeline.encoder.objectives import Objectives
from behavior_pipeline.encoder.parallel import Model, joining, pick_device
from behavior_pipeline.encoder.resume import StateFile
from behavior_pipeline.encoder.sequence_files import (
    SequenceTable,
    read_in_order,
    sequence_files,
    survey,
    to_microseconds,
)
from behavior_pipeline.encoder.train import log_nothing
from behavior_pipeline.encoder.training_run import TrainingRun, Watchers
from behavior_pipeline.errors import PipelineError

PLAIN = "cross-entropy"
NAIVE = ("most frequent", "most recent")
WEIGHTS = {"next": ObjectiveWeights(0.0, 1.0, 0.0, 0.0, 0.0), "default": ObjectiveWeights()}
METRICS = ("macro_recall", "weighted_recall")


class Bench:
    """The events that are predicted and what is kept of earlier runs.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.data = Prepared.at(given.data)
        facts = read_vocabulary_facts(self.data.vocabulary)
        self.shape = EncoderConfig.named(given.preset, facts.field_sizes)
        self.kept = kept_results(given, self.data, "objectives", "level", "tail_power")

    @cached_property
    def table(self) -> SequenceTable:
        """All users' histories up to the test cutoff."""
        return read_users(self.data.sequences("test"), ALL_USERS)

    @cached_property
    def windows(self) -> Windows:
        """What is predicted."""
        moment = to_microseconds(self.data.moment("train"))
        return windows_from(self.table, moment, self.shape.max_events)

    @cached_property
    def actual(self) -> np.ndarray:
        """The actions that are to be predicted."""
        return self.table.ids[ACTION][self.windows.places]


def measure_naive(bench: Bench, name: str) -> Result:
    """Judge a predictor that learns nothing."""
    actions = bench.table.ids[ACTION]
    if name == "most recent":
        return recalls(most_recent(actions, bench.windows.places), bench.actual)
    files = sequence_files(bench.data.sequences("train"))
    known = [part.ids[ACTION] for part in read_in_order(files, ALL_USERS)]
    return recalls(np.full(len(bench.actual), most_frequent(np.concatenate(known))), bench.actual)


def measure_trained(bench: Bench, share: float, seed: int) -> Result:
    """Train with a share of the worst mix, 0 for plain cross-entropy, and predict."""
    config = training_config(bench, share, seed)
    encoder, head = trained(bench, config)
    predicted = predicted_actions(encoder, head, bench.table, bench.windows)
    return recalls(predicted, bench.actual)


def training_config(bench: Bench, share: float, seed: int) -> TrainingConfig:
    """Return how a variant is trained."""
    given = bench.given
    return TrainingConfig.named(
        given.preset,
        seed=seed,
        weights=WEIGHTS[given.objectives],
        robust_share=share,
        robust_level=given.level,
        robust_tail_power=given.tail_power,
        max_steps=given.steps,
        max_passes=ALL_PASSES if given.steps else None,
        batch_tokens=given.batch_tokens,
        horizon_days=float(bench.data.about["horizon_days"]),
        patience=NEVER,
        save_every=0,
        device=given.device,
        compile=given.compile,
    )


def trained(bench: Bench, config: TrainingConfig) -> tuple[Encoder, FieldPrediction]:
    """Train; return encoder and the head of actions, on the CPU in float32.

    A checkpoint has no heads, so both are taken from the run: the weights' averages at its end.
    """
    files = sequence_files(bench.data.sequences("train"))
    found = survey(files)
    config = config.for_events(found.num_events).for_device(pick_device(config.device).type)
    torch.manual_seed(config.seed)
    with joining(config.device) as processes:
        run = TrainingRun(files, found, bench.shape, config, processes)
        report = tell_steps(f"robust_share {config.robust_share}", config.seed)
        state_file = StateFile(bench.given.out, {})  # never written: save_every is 0
        run.fit(Watchers(report, log_nothing, NoCurves()), state_file)
    encoder = Encoder(bench.shape)
    model = Model(encoder, Objectives(encoder, config), is_parallel=False)
    averages = run.optimizer.masters if run.averages is None else run.averages.averages
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in averages.items():
            parameters[name].copy_(value)
    head = model.objectives.next_event.prediction.heads[ACTION]
    return encoder.eval(), head.eval()


def name_of(share: float) -> str:
    """Return what a share of the worst mix is called."""
    return f"robust_share {share:g}" if share else PLAIN


def measure_all(bench: Bench) -> dict[str, list[Result]]:
    """Return by row the recalls of each seed."""
    wanted = [(name, 0, partial(measure_naive, bench, name)) for name in NAIVE]
    wanted += [
        (name_of(share), seed, partial(measure_trained, bench, share, seed))
        for seed in bench.given.seeds
        for share in (0.0, *bench.given.shares)
    ]
    rows: dict[str, list[Result]] = {}
    for name, seed, measure in wanted:
        found = bench.kept.result(name.replace(" ", "_"), seed, measure)
        if found is not None:
            rows.setdefault(name, []).append(found)
    return rows


def publish(bench: Bench, rows: dict[str, list[Result]]) -> None:
    """Print one JSON line per row, then the table."""
    if PLAIN not in rows:
        raise PipelineError(f"No training with {PLAIN} is finished in {bench.given.out}.")
    plain = {metric: np.mean([each[metric] for each in rows[PLAIN]]) for metric in METRICS}
    about = {**bench.kept.about, **sizes(bench)}
    lines = []
    for name, scores in rows.items():
        values = {metric: [each[metric] for each in scores] for metric in METRICS}
        change = {
            f"{m}_change": round(float(np.mean(values[m]) / plain[m]) - 1, 4) for m in METRICS
        }
        found = {metric: mean_and_spread(values[metric]) for metric in METRICS}
        more = {**about, **found, **change, "row": name, "seeds": len(scores)}
        value = found["macro_recall"][0]
        print(json.dumps(measured("robust_recall", value, "macro recall at 1", **more)))
        changes = [f"{change[f'{metric}_change']:+.1%}" for metric in METRICS]
        lines.append([name, *(cell(values[metric]) for metric in METRICS), *changes])
    head = [bench.data.about["source"], "macro recall", "weighted recall", "macro", "weighted"]
    print(table(head, lines))


def sizes(bench: Bench) -> dict[str, int]:
    """Return how many events are predicted, and how many of their period are not.

    Not predicted are those that no event is known before: a user's first, and what a list that was
    cut has lost, of which it is only known that it was before the list.
    """
    moment = to_microseconds(bench.data.moment("train"))
    in_period = int((bench.table.times >= moment).sum())
    predicted = len(bench.actual)
    _, counts = np.unique(bench.actual, return_counts=True)
    return {
        "events": predicted,
        "actions": len(counts),
        "fewest_events_of_an_action": int(counts.min(initial=predicted)),
        "events_without_one_before": in_period - predicted,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "robust_recall")
    parser.add_argument("--shares", type=decimals, default=[0.05, 0.07, 0.1], help="robust_share")
    parser.add_argument("--level", type=float, help="robust_level; default the configuration's")
    parser.add_argument("--tail-power", type=float, help="robust_tail_power; default likewise")
    parser.add_argument(
        "--objectives", choices=tuple(WEIGHTS), default="next", help="next alone, or all defaults"
    )
    return parser.parse_args(arguments)


def decimals(text: str) -> list[float]:
    """Read numbers with commas between them."""
    return [float(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    try:
        bench = Bench(given)
        publish(bench, measure_all(bench))
    except (PipelineError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
