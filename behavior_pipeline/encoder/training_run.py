"""One training: model, optimizer, data, and what was seen so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.averaging import AveragedWeights
from behavior_pipeline.encoder.best_weights import BestWeights
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import BatchMaker, TrainingBatch, plan_cutoffs
from behavior_pipeline.encoder.heads import KEPT, kept_heads
from behavior_pipeline.encoder.meters import Curves, LossSums, Meters, Work, work_of
from behavior_pipeline.encoder.objectives import Objectives
from behavior_pipeline.encoder.optimizer import Optimizer
from behavior_pipeline.encoder.parallel import (
    TRAINING,
    VALIDATION,
    Model,
    Processes,
    Reducer,
    compile_passes,
    seed_for,
)
from behavior_pipeline.encoder.prefetch import made_ahead
from behavior_pipeline.encoder.resume import StateFile, TrainingState
from behavior_pipeline.encoder.schedule import rate_share
from behavior_pipeline.encoder.sequence_files import Survey
from behavior_pipeline.errors import PipelineError

Report = Callable[[int, int, str], None]
Losses = dict[str, float]

SHORT_PASS: Final = 32_768
"""Tokens up to which a pass is replayed on a GPU: starting the kernels of one takes some 40 ms of a
core, an H100 some 45 ms for the `base` pass of as many tokens."""


class Watchers(NamedTuple):
    """Who follows a training; only the first process has any.

    Attributes:
        report: called after each step with (steps done, steps in all, the latest loss in words).
        log: called at each validation with the history's newest entry.
        curves: gets scalars every `log_every` steps and at validations.
    """

    report: Report
    log: Callable[[dict[str, Any]], None]
    curves: Curves


class MicroBatch(NamedTuple):
    """A batch ready for its passes.

    Attributes:
        number: its place in the stream of all processes' micro-batches.
        batch: on the host, pinned if a GPU will want it.
        work: what the passes over it compute.
    """

    number: int
    batch: TrainingBatch
    work: Work


class TrainingRun:
    """Takes the steps of a training.

    Args:
        files: sequence files.
        found: what they hold.
        shape: of the encoder.
        config: the training.
        processes: those that share it.
    """

    def __init__(
        self,
        files: list[Path],
        found: Survey,
        shape: EncoderConfig,
        config: TrainingConfig,
        processes: Processes,
    ) -> None:
        self.config = config
        self.processes = processes
        self.batches = BatchMaker(files, shape, config, plan_cutoffs(found, config))
        self.encoder = Encoder(shape).to(processes.device)
        self.objectives = Objectives(self.encoder, config, processes.sum).to(processes.device)
        self.validation = self.batches.validation()
        # Before the optimizer and the averages take what they start from.
        self.objectives.start_from(self.validation)
        self.model = Model(self.encoder, self.objectives, is_parallel=processes.is_parallel)
        self.optimizer = Optimizer(self.model, config)
        self.averages = (
            AveragedWeights(self.optimizer.masters, config.ema_decay) if config.ema_decay else None
        )
        self.best = BestWeights()
        self.since_validation = LossSums(processes)
        self.since_look = LossSums(processes)
        self.meters = Meters(processes)
        self.latest: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.num_steps = 0
        self.num_events = 0
        self.seconds = 0.0

    def fit(self, watchers: Watchers, state_file: StateFile) -> None:
        """Take steps until they are used up or validation stops improving; keep the best weights.

        Goes on from the state on disk, if there is one.

        Raises:
            PipelineError: if the loss ceases to be a number.
        """
        state = state_file.read()
        if state is not None:
            self._load(state)
        if self.config.compile:
            compile_passes(self.model, is_replayed=self._is_short())
        reducer = Reducer(self.model, self.processes)
        began = time.perf_counter() - self.seconds
        with closing(self._micro_batches()) as batches:
            self.meters.restart()
            while not self._is_over():
                self._step(reducer, batches)
                self._after_step(watchers)
                self.seconds = time.perf_counter() - began
                if self._is_due(self.config.save_every) and not self._is_over():
                    self._save(state_file)
        self.best.put_into(self.encoder)
        self.encoder.eval()

    @property
    def heads(self) -> dict[str, Tensor]:
        """The next-event heads that go with the best weights, by name."""
        return {
            name.removeprefix(KEPT): value
            for name, value in self.best.weights.items()
            if name.startswith(KEPT)
        }

    def _is_short(self) -> bool:
        """Tell whether a GPU is done with a pass before its kernels are started one by one."""
        is_alone = not self.processes.is_parallel and self.config.accumulate == 1
        is_gpu = self.processes.device.type == "cuda"
        return is_gpu and is_alone and self.config.batch_tokens <= SHORT_PASS

    def _micro_batches(self) -> Generator[MicroBatch]:
        """Yield this process's micro-batches from where the steps are, made ahead by a thread."""
        rank, world_size = self.processes.rank, self.processes.count
        skip = self.num_steps * self.config.accumulate
        numbers = count(skip * world_size + rank, world_size)
        drawn = self.batches.training(rank, world_size, skip)
        prepared = map(self._prepare, numbers, drawn)
        yield from made_ahead(prepared, self.config.prefetch) if self.config.prefetch else prepared

    def _prepare(self, number: int, batch: TrainingBatch) -> MicroBatch:
        """Make a batch ready, in the thread that makes batches."""
        work = work_of(self.encoder, batch)
        if self.processes.device.type == "cuda":
            # A thread begins with the first GPU, and pinning would take some of its memory.
            torch.cuda.set_device(self.processes.device)
            batch = batch.pin_memory()
        return MicroBatch(number, batch, work)

    def _step(self, reducer: Reducer, batches: Iterator[MicroBatch]) -> None:
        """Take one optimizer step; nothing here waits for the device."""
        group = [next(batches) for _ in range(self.config.accumulate)]
        shares = reducer.shares([each.batch.num_events for each in group])
        self.model.train()
        for each, share in zip(group, shares, strict=True):
            with reducer.passes(is_last=each is group[-1]):
                losses = self._losses(reducer.replica, TRAINING, each.number, each.batch)
                (losses["total"] * share).backward()  # type: ignore[no-untyped-call]
            for sums in (self.since_validation, self.since_look):
                sums.add(losses, each.batch.num_events)
            self.meters.add(each.batch.num_events, each.work)
        self.gradient_norm = self.optimizer.step(self.num_steps)
        if self.averages is not None:
            self.averages.update()
        self.num_steps += 1

    def _losses(
        self, module: torch.nn.Module, kind: int, number: int, batch: TrainingBatch
    ) -> dict[str, Tensor]:
        """Return the losses of a micro-batch, whose number decides the random ones."""
        torch.manual_seed(seed_for(self.config.seed, kind, number))
        device = self.processes.device
        is_mixed = self.config.precision == "autocast"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_mixed):
            losses: dict[str, Tensor] = module(batch.to(device, non_blocking=True))
        return losses

    def _is_over(self) -> bool:
        """Tell whether the steps are used up or validation has stopped improving."""
        return (
            self.num_steps >= self.config.max_steps or self.best.num_worse >= self.config.patience
        )

    def _is_due(self, every: int) -> bool:
        """Tell whether this step is one at which something is due that happens so often."""
        return every > 0 and self.num_steps % every == 0

    def _after_step(self, watchers: Watchers) -> None:
        """Look at the meters, validate and tell the watchers, where that is due."""
        config = self.config
        is_validation = self._is_due(config.validate_every) or self.num_steps == config.max_steps
        if is_validation or self._is_due(config.log_every) or self._is_due(config.save_every):
            self._look(watchers.curves)
        if is_validation:
            entry = self._look_back()
            validated = {n: value for n, value in entry.items() if n.startswith("validation_")}
            watchers.curves.add(validated, self.num_steps)
            watchers.log(entry)
            self.meters.restart()
        loss = self.latest.get("train_total")
        words = "" if loss is None else f"loss {loss:.3f}"
        watchers.report(self.num_steps, config.max_steps, words)

    def _look(self, curves: Curves) -> None:
        """Wait for the device and read the meters."""
        losses, _ = self.since_look.means()
        _check_number(losses, self.num_steps)
        self.since_look.clear()
        share = rate_share(self.num_steps - 1, self.config)
        self.latest = {f"train_{name}": loss for name, loss in losses.items()}
        self.latest |= {
            "learning_rate": share * self.config.learning_rate,
            "gradient_norm": float(self.gradient_norm),
            **self.meters.look(),
        }
        curves.add(self.latest, self.num_steps)

    def _look_back(self) -> dict[str, float]:
        """Validate, remember the best weights and add an entry to the history."""
        means, num_events = self.since_validation.means()
        self.since_validation.clear()
        self.num_events += int(num_events)
        losses, is_averaged = self._validate_both()
        self._offer(losses, is_averaged=is_averaged)
        entry = {"step": float(self.num_steps), "events": float(self.num_events), **self.latest}
        entry |= {f"train_{name}": loss for name, loss in means.items()}
        entry |= {f"validation_{name}": loss for name, loss in losses.items()}
        entry["is_averaged"] = float(is_averaged)
        self.history.append(entry)
        return entry

    def _offer(self, losses: Losses, *, is_averaged: bool) -> None:
        """Keep the weights that were validated if they are the best so far."""
        # Without validation users there is nothing to choose by: the last weights are kept.
        loss = self.processes.agree(losses.get("total", -float(self.num_steps)))
        source = self.optimizer.masters
        if is_averaged and self.averages is not None:
            source = self.averages.averages
        of_encoder = {
            name.removeprefix("encoder."): weights
            for name, weights in source.items()
            if name.startswith("encoder.")
        }
        kept = of_encoder | kept_heads(source)
        self.best.offer(self.num_steps, loss, kept, is_averaged=is_averaged)

    def _validate_both(self) -> tuple[Losses, bool]:
        """Validate the weights and their averages; return the better losses and whose they are."""
        losses = self._validate()
        if self.averages is None or not losses:
            return losses, False
        with self.averages.standing_in(self.optimizer.parameters):
            averaged = self._validate()
        is_better = self.processes.agree(float(averaged["total"] < losses["total"])) > 0
        return (averaged, True) if is_better else (losses, False)

    @torch.no_grad()
    def _validate(self) -> Losses:
        """Return the mean losses over the validation batches, with the same masks every time.

        Each process takes its part of the batches.
        """
        if not self.validation:
            return {}
        self.model.eval()
        sums = self.since_validation.empty_copy()
        for number in range(self.processes.rank, len(self.validation), self.processes.count):
            losses = self._losses(self.model, VALIDATION, number, self.validation[number])
            sums.add(losses, 1.0)
        means, _ = sums.means()
        _check_number(means, self.num_steps)
        return means

    def _save(self, state_file: StateFile) -> None:
        """Write the state from which a killed training goes on."""
        tensors = self.optimizer.tensors()
        tensors |= {f"best/{name}": value for name, value in self.best.weights.items()}
        if self.averages is not None:
            tensors |= {f"averages/{name}": v for name, v in self.averages.averages.items()}
        tensors |= {f"buffers/{n}": value for n, value in self.objectives.named_buffers()}
        tensors["since_validation"] = self.since_validation.tensors()
        facts = {
            "num_steps": self.num_steps,
            "num_events": self.num_events,
            "seconds": self.seconds,
            "history": self.history,
            "latest": self.latest,
            "best": self.best.facts(),
            "loss_names": self.since_validation.names,
        }
        if self.processes.is_first:
            state_file.write(TrainingState(tensors, facts))
        self.meters.restart()

    def _load(self, state: TrainingState) -> None:
        """Go back to where a state was written."""
        facts = state.facts
        self.optimizer.load(state.tensors)
        if self.averages is not None:
            self.averages.load(state.below("averages/"), facts["num_steps"])
        kept = state.below("buffers/")
        for name, buffer in self.objectives.named_buffers():
            buffer.copy_(kept[name])
        self.best = BestWeights(**facts["best"], weights=state.below("best/"))
        self.since_validation.load(facts["loss_names"], state.tensors["since_validation"])
        self.num_steps, self.num_events = facts["num_steps"], facts["num_events"]
        self.seconds, self.history = facts["seconds"], facts["history"]
        self.latest = facts["latest"]


def _check_number(losses: Losses, step: int) -> None:
    """Refuse to go on with weights that are lost."""
    if "total" in losses and not abs(losses["total"]) < float("inf"):
        raise PipelineError(
            f"The loss at step {step} is {losses['total']}: the training has diverged.",
            "Train with lower learning rates.",
        )
