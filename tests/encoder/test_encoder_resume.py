from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from encoder_builders import random_rows, write_folders

from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.resume import STATE_FILE, StateFile, TrainingState
from behavior_pipeline.encoder.train import train
from behavior_pipeline.encoder.training_run import TrainingRun
from behavior_pipeline.errors import PipelineError

STEPS = ["--preset", "tiny", "--max-steps", "24", "--validate-every", "8", "--save-every", "5"]


def tiny(**changes: Any) -> TrainingConfig:
    given = {"max_steps": 12, "validate_every": 4, "save_every": 5, "threads": 1, **changes}
    return TrainingConfig.named("tiny", **given)


class Interrupted(Exception):  # noqa: N818 - no error, a test's kill
    pass


def interrupt(folders, config: TrainingConfig, at_step: int) -> None:
    """Train until a step has been taken and leave what is on disk then."""

    def stop(done: int, _total: int, _message: str) -> None:
        if done == at_step:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(*folders, config, stop)


def losses(history: list[dict[str, float]]) -> list[dict[str, float]]:
    timed = {"events_per_second", "tokens_per_second", "peak_memory_gigabytes"}
    return [{k: v for k, v in entry.items() if k not in timed} for entry in history]


def command(folders, *more: str) -> list[str]:
    given = ["--sequences", folders.sequences, "--vocabulary", folders.vocabulary]
    given += ["--out", folders.checkpoints, "--threads", "1", *STEPS, *more]
    return [sys.executable, "-m", "behavior_pipeline.encoder.train", *map(str, given)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def kill_after_a_state(folders, out: Path) -> None:
    """Start a training and kill it as soon as it has written a state."""
    with out.open("w") as output:
        process = subprocess.Popen(
            command(folders), stdout=output, stderr=output, env=environment()
        )
    state = folders.checkpoints / STATE_FILE
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, out.read_text()


def run(folders, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folders, *more), capture_output=True, text=True, check=False, env=environment()
    )


def only_checkpoint(folders) -> Path:
    (folder,) = folders.checkpoints.iterdir()
    return folder


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_losses_and_bytes(tmp_path):
    killed = write_folders(tmp_path / "killed", random_rows(60))
    whole = write_folders(tmp_path / "whole", random_rows(60))
    kill_after_a_state(killed, tmp_path / "output")
    assert [path.name for path in killed.checkpoints.iterdir() if path.is_dir()] == []
    first, second = run(killed), run(whole)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    one, other = only_checkpoint(killed), only_checkpoint(whole)
    assert one.name == other.name
    for name in ("model.safetensors", "config.json", "vocabulary.json", "tokens.parquet"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    about = [json.loads((folder / "training.json").read_text()) for folder in (one, other)]
    assert losses(about[0]["history"]) == losses(about[1]["history"])
    assert about[0]["num_events_seen"] == about[1]["num_events_seen"]


@pytest.mark.parametrize(
    ("at_step", "changes"),
    [
        (6, {}),
        (9, {"accumulate": 2, "optimizer": "adamw"}),
        (11, {"precision": "bfloat16"}),
        (6, {"robust_share": 0.5}),
    ],
)
def test_wherever_it_is_interrupted_the_curve_is_the_same(tmp_path, folders, at_step, changes):
    other = write_folders(tmp_path / "whole", random_rows(60))
    whole = train(*other, tiny(prefetch=0, **changes))
    interrupt(folders, tiny(**changes), at_step)
    steps: list[int] = []
    resumed = train(*folders, tiny(prefetch=2, **changes), lambda done, *_: steps.append(done))
    assert steps[0] == (6 if at_step < 10 else 11)
    assert losses(resumed.history) == losses(whole.history)
    assert resumed.checkpoint_id == whole.checkpoint_id
    assert not (folders.checkpoints / STATE_FILE).exists()


def test_the_state_of_another_training_is_refused_in_words_or_discarded(folders):
    interrupt(folders, tiny(seed=1), 6)
    with pytest.raises(PipelineError, match=r"seed 1, not 2.*\n.*--fresh"):
        train(*folders, tiny(seed=2))
    assert (folders.checkpoints / STATE_FILE).exists()
    steps: list[int] = []
    fresh = train(*folders, tiny(seed=2), lambda d, *_: steps.append(d), unfinished="fresh")
    assert steps[0] == 1
    interrupt(folders, tiny(seed=1), 6)
    assert train(*folders, tiny(seed=2), unfinished="discard").checkpoint_id == fresh.checkpoint_id


def test_other_sequences_and_another_vocabulary_are_refused(tmp_path, folders):
    interrupt(folders, tiny(), 6)
    other = write_folders(tmp_path / "other", random_rows(59))
    with pytest.raises(PipelineError, match="sequences"):
        train(other.sequences, folders.vocabulary, folders.checkpoints, tiny())
    path = folders.vocabulary / "tokens.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(PipelineError, match="vocabulary"):
        train(*folders, tiny())


def test_a_broken_state_is_refused_in_words(folders):
    folders.checkpoints.mkdir()
    (folders.checkpoints / STATE_FILE).write_bytes(b"no safetensors at all")
    with pytest.raises(PipelineError, match="is no state of a training"):
        train(*folders, tiny())
    assert train(*folders, tiny(), unfinished="fresh").num_steps == 12


def test_a_kill_while_the_state_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    state_file = StateFile(tmp_path, {"seed": 1})
    state_file.write(TrainingState({}, {"num_steps": 5}))

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise Interrupted

    monkeypatch.setattr("behavior_pipeline.encoder.resume.save_file", fail)
    with pytest.raises(Interrupted):
        state_file.write(TrainingState({}, {"num_steps": 10}))
    state = state_file.read()
    assert state is not None
    assert state.facts == {"num_steps": 5}


def test_no_states_are_written_where_none_are_wanted(folders, monkeypatch):
    def fail(*_args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(TrainingRun, "_save", fail)
    assert train(*folders, tiny(save_every=0)).num_steps == 12
