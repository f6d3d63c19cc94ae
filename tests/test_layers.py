"""Which version of a user's events counts."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
from sequence_builders import add_layer, event, events_frame, write_events_sessionized

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.layers import (
    CURRENT_FILE,
    Layer,
    Layers,
    layers_of,
    point_to_layers,
    read_layers,
    remove_unused,
)
from behavior_pipeline.storage import Storage

ROWS = [event(user, hour, f"{user}{hour}") for user in "abcdef" for hour in range(3)]
LATE = event("a", 1.5, "late")


@pytest.fixture
def layers(storage: Storage) -> Layers:
    """User a got an event late, b lost all of theirs, then a got another one."""
    write_events_sessionized(storage, events_frame(ROWS))
    add_layer(storage, events_frame([*ROWS, LATE]), ["a", "b"])
    left = [row for row in ROWS if row["user_id"] not in {"a", "b"}]
    add_layer(storage, events_frame(left), ["b"])
    return add_layer(storage, events_frame([LATE]), ["a"])


def ids(layers: Layers, bucket: int | None = None) -> list[str]:
    with duckdb.connect() as connection:
        query = f"SELECT event_id FROM ({layers.relation(bucket)}) ORDER BY event_id"
        return [name for (name,) in connection.execute(query).fetchall()]


def test_a_users_events_are_those_of_the_newest_layer_that_lists_the_user(layers: Layers) -> None:
    others = [row["event_id"] for row in ROWS if row["user_id"] in "cdef"]
    assert ids(layers) == sorted([*others, "late"])


def test_buckets_add_up(layers: Layers) -> None:
    parts = [ids(layers, bucket) for bucket in range(layers.num_buckets)]
    assert sorted(name for part in parts for name in part) == ids(layers)
    assert sum(map(len, parts)) == len(ids(layers))


def test_a_base_alone_reads_whole(storage: Storage) -> None:
    layers = write_events_sessionized(storage, events_frame(ROWS))
    assert ids(layers) == sorted(row["event_id"] for row in ROWS)
    assert layers.users_files(1) == []
    assert layers.version == 1


def test_who_was_rebuilt_after_a_version(layers: Layers) -> None:
    base, first, second, third = (layers.base, *layers.layers)
    assert layers.version == third.version == base.version + 3

    def users(version: int) -> list[str] | None:
        files = layers.users_files(version)
        return None if files is None else [file.parent.name for file in files]

    assert users(base.version - 1) is None  # anybody may have been
    assert users(base.version) == [f"layer={layer.id}" for layer in (first, second, third)]
    assert users(first.version) == [f"layer={layer.id}" for layer in (second, third)]
    assert users(third.version) == []


def test_what_was_pointed_to_is_read_back(layers: Layers) -> None:
    assert read_layers(layers.folder) == layers
    assert layers_of(layers.folder, layers.document()) == layers
    current = layers.folder / CURRENT_FILE
    written = current.stat().st_mtime_ns
    point_to_layers(layers)
    assert current.stat().st_mtime_ns == written  # nothing new to say


def test_a_folder_of_any_name_is_read(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "shop's {new} [home] *?")
    layers = write_events_sessionized(storage, events_frame(ROWS))
    assert len(ids(layers)) == len(ROWS)


def test_without_a_version_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no sessionized events"):
        read_layers(tmp_path)


def test_what_two_versions_and_readers_need_stays(layers: Layers) -> None:
    before = Layers(layers.folder, layers.base, layers.layers[:1], layers.num_buckets)
    newest = Layers(layers.folder, Layer("new", 9), (), layers.num_buckets)
    (layers.folder / "base=new").mkdir()
    read = {f"layer={layers.layers[1].id}"}  # somebody has a file open that needs it
    remove_unused(newest, before, read)
    kept = {path.name for path in layers.folder.glob("*=*")}
    assert kept == {"base=new"} | before.folder_names | read
    assert before.are_there
    assert newest.are_there
    assert not layers.are_there
    remove_unused(newest, None, set())
    assert {path.name for path in layers.folder.glob("*=*")} == {"base=new"}
