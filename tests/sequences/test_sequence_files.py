from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sequence_builders import CUTOFF, START, event, events_frame, write_events_sessionized

from behavior_pipeline.contracts import SEQUENCES
from behavior_pipeline.downstream.naive import most_recent
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.sequences import files
from behavior_pipeline.sequences.files import sequence_files, write_sequences
from behavior_pipeline.sequences.tokenization import tokenize
from behavior_pipeline.sequences.vocabulary import Vocabulary, build_vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

ROWS = [
    *[event(f"u{k % 7}", k, str(k), item_id=f"i{k % 3}", location="here") for k in range(30)],
    event("u1", 40, "late", item_id="unheard of"),
    event("only adjusts", 5, "a1", "adjust"),
    event("after", 480, "z1"),
]


@pytest.fixture
def vocabulary(storage: Storage, settings: Settings) -> Vocabulary:
    write_events_sessionized(storage, events_frame(ROWS))
    return build_vocabulary(storage, settings, ("adjust",), START + timedelta(hours=31))


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sequence_files(folder)])


def test_buckets_together_hold_every_user_once(
    storage: Storage, settings: Settings, vocabulary: Vocabulary
):
    folder = storage.sequences(CUTOFF)
    reported: list[tuple[int, int]] = []
    summary = write_sequences(
        storage,
        settings,
        vocabulary,
        CUTOFF,
        folder,
        lambda done, all_, _: reported.append((done, all_)),
    )
    table = read(folder).sort_by("user_id")
    assert table.equals(tokenize(events_frame(ROWS), vocabulary, CUTOFF, 512))
    assert table.schema.equals(SEQUENCES.schema)
    assert (summary.num_users, summary.num_users_without_tokens, summary.num_events) == (8, 1, 31)
    assert summary.unknown_shares["item"] == pytest.approx(1 / 31)
    assert summary.unknown_shares["location"] == summary.unknown_shares["category"] == 0
    assert reported[0] == (0, 3)
    assert reported[-1] == (3, 3)


def test_writing_again_gives_the_same_bytes(
    storage: Storage, settings: Settings, vocabulary: Vocabulary
):
    folder = storage.sequences(CUTOFF)
    write_sequences(storage, settings, vocabulary, CUTOFF, folder)
    first = {path.name: path.read_bytes() for path in sequence_files(folder)}
    write_sequences(storage, settings, vocabulary, CUTOFF, folder)
    assert {path.name: path.read_bytes() for path in sequence_files(folder)} == first


def test_an_interrupted_run_leaves_what_was_there(
    storage: Storage, settings: Settings, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
):
    folder = storage.sequences(CUTOFF)
    write_sequences(storage, settings, vocabulary, CUTOFF, folder)
    before = read(folder)
    calls = iter([tokenize])

    def fail_in_the_second_bucket(*arguments: object) -> pa.Table:
        return next(calls)(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "tokenize", fail_in_the_second_bucket)
    with pytest.raises(StopIteration):
        write_sequences(storage, settings, vocabulary, START + timedelta(hours=9), folder)
    assert read(folder).equals(before)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_mistakes_are_named(storage: Storage, settings: Settings, vocabulary: Vocabulary):
    with pytest.raises(PipelineError, match="no event before 2024-01-01"):
        write_sequences(storage, settings, vocabulary, START, storage.sequences(START))
    with pytest.raises(PipelineError, match="no sequences in"):
        sequence_files(storage.sequences(START))
    elsewhere = Storage(storage.home / "elsewhere")
    with pytest.raises(PipelineError, match="no sessionized events"):
        write_sequences(elsewhere, settings, vocabulary, CUTOFF, storage.sequences(START))


def test_a_home_may_be_called_anything(tmp_path: Path, settings: Settings) -> None:
    storage = Storage(tmp_path / "shop's {new} [home]")
    write_events_sessionized(storage, events_frame(ROWS))
    built = build_vocabulary(storage, settings, (), CUTOFF)
    summary = write_sequences(storage, settings, built, CUTOFF, storage.sequences(CUTOFF))
    assert summary.num_users == 8
    users = pa.array(["u1", "unknown"])
    assert most_recent(storage, settings, CUTOFF, users).to_pylist() == ["view", None]
