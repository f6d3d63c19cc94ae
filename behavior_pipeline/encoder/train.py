"""Pretraining: sequence files in, the best checkpoint out.

Runs alone where only torch, numpy, pyarrow and safetensors are installed:
`python -m behavior_pipeline.encoder.train --sequences DIR --vocabulary DIR --out DIR --preset base`
and on several GPUs as `torchrun --nproc-per-node 2 -m behavior_pipeline.encoder.train …`.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import (
    ID_LENGTH,
    VocabularyFacts,
    read_vocabulary_facts,
    save_checkpoint,
)
from behavior_pipeline.encoder.configuration import (
    OPTIMIZERS,
    PRECISIONS,
    PRESETS,
    EncoderConfig,
    TrainingConfig,
)
from behavior_pipeline.encoder.inference import encode_files, read_out
from behavior_pipeline.encoder.meters import Curves, open_curves
from behavior_pipeline.encoder.parallel import Processes, joining
from behavior_pipeline.encoder.resume import StateFile, digest_of_files, digest_of_folder
from behavior_pipeline.encoder.sequence_files import Survey, sequence_files, survey
from behavior_pipeline.encoder.training_run import Report, TrainingRun, Watchers
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import remove_leftovers

__all__ = ["TrainingConfig", "TrainingSummary", "train"]

PRIOR_USERS = 4096
"""Users whose mean embedding becomes the prior of users without history."""

Unfinished = Literal["own", "discard", "fresh"]
"""What becomes of the state of an unfinished training; see `train`."""

_HARMLESS: Final = {"prefetch", "log_every", "save_every"}
"""What may differ when a training goes on: losses do not depend on it."""

_WHOLE_NUMBERS: Final = (
    "max-steps", "seed", "threads", "batch-tokens", "accumulate", "validate-every", "save-every",
    "log-every",
)  # fmt: skip
_NUMBERS: Final = (
    "horizon-days", "learning-rate", "muon-learning-rate", "ema-decay", "validation-share",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingSummary:
    """What a training came to.

    Attributes:
        checkpoint_id: content hash of the checkpoint.
        folder: where it is.
        num_steps: optimizer steps taken.
        best_step: the step whose weights were kept.
        num_events_seen: events in the batches of all steps.
        seconds: wall time of the steps and validations, those before an interruption included.
        history: one entry per validation: losses, rates, throughput, memory.
    """

    checkpoint_id: str
    folder: Path
    num_steps: int
    best_step: int
    num_events_seen: int
    seconds: float
    history: list[dict[str, float]]

    @property
    def train_losses(self) -> dict[str, list[float]]:
        """Per objective, the mean since the validation before, one entry per validation."""
        return curves(self.history, "train_")

    @property
    def validation_losses(self) -> dict[str, list[float]]:
        """Per objective, one entry per validation; empty without such users."""
        return curves(self.history, "validation_")

    @property
    def events_per_second(self) -> float:
        """Events trained on in a second of wall time, validations included."""
        return self.num_events_seen / max(self.seconds, 1e-9)


def report_nothing(_done: int, _total: int, _message: str) -> None:
    """Ignore progress."""


def log_nothing(_entry: dict[str, Any]) -> None:
    """Ignore an entry of the history."""


def train(
    sequences_folder: Path,
    vocabulary_folder: Path,
    checkpoints_folder: Path,
    config: TrainingConfig,
    report: Report = report_nothing,
    log: Callable[[dict[str, Any]], None] = log_nothing,
    *,
    curves_folder: Path | None = None,
    unfinished: Unfinished = "own",
) -> TrainingSummary:
    """Train an encoder and write its checkpoint.

    On a CPU the same sequences, vocabulary, configuration and number of threads give the same
    loss curve and the same checkpoint id, also if the training was killed and started again: it
    goes on from the last state that it wrote. Under torchrun the processes share the training; the
    first of them writes.

    Args:
        sequences_folder: Parquet files under contracts.SEQUENCES, all cut at one moment, which
            becomes `trained_through`.
        vocabulary_folder: `vocabulary.json` and `tokens.parquet`.
        checkpoints_folder: the checkpoint is written to a folder in it, named by its id; the state
            of an unfinished training to a hidden file in it.
        config: the training.
        report: called after each step with (steps done, steps in all, losses in words).
        log: called at each validation with the history's newest entry.
        curves_folder: TensorBoard event files go to a folder in it, if tensorboard is installed.
        unfinished: what becomes of the state of an unfinished training that is there. `own`: go on
            from it, refuse that of another training; `discard`: go on from it, remove that of
            another; `fresh`: remove it and begin anew.

    Raises:
        PipelineError: if there are no sequences, or they were made with another vocabulary, or the
            vocabulary knows of later events than they hold, or the state of another training is
            there, or the loss ceases to be a number.
    """
    files = sequence_files(sequences_folder)
    found = survey(files)
    facts = read_vocabulary_facts(vocabulary_folder)
    _check_vocabulary(facts, found, sequences_folder)
    with joining(config.device) as processes, _repeatable(config, processes.device):
        config = config.for_events(found.num_events, processes.count)
        config = config.for_device(processes.device.type)
        identity = _identity(config, processes, digest_of_files(files), vocabulary_folder)
        state_file = StateFile(checkpoints_folder, identity)
        _make_way(state_file, processes, unfinished)
        shape = EncoderConfig.named(config.preset, facts.field_sizes)
        run = TrainingRun(files, found, shape, config, processes)
        with closing(_open_curves(curves_folder, state_file, processes)) as curves_out:
            run.fit(_watchers(processes, report, log, curves_out), state_file)
        checkpoint_id = ""
        if processes.is_first:
            set_prior(run.encoder, files)
            about = _about(run, found)
            checkpoint_id = save_checkpoint(
                run.encoder, vocabulary_folder, checkpoints_folder, found.trained_through, about,
                run.heads,
            ).name  # fmt: skip
            state_file.discard()
        return _summary(run, checkpoints_folder / processes.agree_on(checkpoint_id, ID_LENGTH))


def _check_vocabulary(facts: VocabularyFacts, found: Survey, sequences_folder: Path) -> None:
    """Refuse a vocabulary that is not that of the sequences, or that looked past their end."""
    if facts.vocabulary_id != found.vocabulary_id:
        raise PipelineError(
            f"The sequences in {sequences_folder} were made with the vocabulary "
            f"{found.vocabulary_id}, not with {facts.vocabulary_id}.",
            "Write the sequences again.",
        )
    if facts.trained_through > found.trained_through:
        raise PipelineError(
            f"The vocabulary counts events up to {facts.trained_through:%Y-%m-%d}, the sequences "
            f"in {sequences_folder} end at {found.trained_through:%Y-%m-%d}.",
            "Build the vocabulary for the cutoff of the sequences.",
        )


@contextmanager
def _repeatable(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Seed torch and fix its threads and its float32 products; put all back afterwards."""
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.threads or threads)
        torch.set_float32_matmul_precision("high" if device.type == "cuda" else products)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(products)


