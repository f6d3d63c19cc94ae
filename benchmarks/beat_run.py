"""BEAT's published run, repeated in kind: as many steps, as many events, three objectives.

BEAT (doi 10.5281/zenodo.20774886) took 10,350 steps with 86 M parameters over 18,401 sequences of
at most 256 events in 10 epochs, 16 sequences a step by that, in 27 minutes on two T4. Here a step
has about as many events as 16 full sequences, 4,096, and their masked copies.

Runs where only torch, numpy, pyarrow and safetensors are installed, on a folder that
`objectives_data.py` wrote; the curve is drawn where the whole package is:

    python benchmarks/beat_run.py --data DIR --out DIR
    python benchmarks/beat_run.py --data DIR --out DIR --device cuda --finished --picture FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from figures import measured
from kept_results import Result
from objectives import ALL_PASSES, NEVER, VARIANTS, kept_results, tell_steps
from quality_data import Prepared

from behavior_pipeline.encoder.configuration import PRESETS, TrainingConfig
from behavior_pipeline.encoder.train import train
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import read_json

STEPS = 10_350
STEP_TOKENS = 6_144  # 16 x 256 events, and copies with events hidden of half of the users
VALIDATIONS = 30
BEAT_SECONDS = 27 * 60


def trained(given: argparse.Namespace) -> Result:
    """Train; return sizes, times and the history."""
    data = Prepared.at(given.data)
    config = TrainingConfig.named(
        given.preset,
        seed=given.seed,
        weights=VARIANTS["beat"],
        max_steps=given.steps,
        max_passes=ALL_PASSES,
        batch_tokens=given.batch_tokens,
        horizon_days=float(data.about["horizon_days"]),
        validate_every=max(1, given.steps // VALIDATIONS),
        patience=NEVER,
        save_every=NEVER,
        max_validation_users=1024,
        device=given.device,
    )
    checkpoints = given.out / "checkpoints"
    report = tell_steps("beat", given.seed, every=1000)
    summary = train(
        data.sequences("train"), data.vocabulary, checkpoints, config, report, unfinished="discard"
    )
    card = read_json(summary.folder / "training.json")
    names = ("num_parameters", "device", "num_events_seen", "num_steps", "seconds", "torch")
    return {**{name: card[name] for name in names}, "history": summary.history}


def publish(given: argparse.Namespace, found: Result) -> None:
    """Print the JSON line, and draw the losses where that is wanted."""
    history = [without_silence(entry) for entry in found.pop("history")]
    ends = {
        f"{kind}_{name}": [round(history[0][key], 4), round(history[-1][key], 4)]
        for kind in ("train", "validation")
        for name in ("masked_event", "next_event", "contrastive", "total")
        if (key := f"{kind}_{name}") in history[0]
    }
    seconds = found.pop("seconds")
    more = {**found, **ends, "peer": "BEAT on two T4", "peer_value": BEAT_SECONDS}
    print(json.dumps(measured("beat_run", seconds, "s", **more)))
    if given.picture:
        from behavior_pipeline.defs.loss_curve import draw_losses  # noqa: PLC0415 - the whole package

        given.picture.write_bytes(draw_losses(history))


def without_silence(entry: dict[str, float]) -> dict[str, float]:
    """Leave out the objective that BEAT does not have, whose loss is told but not learned from."""
    return {name: value for name, value in entry.items() if not name.endswith("_silence")}


def result(given: argparse.Namespace) -> Result:
    """Return the run's result, measured now or before.

    Raises:
        PipelineError: if only a finished run is to be shown and there is none.
    """
    kept = kept_results(given, Prepared.at(given.data))
    found = kept.result("beat", given.seed, lambda: trained(given))
    if found is None:
        raise PipelineError(f"No such run is finished in {given.out}.")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="what objectives_data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("beat_run"), help="the finished run")
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-tokens", type=int, default=STEP_TOKENS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--picture", type=Path, help="PNG of the losses that is written")
    parser.add_argument("--finished", action="store_true", help="only show what is there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, or read what was trained, and print."""
    given = parse(arguments)
    try:
        publish(given, result(given))
    except (PipelineError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
