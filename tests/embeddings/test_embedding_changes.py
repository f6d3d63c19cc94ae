from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from change_builders import USERS, Shop, drift, night_of

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.embeddings.alignment import Alignment
from behavior_pipeline.embeddings.changes import Served, space_of
from behavior_pipeline.embeddings.ledger import Ledger
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

EVERYBODY = {*USERS, "cold", COLD_START_USER}


@pytest.fixture
def shop(storage: Storage, settings: Settings) -> Shop:
    return Shop.build(storage, settings)


def ledger_of(shop: Shop, number: int) -> Ledger:
    found = Ledger.load(shop.changes(night_of(number)).ledger_file)
    assert found is not None
    return found


def test_a_pass_that_is_not_asked_tells_no_changes(shop: Shop):
    summary = shop.embed(night_of(0), served=None)
    assert summary.num_changed is None
    assert not shop.storage.changes(night_of(0)).exists()


def test_without_a_ledger_everybody_is_to_be_published(shop: Shop):
    summary = shop.embed(night_of(0), served=Served())
    changes = shop.changes(night_of(0))
    assert (changes.base_id, changes.files) == (None, [])
    assert changes.num_changed == changes.num_users == summary.num_changed == len(EVERYBODY)
    assert changes.oldest == f"{night_of(0):%Y-%m-%d}"
    ledger = ledger_of(shop, 0)
    assert set(ledger.user_ids.to_pylist()) == EVERYBODY
    assert ledger.ledger_id == changes.ledger_id


@pytest.mark.parametrize("bound", [0.0, 0.01, 0.03, 0.1])
def test_whoever_moved_by_more_than_the_bound_has_changed(shop: Shop, bound: float):
    shop.embed(night_of(0), served=Served())
    before = shop.fresh(night_of(0))
    shop.embed(night_of(3), served=Served(ledger_of(shop, 0), bound))
    now = shop.fresh(night_of(3))
    moved = {u for u in EVERYBODY if drift(before[u]["embedding"], now[u]["embedding"]) > bound}
    assert shop.changed_users(night_of(3)) == moved
    if bound == 0:
        assert moved == set(USERS)
    rows = {row["user_id"]: row for f in shop.changes(night_of(3)).files
            for row in pq.read_table(f).to_pylist()}  # fmt: skip
    assert rows == {user: now[user] for user in moved}
    published = dict(zip(*ledger_of(shop, 3).rows.select([0, 1]).to_pydict().values(), strict=True))
    assert published == {u: night_of(3 if u in moved else 0) for u in EVERYBODY}


def test_a_row_is_measured_against_what_was_published_not_against_last_night(shop: Shop):
    """Steps below the bound add up, and the sum counts."""
    shop.embed(night_of(0), served=Served())
    for number in range(1, 25):
        served = Served(ledger_of(shop, number - 1), 0.05)
        shop.embed(night_of(number), served=served)
    first, last = shop.fresh(night_of(0)), shop.fresh(night_of(24))
    published = dict(
        zip(*ledger_of(shop, 24).rows.select([0, 1]).to_pydict().values(), strict=True)
    )
    kept = [user for user in USERS if published[user] == night_of(0)]
    for user in kept:
        assert drift(first[user]["embedding"], last[user]["embedding"]) <= 0.05 + 1e-6
    assert len(kept) < len(USERS)


def test_other_buckets_let_nobody_vanish(shop: Shop):
    shop.embed(night_of(0), served=Served())
    ledger = ledger_of(shop, 0)
    column = pa.repeat("bucket=999.parquet", len(ledger.rows))
    moved = replace(ledger, rows=ledger.rows.set_column(3, "bucket", column))
    shop.embed(night_of(1), served=Served(moved, 0.9))
    changes = shop.changes(night_of(1))
    assert changes.num_vanished == 0
    assert changes.num_changed == len(EVERYBODY)


def test_a_ledger_of_another_space_or_of_no_earlier_night_counts_as_none(shop: Shop):
    shop.embed(night_of(1), served=Served())
    ledger = ledger_of(shop, 1)
    for cutoff, other in (
        (night_of(2), replace(ledger, space_id="another")),
        (night_of(1), ledger),
        (night_of(0), ledger),
    ):
        shop.embed(cutoff, served=Served(other, 0.9))
        assert shop.changes(cutoff).base_id is None


def test_an_alignment_makes_another_space():
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    alignment = Alignment(rotation, np.zeros(4), np.zeros(4), "reference", 9, 1.0)
    moved = replace(alignment, mean=np.ones(4))
    spaces = {space_of(name, how) for name in "ab" for how in (None, alignment, moved)}
    assert len(spaces) == 6
    assert space_of("a", alignment) == space_of("a", replace(alignment, num_users=10))


def test_a_ledger_survives_its_file(shop: Shop, tmp_path: Path):
    shop.embed(night_of(0), served=Served())
    ledger = ledger_of(shop, 0)
    ledger.save(tmp_path / "ledger.parquet")
    again = Ledger.load(tmp_path / "ledger.parquet")
    assert again == ledger
    assert Ledger.of(ledger.space_id, ledger.cutoff, ledger.rows) == ledger
    later = Ledger.of(ledger.space_id, ledger.cutoff + timedelta(days=1), ledger.rows)
    assert later.ledger_id != ledger.ledger_id
    assert later.oldest == ledger.cutoff
    assert later.at_once().oldest == later.cutoff
    assert Ledger.load(tmp_path / "nothing") is None


def test_what_changed_does_not_depend_on_threads(shop: Shop):
    shop.embed(night_of(0), served=Served())
    served = Served(ledger_of(shop, 0), 0.02)
    found = []
    for threads in (1, 3):
        shop.embed(night_of(1), served=served, threads=threads)
        folder = shop.storage.changes(night_of(1))
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]