def _identity(
    config: TrainingConfig, processes: Processes, sequences: str, vocabulary_folder: Path
) -> dict[str, Any]:
    """Return what tells a training from others whose states might be there."""
    given = {name: value for name, value in config.to_json().items() if name not in _HARMLESS}
    return {
        **given,
        "device": processes.device.type,
        "processes": processes.count,
        "sequences": sequences,
        "vocabulary": digest_of_folder(vocabulary_folder),
    }


def _make_way(state_file: StateFile, processes: Processes, unfinished: Unfinished) -> None:
    """Remove what killed trainings left half written, and a state that is not to be gone on from.

    Raises:
        PipelineError: if the state of another training is there and is to be refused.
    """
    if processes.is_first:
        remove_leftovers(state_file.path.parent)
        if unfinished == "fresh" or (unfinished == "discard" and not state_file.is_own()):
            state_file.discard()
    processes.wait()
    state_file.check()


def _open_curves(folder: Path | None, state_file: StateFile, processes: Processes) -> Curves:
    """Return where curves go: a folder for each training, and nowhere but in the first process."""
    if folder is None or not processes.is_first:
        return open_curves(None)
    return open_curves(folder / state_file.digest)


def _watchers(
    processes: Processes,
    report: Report,
    log: Callable[[dict[str, Any]], None],
    curves_out: Curves,
) -> Watchers:
    """Let only the first process tell of the training."""
    if processes.is_first:
        return Watchers(report, log, curves_out)
    return Watchers(report_nothing, log_nothing, curves_out)


