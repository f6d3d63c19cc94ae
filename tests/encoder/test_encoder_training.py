from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_builders import ALONE, CUTOFF, random_rows, user_row, write_folders

from behavior_pipeline.encoder import configuration
from behavior_pipeline.encoder.checkpoints import load_checkpoint, read_vocabulary_facts
from behavior_pipeline.encoder.configuration import EncoderConfig, ObjectiveWeights, TrainingConfig
from behavior_pipeline.encoder.cutoffs import future_rates
from behavior_pipeline.encoder.parallel import Processes
from behavior_pipeline.encoder.schedule import rate_share
from behavior_pipeline.encoder.sequence_files import sequence_files, survey
from behavior_pipeline.encoder.train import train
from behavior_pipeline.encoder.training_run import TrainingRun
from behavior_pipeline.errors import PipelineError

OBJECTIVES = {"masked_event", "next_event", "contrastive", "silence", "total"}

PLAIN = ObjectiveWeights(contrastive=0.0)  # it amplifies what rounding changes


def tiny(**changes: Any) -> TrainingConfig:
    return TrainingConfig.named(
        "tiny", **{"max_steps": 6, "validate_every": 3, "threads": 1, **changes}
    )


def test_a_training_leaves_a_checkpoint_and_loss_curves(folders):
    reports, logs = [], []
    summary = train(*folders, tiny(), lambda *step: reports.append(step), logs.append)
    checkpoint = load_checkpoint(summary.folder)
    assert checkpoint.checkpoint_id == summary.checkpoint_id == summary.folder.name
    assert checkpoint.trained_through == CUTOFF
    assert checkpoint.history == logs
    assert set(summary.train_losses) == set(summary.validation_losses) == OBJECTIVES
    assert all(len(curve) == 2 for curve in summary.validation_losses.values())
    assert all(math.isfinite(loss) for curve in summary.train_losses.values() for loss in curve)
    assert [step[:2] for step in reports] == [(step, 6) for step in range(1, 7)]
    assert checkpoint.encoder.prior().abs().sum() > 0
    assert not list(folders.checkpoints.glob(".*"))


def test_the_same_seed_gives_the_same_curve_and_the_same_checkpoint(folders):
    first = train(*folders, tiny(seed=3))
    torch.rand(5)  # what ran before must not matter
    again = train(*folders, tiny(seed=3))
    other = train(*folders, tiny(seed=4))
    assert first.train_losses == again.train_losses
    assert first.validation_losses == again.validation_losses
    assert first.checkpoint_id == again.checkpoint_id != other.checkpoint_id


def test_heads_start_at_the_rates_and_robust_statistics_are_those_of_all_processes(folders):
    files, alone = sequence_files(folders.sequences), Processes(0, 1, torch.device("cpu"))
    weights = ObjectiveWeights(future_window=1.0)
    config = tiny(weights=weights, robust_share=0.2, validation_share=0.3).for_device("cpu")
    shape = EncoderConfig.named("tiny", read_vocabulary_facts(folders.vocabulary).field_sizes)
    run = TrainingRun(files, survey(files), shape, config, alone)
    rates = future_rates(run.validation)["action"].flatten()
    bias = run.objectives.future_window.heads["action"].bias
    torch.testing.assert_close(bias.sigmoid(), rates)
    assert run.objectives.next_event.prediction.robust["action"].reduce == alone.sum
    assert not run.objectives.masked_event.prediction.robust


