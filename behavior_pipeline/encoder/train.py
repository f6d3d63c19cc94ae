"""Pretraining: sequence files in, the best checkpoint out.

Runs alone where only torch, numpy, pyarrow and safetensors are installed:
`python -m behavior_pipeline.encoder.train --sequences DIR --vocabulary DIR --out DIR --preset base`
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import (
    VocabularyFacts,
    read_vocabulary_facts,
    save_checkpoint,
)
from behavior_pipeline.encoder.configuration import PRESETS, EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import (
    BatchMaker,
    TrainingBatch,
    plan_cutoffs,
    window_rates,
)
from behavior_pipeline.encoder.inference import encode_files, read_out
from behavior_pipeline.encoder.objectives import Objectives
from behavior_pipeline.encoder.sequence_files import Survey, sequence_files, survey
from behavior_pipeline.errors import PipelineError

__all__ = ["TrainingConfig", "TrainingSummary", "train"]

Report = Callable[[int, int, str], None]
Losses = dict[str, float]

PRIOR_USERS = 4096
"""Users whose mean embedding becomes the prior of users without history."""


@dataclass(frozen=True)
class TrainingSummary:
    """What a training came to.

    Attributes:
        checkpoint_id: content hash of the checkpoint.
        folder: where it is.
        num_steps: optimiser steps taken.
        best_step: the step whose weights were kept.
        num_events_seen: events in the batches of all steps.
        seconds: wall time of the steps and validations.
        train_losses: per objective, mean since the validation before, one entry per validation.
        validation_losses: per objective, one entry per validation; empty without such users.
    """

    checkpoint_id: str
    folder: Path
    num_steps: int
    best_step: int
    num_events_seen: int
    seconds: float
    train_losses: dict[str, list[float]]
    validation_losses: dict[str, list[float]]

    @property
    def events_per_second(self) -> float:
        """Events trained on in a second of wall time."""
        return self.num_events_seen / max(self.seconds, 1e-9)


def report_nothing(_done: int, _total: int, _message: str) -> None:
    """Ignore progress."""


def train(
    sequences_folder: Path,
    vocabulary_folder: Path,
    checkpoints_folder: Path,
    config: TrainingConfig,
    report: Report = report_nothing,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingSummary:
    """Train an encoder and write its checkpoint.

    On a CPU the same sequences, vocabulary, configuration and number of threads give the same
    loss curve and the same checkpoint id. A killed training leaves nothing and begins again.

    Args:
        sequences_folder: Parquet files under contracts.SEQUENCES, all cut at one moment, which
            becomes `trained_through`.
        vocabulary_folder: `vocabulary.json` and `tokens.parquet`.
        checkpoints_folder: the checkpoint is written to a folder in it, named by its id.
        config: the training.
        report: called after each step with (steps done, steps in all, losses in words).
        log: called at each validation with the history's newest entry.

    Raises:
        PipelineError: if there are no sequences, or they were made with another vocabulary, or the
            vocabulary knows of later events than they hold.
    """
    files = sequence_files(sequences_folder)
    found = survey(files)
    facts = read_vocabulary_facts(vocabulary_folder)
    _check_vocabulary(facts, found, sequences_folder)
    config = config.for_events(found.num_events)
    shape = EncoderConfig.named(config.preset, facts.field_sizes)
    with _repeatable(config):
        run = _Run(files, found, shape, config)
        run.fit(report, log)
        set_prior(run.encoder, files)
    about = run.about() | {"vocabulary_id": found.vocabulary_id}
    folder = save_checkpoint(
        run.encoder, vocabulary_folder, checkpoints_folder, found.trained_through, about
    )
    return run.summary(folder)


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
def _repeatable(config: TrainingConfig) -> Iterator[None]:
    """Seed torch and fix its threads; put both back afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def pick_device(name: str) -> torch.device:
    """Return the device that a name means; `auto` prefers a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


@dataclass
class _Best:
    """The best weights so far."""

    step: int = 0
    loss: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)
    num_worse: int = 0

    def offer(self, step: int, loss: float, encoder: nn.Module) -> None:
        """Keep the weights if the loss is the lowest so far."""
        if loss < self.loss:
            self.step, self.loss, self.num_worse = step, loss, 0
            self.weights = {k: v.detach().cpu().clone() for k, v in encoder.state_dict().items()}
        else:
            self.num_worse += 1


class _Run:
    """One training: model, optimiser, data and what was seen so far."""

    def __init__(
        self, files: list[Path], found: Survey, shape: EncoderConfig, config: TrainingConfig
    ) -> None:
        self.config = config
        self.found = found
        self.device = pick_device(config.device)
        self.encoder = Encoder(shape).to(self.device)
        self.objectives = Objectives(self.encoder, config).to(self.device)
        self.batches = BatchMaker(files, shape, config, plan_cutoffs(found, config))
        self.optimizer = torch.optim.AdamW(
            _parameter_groups([self.encoder, self.objectives], config.weight_decay),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
        )
        self.best = _Best()
        self.history: list[dict[str, float]] = []
        self.num_steps = 0
        self.num_events = 0
        self.seconds = 0.0

    def fit(self, report: Report, log: Callable[[dict[str, Any]], None] | None) -> None:
        """Take steps until they are used up or validation stops improving; keep the best."""
        validation = self.batches.validation()
        self.objectives.silence.start_from(window_rates(validation))
        started = time.perf_counter()
        recent: list[Losses] = []
        for batch in self.batches.training():
            recent.append(self._step(batch))
            report(self.num_steps, self.config.max_steps, f"loss {recent[-1]['total']:.3f}")
            is_last = self.num_steps == self.config.max_steps
            if is_last or self.num_steps % self.config.validate_every == 0:
                entry = self._look_back(recent, validation)
                recent = []
                if log is not None:
                    log(entry)
                if is_last or self.best.num_worse >= self.config.patience:
                    break
        self.seconds = time.perf_counter() - started
        self.encoder.load_state_dict(self.best.weights)
        self.encoder.eval()

    def _step(self, batch: TrainingBatch) -> Losses:
        """Take one optimiser step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.num_steps, self.config)
        self.encoder.train()
        self.objectives.train()
        losses = self._losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.config.gradient_norm)
        self.optimizer.step()
        self.num_steps += 1
        self.num_events += batch.num_events
        return _numbers(losses)

    def _losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the losses of a batch; in bfloat16 where the device is a GPU."""
        is_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_gpu):
            losses: dict[str, Tensor] = self.objectives(self.encoder, batch.to(self.device))
        return losses

    def _look_back(self, recent: list[Losses], validation: list[TrainingBatch]) -> dict[str, float]:
        """Validate, remember the best weights and add an entry to the history."""
        entry = {"step": float(self.num_steps), "events": float(self.num_events)}
        entry |= {f"train_{name}": _mean([losses[name] for losses in recent]) for name in recent[0]}
        losses = self._validate(validation)
        entry |= {f"validation_{name}": value for name, value in losses.items()}
        # Without validation users there is nothing to choose by: the last weights are kept.
        self.best.offer(self.num_steps, losses.get("total", -self.num_steps), self.encoder)
        self.history.append(entry)
        return entry

    @torch.no_grad()
    def _validate(self, validation: list[TrainingBatch]) -> Losses:
        """Return the mean losses over the validation batches, with the same masks every time."""
        self.encoder.eval()
        self.objectives.eval()
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            each = [_numbers(self._losses(batch)) for batch in validation]
        return {name: _mean([losses[name] for losses in each]) for name in each[0]} if each else {}

    def about(self) -> dict[str, Any]:
        """Return what the checkpoint tells of its training."""
        return {
            "training_config": self.config.to_json(),
            "seed": self.config.seed,
            "history": self.history,
            "num_users": self.found.num_users,
            "num_events": self.found.num_events,
            "num_steps": self.num_steps,
            "best_step": self.best.step,
            "num_events_seen": self.num_events,
            "num_parameters": sum(p.numel() for p in self.encoder.parameters()),
            "seconds": self.seconds,
            "device": str(self.device),
        }

    def summary(self, folder: Path) -> TrainingSummary:
        """Return what the training came to."""
        return TrainingSummary(
            checkpoint_id=folder.name,
            folder=folder,
            num_steps=self.num_steps,
            best_step=self.best.step,
            num_events_seen=self.num_events,
            seconds=self.seconds,
            train_losses=curves(self.history, "train_"),
            validation_losses=curves(self.history, "validation_"),
        )


def curves(history: list[dict[str, float]], prefix: str) -> dict[str, list[float]]:
    """Return the history's columns with a prefix, without it."""
    names = [name for name in (history[0] if history else {}) if name.startswith(prefix)]
    return {name.removeprefix(prefix): [entry[name] for entry in history] for name in names}


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, then a cosine to a twentieth."""
    warmup = max(1, round(config.max_steps * config.warmup_share))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    return config.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def _parameter_groups(modules: list[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Decay the weights of linear layers; leave tables, norms, gains and biases alone."""
    decayed: dict[int, nn.Parameter] = {}
    others: dict[int, nn.Parameter] = {}
    for module in modules:
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                is_matrix = isinstance(part, nn.Linear) and name == "weight"
                (decayed if is_matrix else others)[id(parameter)] = parameter
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]


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


def _numbers(losses: dict[str, Tensor]) -> Losses:
    """Return losses as Python numbers."""
    return {name: float(value.detach()) for name, value in losses.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line, printing one line per validation."""
    parser = argparse.ArgumentParser(prog="python -m behavior_pipeline.encoder.train")
    parser.add_argument("--sequences", type=Path, required=True, help="folder of sequence files")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="shape of the encoder")
    for name, kind in (("max-steps", int), ("seed", int), ("threads", int), ("batch-tokens", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--horizon-days", type=float)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    given = vars(parser.parse_args(arguments))
    folders = [given.pop(name) for name in ("sequences", "vocabulary", "out")]
    config = TrainingConfig.named(given.pop("preset"), **given)
    summary = train(folders[0], folders[1], folders[2], config, log=_print_entry)
    sys.stdout.write(
        f"{summary.folder}  {summary.num_steps} steps, best {summary.best_step}, "
        f"{summary.events_per_second:,.0f} events/s\n"
    )


def _print_entry(entry: dict[str, Any]) -> None:
    """Print a history entry on one line."""
    sys.stdout.write("  ".join(f"{name} {value:.4g}" for name, value in entry.items()) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