def _about(run: TrainingRun, found: Survey) -> dict[str, Any]:
    """Return what the checkpoint tells of its training."""
    device = run.processes.device
    is_gpu = device.type == "cuda"
    return {
        "training_config": run.config.to_json(),
        "vocabulary_id": found.vocabulary_id,
        "seed": run.config.seed,
        "history": run.history,
        "num_users": found.num_users,
        "num_events": found.num_events,
        "started_at": found.started_at.isoformat(),
        "num_steps": run.num_steps,
        "best_step": run.best.step,
        "is_averaged": run.best.is_averaged,
        "num_events_seen": run.num_events,
        "num_parameters": sum(p.numel() for p in run.encoder.parameters()),
        "seconds": run.seconds,
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine() + " CPU",
        "num_processes": run.processes.count,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _summary(run: TrainingRun, folder: Path) -> TrainingSummary:
    """Return what the training came to."""
    return TrainingSummary(
        checkpoint_id=folder.name,
        folder=folder,
        num_steps=run.num_steps,
        best_step=run.best.step,
        num_events_seen=run.num_events,
        seconds=run.seconds,
        history=run.history,
    )


def curves(history: list[dict[str, float]], prefix: str) -> dict[str, list[float]]:
    """Return the history's columns with a prefix, without it."""
    names = [name for name in (history[0] if history else {}) if name.startswith(prefix)]
    return {name.removeprefix(prefix): [entry[name] for entry in history] for name in names}


def set_prior(encoder: Encoder, files: list[Path]) -> None:
    """Make the mean embedding of the first users with a history the encoder's prior."""
    total, count = np.zeros(encoder.embedding_width), 0
    for part in encode_files(encoder, files, chunk_users=PRIOR_USERS):
        has_history = part.table.lengths > 0
        embeddings = read_out(encoder, part.states, part.silence_days)[has_history]
        total += embeddings.sum(0, dtype=np.float64)
        count += len(embeddings)
        if count >= PRIOR_USERS:
            break
    encoder.set_prior(torch.from_numpy((total / max(count, 1)).astype(np.float32)))


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line, printing one line per validation."""
    given = vars(_parser().parse_args(arguments))
    folders = [given.pop(name) for name in ("sequences", "vocabulary", "out")]
    curves_folder, is_fresh = given.pop("curves"), given.pop("fresh")
    config = TrainingConfig.named(given.pop("preset"), **given)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        summary = train(
            folders[0], folders[1], folders[2], config, log=_print_entry,
            curves_folder=curves_folder, unfinished="fresh" if is_fresh else "own",
        )  # fmt: skip
    except PipelineError as error:
        sys.exit(str(error) if is_first else 1)
    if is_first:
        sys.stdout.write(
            f"{summary.folder}  {summary.num_steps} steps, best {summary.best_step}, "
            f"{summary.events_per_second:,.0f} events/s\n"
        )


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is not given is as the preset has it."""
    parser = argparse.ArgumentParser(prog="python -m behavior_pipeline.encoder.train")
    parser.add_argument("--sequences", type=Path, required=True, help="folder of sequence files")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--curves", type=Path, help="folder of TensorBoard event files")
    parser.add_argument("--fresh", action="store_true", help="discard an unfinished training")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="shape of the encoder")
    for name in _WHOLE_NUMBERS:
        parser.add_argument(f"--{name}", type=int)
    for name in _NUMBERS:
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--optimizer", choices=OPTIMIZERS)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    return parser


def figures_in_words(entry: dict[str, Any]) -> str:
    """Return a history entry on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in entry.items())


def _print_entry(entry: dict[str, Any]) -> None:
    """Print a history entry."""
    sys.stdout.write(figures_in_words(entry) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
