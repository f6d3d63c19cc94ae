from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from warehouse_builders import (
    LIVE_CUTOFF,
    TEST_CUTOFF,
    TRAIN_CUTOFF,
    Built,
    make_windows,
    shop_events,
)

from behavior_pipeline.contracts import (
    EVENTS_SESSIONIZED,
    LABELS,
    PROPENSITY_LABELS,
    PROPENSITY_TARGETS,
    USER_RFM,
    Contract,
)
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.layers import read_layers
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse import export
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.windows import EvaluationWindows

CUTOFFS = (TRAIN_CUTOFF, TEST_CUTOFF, LIVE_CUTOFF)


def read_buckets(built: Built) -> list[pa.Table]:
    layers = read_layers(built.storage.events_sessionized)
    assert layers.layers == ()
    files = [layers.base_files(bucket) for bucket in range(layers.num_buckets)]
    assert sorted(path for (path,) in files) == layers.base_files()
    return [pq.ParquetFile(path).read() for (path,) in files]


def test_events_come_back_in_the_contract_and_its_order(built: Built):
    tables = read_buckets(built)
    assert len(tables) == built.settings.num_buckets
    for table in tables:
        assert table.schema.equals(EVENTS_SESSIONIZED.schema)
        for _, group in groupby(table.to_pylist(), key=itemgetter("user_id")):
            history = list(group)
            assert [row["event_number"] for row in history] == list(range(1, len(history) + 1))
            keys = [(row["occurred_at"], row["event_id"]) for row in history]
            assert keys == sorted(set(keys))
        runs = [user for user, _ in groupby(table["user_id"].to_pylist())]
        assert len(runs) == len(set(runs))  # each user's events stand together
    assert sum(map(len, tables)) == built.summary.rows["events_sessionized"] == len(shop_events())


def test_a_bucket_holds_the_users_whose_md5_says_so(built: Built):
    for bucket, table in enumerate(read_buckets(built)):
        assert len(table)
        assert set(table["user_bucket"].to_pylist()) == {bucket}
        for user in set(table["user_id"].to_pylist()):
            digest = hashlib.md5(user.encode(), usedforsecurity=False).hexdigest()
            assert int(digest[:8], 16) % built.settings.num_buckets == bucket


def test_values_survive_the_way(built: Built):
    exported = pa.concat_tables(read_buckets(built)).sort_by("event_id").to_pylist()
    for given, found in zip(shop_events(), exported, strict=True):
        assert {name: found[name] for name in given} == given


@pytest.mark.parametrize(
    "contract", [USER_RFM, LABELS, PROPENSITY_LABELS, PROPENSITY_TARGETS], ids=lambda c: c.name
)
def test_marts_of_a_cutoff_follow_their_contract(built: Built, contract: Contract):
    for cutoff in CUTOFFS:
        folder = built.storage.marts(cutoff)
        table = pq.ParquetFile(folder / f"{contract.name}.parquet").read()
        assert table.schema.equals(contract.schema, check_metadata=True)
        assert len(table) == built.rows[f"{folder.name}/{contract.name}"]
        keys = [tuple(row.values()) for row in table.select(list(contract.sort_order)).to_pylist()]
        assert keys == sorted(set(keys))
        if "observation_cutoff" in table.column_names:
            assert set(table["observation_cutoff"].to_pylist()) <= {cutoff}


def test_labels_are_empty_while_the_window_is_not_complete(built: Built):
    for name in ("labels", "propensity_labels"):
        counts = [built.rows[f"{built.storage.marts(cutoff).name}/{name}"] for cutoff in CUTOFFS]
        assert counts[0] > 0
        assert counts[1] > 0
        assert counts[2] == 0


def test_aggregates_are_numbers_of_every_user_known_at_the_nights_cutoff(built: Built):
    for cutoff in CUTOFFS:
        table = pq.read_table(built.storage.marts(cutoff) / "user_aggregates.parquet")
        users = {row["user_id"] for row in shop_events() if row["occurred_at"] < cutoff}
        is_night = cutoff == built.windows.cutoff  # the only cutoff that has aggregates
        assert table["user_id"].to_pylist() == (sorted(users) if is_night else [])
        features = table.drop_columns(["user_id", "observation_cutoff"])
        assert features.num_columns >= 90
        for name in features.column_names:
            assert features.schema.field(name).type in {pa.int64(), pa.float64()}
            num_finite = pc.sum(pc.is_finite(features[name])).as_py() or 0
            assert num_finite == len(table), name


def test_targets_are_the_same_at_every_cutoff(built: Built):
    tables = [
        pq.read_table(built.storage.marts(cutoff) / "propensity_targets.parquet")
        for cutoff in CUTOFFS
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert tables[0]["target_rank"].to_pylist() == [1, 2, 3, 4, 5]


def _bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.rglob("*.parquet"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_exporting_again_gives_the_same_bytes(built: Built):
    before = _bytes(built.storage.home / "marts")
    assert export_marts(built.storage, built.settings, built.windows) == built.rows
    assert _bytes(built.storage.home / "marts") == before


def test_a_failure_leaves_the_old_marts(built: Built, monkeypatch: pytest.MonkeyPatch):
    before = _bytes(built.storage.home / "marts")
    write, calls = export._write, []

    def fail_at_the_second(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "_write", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        export_marts(built.storage, built.settings, built.windows)
    assert _bytes(built.storage.home / "marts") == before


def test_without_a_warehouse_the_message_says_so(settings: Settings, storage: Storage):
    with pytest.raises(PipelineError, match="no warehouse"):
        export_marts(storage, settings, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "night",
    [
        make_windows(),
        replace(make_windows(LIVE_CUTOFF), train_cutoff=TEST_CUTOFF, test_cutoff=TRAIN_CUTOFF),
    ],
    ids=["fewer cutoffs", "another train cutoff"],
)
def test_a_warehouse_of_another_night_is_refused(built: Built, night: EvaluationWindows):
    before = sorted(built.storage.home.rglob("*.parquet"))
    with pytest.raises(PipelineError, match="built for the cutoffs 2024-03-01, 2024-03-11"):
        export_marts(built.storage, built.settings, night)
    assert sorted(built.storage.home.rglob("*.parquet")) == before
