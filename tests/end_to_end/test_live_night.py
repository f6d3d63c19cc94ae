"""A night at the end of the data: what services wait for every morning."""

from __future__ import annotations

import shutil
from pathlib import Path

from behavior_pipeline.feature_store.published import read_published
from behavior_pipeline.storage import read_json
from behavior_pipeline.windows import parse_cutoff

from .conftest import FinishedRun, new_installation

END = "2026-05-01"  # the simulation's last event lies on the evening before


def test_a_night_whose_future_is_not_known_yet(finished: FinishedRun, tmp_path: Path) -> None:
    live = new_installation(tmp_path / "data")
    shutil.copytree(finished.storage.home, live.storage.home)

    done = live.run("nightly", "--cutoff", END)

    assert done.returncode == 0, done.stdout + done.stderr
    comparison = read_json(live.storage.reports(parse_cutoff(END)) / "comparison.json")
    assert (comparison["train_cutoff"], comparison["test_cutoff"]) == ("2026-03-02", "2026-04-01")
    assert comparison["checkpoint_id"] == finished.comparison["checkpoint_id"]
    assert {row["task"] for row in comparison["results"]} >= {"churn", "propensity", "next_action"}
    published = read_published(live.storage)
    assert {view.online_cutoff for view in published.values()} == {END}
    assert all(view.is_online_complete for view in published.values())
