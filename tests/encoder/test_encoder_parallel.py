"""Two gloo processes on a CPU, started by torchrun, beside one process with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from encoder_builders import random_rows, write_folders
from safetensors.torch import load_file
from torch import nn

from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.parallel import (
    TRAINING,
    VALIDATION,
    Model,
    Processes,
    Reducer,
    seed_for,
)
from behavior_pipeline.encoder.train import train

ALONE = Processes(0, 1, torch.device("cpu"))
MODULE = ("-m", "behavior_pipeline.encoder.train")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(folders, programs: tuple[str, ...], *more: str) -> Path:
    """Train in other processes; return the folder of the checkpoint."""
    arguments = ["--sequences", folders.sequences, "--vocabulary", folders.vocabulary]
    arguments += ["--out", folders.checkpoints, "--preset", "tiny", "--max-steps", "8"]
    arguments += ["--validate-every", "4", "--save-every", "3", "--threads", "1"]
    arguments += ["--batch-tokens", "256", "--validation-share", "0.2", *more]
    done = subprocess.run(
        [sys.executable, *programs, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    (folder,) = folders.checkpoints.iterdir()  # one checkpoint, and no state left
    assert done.stdout.count(str(folder)) == 1  # one process speaks
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, accumulate):
    two = write_folders(tmp_path / "two", random_rows(80))
    one = write_folders(tmp_path / "one", random_rows(80))
    ours = start(two, (*TORCHRUN, *MODULE), "--accumulate", str(accumulate))
    theirs = start(one, MODULE, "--accumulate", str(2 * accumulate))
    history, expected = (
        json.loads((folder / "training.json").read_text())["history"] for folder in (ours, theirs)
    )
    assert len(history) == len(expected) == 2
    for entry, other in zip(history, expected, strict=True):
        assert entry["events"] == other["events"]
        names = [name for name in other if name.startswith(("train_", "validation_"))]
        assert len(names) > 6
        found = [entry[name] for name in (*names, "gradient_norm")]
        assert found == pytest.approx(
            [other[name] for name in (*names, "gradient_norm")], rel=2e-4, abs=1e-5
        )
    weights, peer = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    moved = max((peer[name] - weights[name]).abs().max() for name in peer)
    assert moved < 1e-3  # some 30 times less than eight steps at a rate of 2e-3 can move a weight


@pytest.mark.slow
def test_a_head_that_one_process_has_no_use_for_counts_as_zero_there(tmp_path):
    out = tmp_path / "gradients.json"
    program = Path(__file__).with_name("unused_head.py")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(program), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    nobody, one, both, nobody_again = json.loads(out.read_text())
    assert nobody == nobody_again == 0.0
    assert one == pytest.approx(both / 2)
    assert both > 0


@dataclass
class Numbers:
    """A batch of numbers, each an event."""

    values: torch.Tensor

    @property
    def num_events(self) -> int:
        return len(self.values)


class Squares(nn.Module):
    """A loss that is a mean over a batch's events."""

    def forward(self, encoder: nn.Module, batch: Numbers) -> dict[str, torch.Tensor]:
        loss = (encoder(batch.values) - 1).square().mean()
        return {"squares": loss, "total": loss}


def gradients(encoder: nn.Module, batches: list[Numbers]) -> list[torch.Tensor]:
    """Return the gradients of a global batch made of micro-batches."""
    encoder.zero_grad()
    reducer = Reducer(Model(encoder, Squares(), is_parallel=False), ALONE)
    shares = reducer.shares([batch.num_events for batch in batches])
    for batch, share in zip(batches, shares, strict=True):
        with reducer.passes(is_last=batch is batches[-1]):
            (reducer.replica(batch)["total"] * share).backward()
    return [parameter.grad.clone() for parameter in encoder.parameters()]


def test_two_micro_batches_equal_one_of_both():
    torch.manual_seed(0)
    encoder, values = nn.Linear(3, 2), torch.randn(10, 3)
    apart = gradients(encoder, [Numbers(values[:3]), Numbers(values[3:])])  # of unlike size
    whole = gradients(encoder, [Numbers(values)])
    for one, other in zip(apart, whole, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_accumulating_trains_on_as_many_events_more(folders):
    given = {"max_steps": 4, "validate_every": 4, "threads": 1, "batch_tokens": 256}
    once = train(*folders, TrainingConfig.named("tiny", **given))
    twice = train(*folders, TrainingConfig.named("tiny", accumulate=2, **given))
    assert once.num_steps == twice.num_steps == 4
    assert twice.num_events_seen > 1.5 * once.num_events_seen


def test_few_data_are_not_passed_over_more_often_by_more_processes():
    config = TrainingConfig.named("small", max_steps=10_000, max_passes=10.0, accumulate=2)
    alone, together = (config.for_events(1_000_000, count).max_steps for count in (1, 4))
    assert alone == pytest.approx(4 * together, abs=4)


def test_every_micro_batch_has_random_streams_of_its_own():
    seeds = {
        seed_for(seed, kind, number)
        for seed in range(3)
        for kind in (TRAINING, VALIDATION)
        for number in range(200)
    }
    assert len(seeds) == 3 * 2 * 200
    assert seed_for(1, TRAINING, 2) == seed_for(1, TRAINING, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)
