"""New checkpoints at the gates of a real home: a sound one goes live, broken ones do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from behavior_pipeline.encoder.checkpoints import load_checkpoint, save_checkpoint
from behavior_pipeline.encoder.heads import load_event_head
from behavior_pipeline.encoder.live import CANDIDATE, LIVE, checkpoint_folder, point_to, pointed_to
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.feature_store.versions import read_versions
from behavior_pipeline.sequences.vocabulary import load_vocabulary, save_vocabulary
from behavior_pipeline.storage import Storage

from .conftest import Installation, new_installation

pytestmark = pytest.mark.slow
STEPS = "80"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """A home whose live checkpoint has learnt something."""
    made = new_installation(tmp_path_factory.mktemp("candidates") / "data")
    done = made.run("run", "--max-training-steps", STEPS)
    assert done.returncode == 0, done.stderr
    return made


def copy_of_live(
    storage: Storage,
    change: Callable[[torch.nn.Module], None] = lambda _: None,
    vocabulary: Path | None = None,
    later: timedelta = timedelta(0),
) -> str:
    """Save the live checkpoint anew with something changed; make it the candidate."""
    folder = checkpoint_folder(storage.checkpoints, LIVE)
    checkpoint = load_checkpoint(folder)
    head = load_event_head(folder, checkpoint.encoder)
    assert head is not None
    field = checkpoint.config.event_field
    heads = {f"{field}.{name}": value for name, value in head.state_dict().items()}
    heads.pop(f"{field}.table.weight")
    with torch.no_grad():
        change(checkpoint.encoder)
    saved = save_checkpoint(
        checkpoint.encoder,
        vocabulary or folder,
        storage.checkpoints,
        checkpoint.trained_through + later,
        {"history": [], "seed": 0},
        heads,
    )
    point_to(storage.checkpoints, CANDIDATE, saved.name)
    return saved.name


def shuffled(storage: Storage, folder: Path) -> Path:
    """The live vocabulary with every field's ids dealt out anew."""
    vocabulary = load_vocabulary(checkpoint_folder(storage.checkpoints, LIVE))
    random = np.random.default_rng(0)
    values, counts = dict(vocabulary.values), dict(vocabulary.counts)
    for field, known in values.items():
        order = random.permutation(len(known))
        if field == "action":
            order = np.roll(np.arange(len(known)), 1)  # a few types may stay where they were
        values[field] = tuple(known[place] for place in order)
        counts[field] = tuple(counts[field][place] for place in order)
    save_vocabulary(replace(vocabulary, values=values, counts=counts), folder)
    return folder


def constant(encoder: torch.nn.Module) -> None:
    """Let the readout say the same of everybody."""
    for parameter in encoder.get_submodule("readout_layer").parameters():
        parameter.zero_()


def half_trained(installation: Installation) -> None:
    """Stop a training early."""
    done = installation.run(
        "pretrain", "--max-training-steps", "4", "--encoder-preset", "tiny", "--seed", "0"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "gate"),
    [
        ("shuffled vocabulary", "foretells_events"),
        ("half-trained", "foretells_events"),
        ("constant", "vectors_are_sound"),
        ("leaked cutoff", "knows_no_future"),
    ],
)
def test_a_broken_candidate_is_held_back_by_name(
    installation: Installation, tmp_path: Path, kind: str, gate: str
):
    storage = installation.storage
    live = pointed_to(storage.checkpoints, LIVE)
    if kind == "shuffled vocabulary":
        copy_of_live(storage, vocabulary=shuffled(storage, tmp_path / "vocabulary"))
    elif kind == "half-trained":
        half_trained(installation)
    elif kind == "constant":
        copy_of_live(storage, constant)
    else:
        copy_of_live(storage, later=timedelta(days=3))
    done = installation.run("candidate")
    assert done.returncode == 1, done.stdout
    version = read_versions(storage).candidate_version
    assert gate in version.failed_gates, version.gates
    refused = installation.run("promote")
    assert refused.returncode == 2
    assert gate in refused.stderr.replace("\n", "")
    assert pointed_to(storage.checkpoints, LIVE) == live


def test_a_sound_candidate_goes_live_and_back(installation: Installation):
    storage = installation.storage
    live = pointed_to(storage.checkpoints, LIVE)
    trained = installation.run("pretrain", "--seed", "1", "--max-training-steps", STEPS)
    assert trained.returncode == 0, trained.stderr
    candidate = pointed_to(storage.checkpoints, CANDIDATE)
    assert candidate not in {None, live}
    done = installation.run("candidate")
    assert done.returncode == 0, (done.stdout, read_versions(storage).candidate)
    figures = read_versions(storage).live_version.gates["probes_hold"]["figures"]
    assert {"churn_live", "churn_aligned", "churn_unaligned"} <= set(figures)
    assert lookup(storage, "__cold_start__")["user_embedding__checkpoint_id"] == candidate

    back = installation.run("rollback")
    assert back.returncode == 0, back.stderr
    assert lookup(storage, "__cold_start__")["user_embedding__checkpoint_id"] == live
    assert pointed_to(storage.checkpoints, LIVE) == live
