"""Our model, the data and the peers, made once for all figures of the encoder's benchmark."""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from encoder_data import Padded, describe, padded_batches, read_users
from encoder_profile import profiled, table
from encoder_rates import make_optimizer, precision, rates, training_step
from torch import Tensor

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import read_vocabulary_facts
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import BatchMaker, TrainingBatch, plan_cutoffs
from behavior_pipeline.encoder.objectives import Objectives
from behavior_pipeline.encoder.optimizer import Optimizer
from behavior_pipeline.encoder.parallel import Model, Processes, Reducer, compile_passes
from behavior_pipeline.encoder.sequence_files import sequence_files, survey

PASSES = 3  # a backward pass costs two forward passes
MAX_BATCHES = 8


class Training:
    """Our training as the run itself steps: its precision, optimizer and compilation."""

    def __init__(self, bench: Bench, processes: Processes) -> None:
        torch.manual_seed(0)
        self.encoder = Encoder(bench.shape).to(processes.device)
        objectives = Objectives(self.encoder, bench.config, processes.sum)
        objectives = objectives.to(processes.device)
        model = Model(self.encoder, objectives, is_parallel=processes.is_parallel)
        self.optimizer = Optimizer(model, bench.config)
        if bench.config.compile:
            compile_passes(model)
        model.train()
        self.reducer = Reducer(model, processes)
        self.is_mixed = bench.config.precision == "autocast"
        self.device = processes.device
        self.batches = [
            batch.to(self.device) for batch in bench.batches(processes.rank, processes.count)
        ]
        self.num_steps = 0

    def step(self) -> int:
        """Take a step on the next batch; return its number of events."""
        batch = self.batches[self.num_steps % len(self.batches)]
        (share,) = self.reducer.shares([batch.num_events])
        with self.reducer.passes(is_last=True):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_mixed):
                total = self.reducer.replica(batch)["total"]
            (total * share).backward()
        self.optimizer.step(self.num_steps)
        self.num_steps += 1
        return batch.num_events


class Bench:
    """The data and our model, made once for all figures."""

    def __init__(self, given: argparse.Namespace, users: Path) -> None:
        self.given = given
        self.users = users
        self.device = torch.device(given.device)
        facts = read_vocabulary_facts(given.vocabulary)
        self.shape = EncoderConfig.named(given.preset, facts.field_sizes)
        config = TrainingConfig.named(
            given.preset,
            batch_tokens=given.batch_tokens,
            precision=given.precision,
            compile=given.compile,
            attention=given.attention,
        )
        self.config = config.for_device(self.device.type)
        self.about = {
            "preset": given.preset,
            "precision": self.config.precision,
            "attention": self.config.attention,
            "batch_tokens": self.config.batch_tokens,
            "device": device_name(self.device),
            "torch": torch.__version__,
            **describe(users, self.shape.max_events),
        }
        self._ours: tuple[list[float], list[float]] | None = None

    def batches(self, rank: int = 0, world_size: int = 1) -> list[TrainingBatch]:
        """Return training batches of ours, on the CPU."""
        files = sequence_files(self.users)
        plan = plan_cutoffs(survey(files), self.config)
        maker = BatchMaker(files, self.shape, self.config, plan)
        return list(islice(maker.training(rank, world_size), MAX_BATCHES))

    def ours(self) -> tuple[list[float], list[float]]:
        """Return events a second and model FLOPs a second of our training, round by round."""
        if self._ours is None:
            training = Training(self, Processes(0, 1, self.device))
            events = rates(training.step, self.device, self.given.seconds)
            if self.given.profile:
                lines = table(profiled(training.step, self.device))
                print(lines, file=sys.stderr, flush=True)
            batches = self.batches()
            flops = sum(step_flops(training.encoder, batch) for batch in batches)
            each = flops / sum(batch.num_events for batch in batches)
            self._ours = events, [rate * each for rate in events]
            filled = statistics.mean(batch.fill_rate for batch in batches)
            self.about["fill_rate"] = round(filled, 4)
        return self._ours

    def peer(self, name: str, number_format: str) -> list[float]:
        """Return events a second of a padded peer's training; its batches lie on the device."""
        import encoder_peers  # noqa: PLC0415 - needs transformers, which train_mfu does not

        torch.manual_seed(0)
        model = getattr(encoder_peers, name)(self.shape).to(self.device).train()
        if name == "PlainTransformer" and self.given.compile:
            for layer in model.layers.layers:
                layer.compile()
        batches = [batch.to(self.device) for batch in self.padded()]

        def loss_of(number: int) -> tuple[Tensor, int]:
            batch = batches[number]
            return model(batch.ids, batch.is_event, batch.labels), batch.num_events

        context = partial(precision, self.device, number_format)
        step = training_step(loss_of, len(batches), make_optimizer([model], self.device), context)
        return rates(step, self.device, self.given.seconds)

    def padded(self) -> list[Padded]:
        """Return padded batches of the same users, as many as there are of ours."""
        table = read_users(self.users, MAX_BATCHES * self.given.peer_users)
        size = min(self.given.peer_users, len(table))
        return list(islice(padded_batches(table, size, self.shape.max_events), MAX_BATCHES))


def step_flops(encoder: Encoder, batch: TrainingBatch) -> int:
    """Return the model FLOPs of a training step on a batch."""
    causal, both_ways = batch.run_lengths()
    forward = encoder.flops_per_pass(causal, causal=True)
    forward += encoder.flops_per_pass(both_ways, causal=False)
    return PASSES * forward


def device_name(device: torch.device) -> str:
    """Return what a device calls itself."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
