"""The nights of benchmarks/drift.py, few users long: a change, a retraining, a fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROGRAM = f"""
import sys
from datetime import date
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
import drift_nights
from behavior_pipeline.ingest.simulation.changes import Change

drift_nights.TRAINING_STEPS = 2
shop = drift_nights.Shop(Path(sys.argv[1]) / "calm", 0, 40, date(2026, 6, 22), 4)
shop.simulate()
shop.open()
shop.night(shop.day(0))
copy = shop.forked(Path(sys.argv[1]) / "copy")
copy.simulate([Change(shop.day(1), "view", 1.0)])
copy.night(copy.day(1))
copy.pretrain(1)
copy.align(copy.day(2))
copy.night(copy.day(2))
copy.night(copy.day(3), drift_nights.mix_up_users)
for verdict in copy.verdicts():
    night = verdict.night
    print(verdict.kind, "view" in night.event_counts, night.figures.get("neighbour_overlap"),
          night.figures.get("cross_overlap"), night.figures.get("aligned_overlap"), sep="|")
"""


@pytest.mark.slow
def test_changes_reach_the_figures(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    first, broken, retrained, spoilt = (
        line.split("|") for line in done.stdout.strip().splitlines()[-4:]
    )
    assert [line[0] for line in (first, broken, retrained, spoilt)] == [
        "calibrating", "calibrating", "retraining", "calibrating",
    ]  # fmt: skip
    assert [line[1] for line in (first, broken)] == ["True", "False"]
    assert float(retrained[3]) >= 0.8 * float(retrained[4])  # aligned
    assert float(spoilt[2]) < float(broken[2])  # neighbours of others
