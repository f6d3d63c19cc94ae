from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import version_kills
from version_kills import USERS, A, B

from behavior_pipeline.encoder.live import LIVE, pointed_to
from behavior_pipeline.feature_store.promotion import settle
from behavior_pipeline.feature_store.versions import read_versions
from behavior_pipeline.storage import Storage

KILLS = int(os.environ.get("BEHAVIOR_KILLS", "4"))
ENOUGH = 20  # kills among which a whole round of changes was surely completed


@pytest.mark.slow
def test_readers_see_one_whole_checkpoint_whatever_is_killed(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["version_kills"])
    home = tmp_path / "home"
    version_kills.begin(home)
    reader = context.Process(target=version_kills.read, args=(home,))
    reader.start()
    version_kills.wait_for(home / "reading")
    random = np.random.default_rng(0)
    for _ in range(KILLS):
        worker = context.Process(target=version_kills.work, args=(home,))
        worker.start()
        version_kills.wait_for(home / "working")
        (home / "working").unlink()
        time.sleep(random.uniform(0.05, 3.0))
        worker.kill()
        worker.join()
    assert reader.is_alive(), (home / "faults.log").read_text()
    (home / "stop").touch()
    reader.join(60)
    assert not (home / "faults.log").exists()
    assert "promote" in (home / "changes.log").read_text() or KILLS < ENOUGH
    assert json.loads((home / "reads.json").read_text())["reads"] > KILLS
    # Whatever was left half-way, the next completes it, and goes on.
    storage = Storage(home)
    settle(storage)
    for _ in range(4):
        version_kills.advance(storage)
    live = read_versions(storage).live_version.checkpoint_id
    assert live in {A, B}
    assert pointed_to(storage.checkpoints, LIVE) == live
    client = version_kills.FeatureStore(config=version_kills.open_store(storage).config)
    assert [version_kills.fault_of(client, user) for user in USERS[:50]] == [""] * 50
