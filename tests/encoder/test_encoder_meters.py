from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_builders import SIZES

from behavior_pipeline.encoder import meters
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import BatchMaker, plan_cutoffs
from behavior_pipeline.encoder.meters import LossSums, Meters, Work, peak_flops, work_of
from behavior_pipeline.encoder.parallel import Processes
from behavior_pipeline.encoder.sequence_files import sequence_files, survey
from behavior_pipeline.encoder.train import train

ALONE = Processes(0, 1, torch.device("cpu"))


def tiny(**changes: Any) -> TrainingConfig:
    return TrainingConfig.named(
        "tiny", **{"max_steps": 6, "validate_every": 3, "threads": 1, "log_every": 2, **changes}
    )


def test_losses_are_weighted_means_and_begin_anew():
    sums = LossSums(ALONE)
    assert sums.means() == ({}, 0.0)
    sums.add({"a": torch.tensor(1.0), "total": torch.tensor(10.0)}, 1)
    sums.add({"a": torch.tensor(4.0), "total": torch.tensor(40.0)}, 3)
    assert sums.means() == ({"a": 3.25, "total": 32.5}, 4.0)
    sums.clear()
    sums.add({"a": torch.tensor(7.0), "total": torch.tensor(8.0)}, 2)
    assert sums.means() == ({"a": 7.0, "total": 8.0}, 2.0)
    restored = LossSums(ALONE)
    restored.load(sums.names, sums.tensors())
    assert restored.means() == sums.means()


def test_throughput_and_mfu_are_of_the_span_since_the_last_look(monkeypatch):
    now = iter([0.0, 2.0, 2.0, 6.0, 6.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(meters, "peak_flops", lambda _device: 1000.0)
    counted = Meters(ALONE)
    counted.add(100, Work(tokens=120, flops=500.0))
    counted.add(100, Work(tokens=120, flops=500.0))
    first = counted.look()
    assert (first["events_per_second"], first["tokens_per_second"]) == (100.0, 120.0)
    assert first["mfu"] == 0.5
    assert first["peak_memory_gigabytes"] > 0
    counted.add(40, Work(tokens=40, flops=40.0))
    assert counted.look()["events_per_second"] == 10.0


def test_no_mfu_where_the_best_is_not_known():
    assert peak_flops(torch.device("cpu")) is None
    assert "mfu" not in Meters(ALONE).look()


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Other", None)]
)
def test_the_peak_goes_by_the_device_s_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_the_work_of_a_batch_is_that_of_its_runs(folders):
    config, files = tiny(), sequence_files(folders.sequences)
    shape = EncoderConfig.named("tiny", SIZES)
    maker = BatchMaker(files, shape, config, plan_cutoffs(survey(files), config))
    encoder, batch = Encoder(shape), next(maker.training())
    work = work_of(encoder, batch)
    assert work.tokens == batch.num_events + batch.num_masked_tokens
    ones = torch.ones(work.tokens, dtype=torch.int64).numpy()
    # At least what tokens alone take, and not much more for histories as short as these.
    alone = 3 * encoder.flops_per_pass(ones, causal=True)
    assert alone < work.flops < 1.5 * alone


def test_the_history_tells_of_rates_and_throughput(folders):
    history = train(*folders, tiny()).history
    assert [entry["step"] for entry in history] == [3.0, 6.0]
    for entry in history:
        assert entry["events_per_second"] > 0
        assert entry["tokens_per_second"] > entry["events_per_second"]
        assert math.isfinite(entry["gradient_norm"])
        assert entry["is_averaged"] in {0.0, 1.0}
    assert history[1]["learning_rate"] < history[0]["learning_rate"] <= tiny().learning_rate


def test_curves_are_readable_by_tensorboard(folders, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = train(*folders, tiny(), curves_folder=tmp_path / "curves").history
    (folder,) = (tmp_path / "curves").iterdir()  # one for each training
    found = reading.EventAccumulator(str(folder)).Reload()
    names = found.Tags()["scalars"]
    assert {"train/total", "validation/total", "learning_rate", "gradient_norm"} <= set(names)
    losses = found.Scalars("validation/total")
    assert [event.step for event in losses] == [3, 6]
    assert [event.value for event in losses] == pytest.approx(
        [entry["validation_total"] for entry in history]
    )
    assert [event.step for event in found.Scalars("learning_rate")] == [2, 3, 4, 6]


def test_without_tensorboard_nothing_breaks(folders, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    train(*folders, tiny(), curves_folder=tmp_path / "curves")
    assert not Path(tmp_path / "curves").exists()