def test_training_leaves_the_random_state_and_the_threads_alone(folders):
    torch.manual_seed(1)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(1)
    train(*folders, tiny(max_steps=1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_rule_is_learned(tmp_path):
    # Everyone repeats one category; who is regular goes on, so losses can fall far.
    rows = [
        user_row(f"user{n:03d}", [n % 5 + 6.0 * k for k in range(29)], seed=n) for n in range(48)
    ]
    for row in rows:
        row["action_ids"] = [4 + place % 2 for place in range(29)]
        row["item_ids"] = [4 + place % 3 for place in range(29)]
    folders = write_folders(tmp_path, rows)
    summary = train(*folders, tiny(max_steps=60, validate_every=30, learning_rate=5e-3))
    assert summary.train_losses["next_event"][-1] < 0.5 * summary.train_losses["next_event"][0]
    assert summary.validation_losses["next_event"][-1] < 1.2
    assert summary.validation_losses["silence"][-1] < summary.validation_losses["silence"][0]


def test_training_stops_when_validation_does_not_improve_and_keeps_the_best(folders):
    config = tiny(max_steps=60, validate_every=2, patience=1, learning_rate=1.0)
    summary = train(*folders, config)
    totals = summary.validation_losses["total"]
    assert summary.num_steps < 60
    assert summary.best_step == 2 * (1 + totals.index(min(totals)))
    assert summary.best_step < summary.num_steps


def test_no_validation_users_keeps_the_last_weights(folders):
    summary = train(*folders, tiny(validation_share=0.0))
    assert summary.best_step == summary.num_steps == 6
    assert summary.validation_losses == {}


def test_a_single_user_without_variety_trains(tmp_path):
    folders = write_folders(tmp_path, [user_row("a", [170.0], 1), user_row("b", [], 2)])
    summary = train(*folders, tiny(max_steps=2, validation_share=0.0))
    assert all(math.isfinite(loss) for curve in summary.train_losses.values() for loss in curve)


def test_another_or_a_later_vocabulary_is_refused(folders):
    path = folders.vocabulary / "vocabulary.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "vocabulary_id": "other"}))
    with pytest.raises(PipelineError, match="other"):
        train(*folders, tiny())
    path.write_text(json.dumps({**content, "trained_through": "2024-08-01T00:00:00+00:00"}))
    with pytest.raises(PipelineError, match="2024-08-01"):
        train(*folders, tiny())
    path.unlink()
    with pytest.raises(PipelineError, match=r"no vocabulary\.json"):
        train(*folders, tiny())


def test_the_rate_warms_up_stays_and_falls_to_zero():
    config = tiny(max_steps=100, warmup_share=0.1, decay_share=0.3)
    shares = [rate_share(step, config) for step in range(101)]
    assert shares[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(shares[10:71]) == {1.0}
    assert shares[70:] == pytest.approx([1 - step / 30 for step in range(31)])
    assert rate_share(0, tiny(max_steps=1, warmup_share=0.0, decay_share=0.0)) == 1.0


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_low_precision_learns_alike_and_leaves_float32_weights(folders, precision):
    exact = train(*folders, tiny(weights=PLAIN))
    low = train(*folders, tiny(weights=PLAIN, precision=precision))
    assert low.validation_losses["total"] == pytest.approx(
        exact.validation_losses["total"], rel=0.01
    )
    weights = load_checkpoint(low.folder).encoder.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_a_training_that_diverges_is_stopped_in_words(folders):
    config = tiny(max_steps=60, learning_rate=1e30, muon_learning_rate=1e30, log_every=1)
    with pytest.raises(PipelineError, match=r"diverged\.\nTrain with lower"):
        train(*folders, config)


def test_the_device_decides_precision_and_compiling_unless_told():
    gpu, cpu = tiny().for_device("cuda"), tiny().for_device("cpu")
    assert (gpu.precision, gpu.compile) == ("bfloat16", True)
    assert (cpu.precision, cpu.compile) == ("float32", False)
    told = tiny(precision="autocast", compile=False).for_device("cuda")
    assert (told.precision, told.compile) == ("autocast", False)


@pytest.mark.parametrize(("is_there", "expected"), [(True, "blocks"), (False, "varlen")])
def test_our_kernels_attend_on_a_gpu_that_has_triton(monkeypatch, is_there, expected):
    monkeypatch.setattr(configuration, "find_spec", lambda _name: object() if is_there else None)
    assert tiny().for_device("cuda").attention == expected
    assert tiny(attention="flex").for_device("cuda").attention == "flex"
    assert tiny().for_device("cpu").attention == "auto"


@pytest.mark.parametrize(
    "wrong",
    [{"optimizer": "sgd"}, {"precision": "int8"}, {"accumulate": 0}, {"ema_decay": 1.0}],
)
def test_what_cannot_be_trained_with_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tiny(**wrong)


def test_an_unknown_preset_is_refused():
    with pytest.raises(PipelineError, match="huge"):
        TrainingConfig.named("huge")


def test_it_trains_alone_without_the_pipeline_s_other_libraries(tmp_path):
    folders = write_folders(tmp_path, random_rows(20))
    program = f"{ALONE}from behavior_pipeline.encoder.train import main\nmain()\n"
    arguments = ["--sequences", folders.sequences, "--vocabulary", folders.vocabulary]
    arguments += ["--out", folders.checkpoints, "--preset", "tiny", "--max-steps", "2"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (folder,) = folders.checkpoints.iterdir()
    assert str(folder) in done.stdout
