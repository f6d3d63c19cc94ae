"""Drift through Dagster: a night is measured, named, and warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from downstream_builders import TEST, write_home, write_vectors
from drift_builders import FIRST, calm_nights

from behavior_pipeline.defs.drift import drift, is_night_like_those_before
from behavior_pipeline.defs.resources import PipelineResource
from behavior_pipeline.downstream.drift.history import read_history, write_figures
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import partition_of

NUM_USERS = 60


@pytest.fixture
def resource(tmp_path: Path) -> PipelineResource:
    overrides = {"data_root": str(tmp_path), "memory_limit": "1GB", "threads": 1}
    return PipelineResource(overrides=overrides)


def run(resource: PipelineResource, night: str) -> tuple[Any, dg.AssetCheckEvaluation]:
    """Measure a night; return what the page shows of it, and the check."""
    result = dg.materialize(
        [drift, is_night_like_those_before],
        resources={"pipeline": resource},
        partition_key=night,
    )
    (evaluation,) = result.get_asset_check_evaluations()
    (shown,) = result.asset_materializations_for_node("drift")
    return shown.metadata, evaluation


def test_a_night_is_measured_and_named(resource: PipelineResource, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "simulated")
    write_home(storage, NUM_USERS, cutoffs=(TEST,))
    shown, evaluation = run(resource, partition_of(TEST))
    assert evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    assert evaluation.metadata["verdict"].value == "calibrating: too few calm nights yet"
    assert shown["figure/num_users"].value == NUM_USERS
    for metadata in (shown, evaluation.metadata):
        assert "data:image/png;base64," in str(metadata["picture"].value)
        assert "num\\_users" in str(metadata["figures"].value)
    assert [night.cutoff for night in read_history(storage)] == [TEST]


def test_a_night_that_differs_is_warned_of_and_goes_on(
    resource: PipelineResource, tmp_path: Path
) -> None:
    storage = Storage(tmp_path / "simulated")
    nights = calm_nights(40)
    for night in nights[:-1]:
        write_figures(storage, night)
    cutoff = nights[-1].cutoff
    assert cutoff > FIRST
    write_home(storage, NUM_USERS, cutoffs=(nights[-2].cutoff, cutoff))
    users = [f"user-{number:05d}" for number in range(NUM_USERS)]
    for place, seed in ((nights[-2].cutoff, 1), (cutoff, 2)):
        vectors = np.random.default_rng(seed).normal(size=(NUM_USERS, 6))
        write_vectors(storage.embeddings(place), users, vectors, place, "one")
    _, evaluation = run(resource, partition_of(cutoff))
    assert not evaluation.passed
    assert not evaluation.blocking
    assert "neighbour overlap" in str(evaluation.metadata["verdict"].value)
