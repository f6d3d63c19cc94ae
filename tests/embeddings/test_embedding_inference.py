from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sequence_builders import CUTOFF, add_layer, event, events_frame
from sequence_checkpoints import TRAINED_THROUGH, Home, history

from behavior_pipeline.contracts import COLD_START_USER, embedding_schema
from behavior_pipeline.embeddings import inference
from behavior_pipeline.embeddings.inference import (
    PRIOR_FILE,
    EmbeddingsSummary,
    embed_sequences,
)
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import load_checkpoint, save_checkpoint
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.sequences.files import sequence_files, write_sequences
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

TONIGHT = CUTOFF
TOMORROW = CUTOFF + timedelta(days=1)
WRITTEN_AT = datetime(2024, 3, 1, tzinfo=UTC)

ROWS = [row for number in range(12) for row in history(f"u{number:02d}", 2 * number + 1, number)]
COLD = [event("cold", 5, "adjusted", "adjust")]


@pytest.fixture
def home(storage: Storage, settings: Settings) -> Home:
    return Home.build(storage, settings, [*ROWS, *COLD])


def embed(home: Home, cutoff: datetime, **options: Any) -> EmbeddingsSummary:
    """Embed the sequences that the home holds for a cutoff."""
    storage = home.storage
    return embed_sequences(
        storage.sequences(cutoff),
        options.pop("checkpoint", home.checkpoint),
        storage.states(cutoff),
        storage.embeddings(cutoff),
        cutoff,
        **{"written_at": WRITTEN_AT, **options},
    )


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def vectors(home: Home, cutoff: datetime) -> dict[str, np.ndarray]:
    table = read(home.storage.embeddings(cutoff))
    columns = (table["user_id"].to_pylist(), table["embedding"].to_pylist())
    return {user: np.array(vector) for user, vector in zip(*columns, strict=True)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_user_gets_one_row_under_the_contract(home: Home):
    sequences = home.tokenize([*ROWS, *COLD], TONIGHT)
    summary = embed(home, TONIGHT)
    folder = home.storage.embeddings(TONIGHT)
    files = sequence_files(sequences)
    names = {PRIOR_FILE, *(path.name for path in files)}
    assert {path.name for path in folder.glob("*.parquet")} == names
    for path in files:
        users = pq.read_table(folder / path.name)["user_id"].to_pylist()
        assert users == sorted(users)
        assert users == pq.read_table(path)["user_id"].to_pylist()
    table = read(folder)
    assert table.schema.equals(embedding_schema(summary.width))
    rows = {row["user_id"]: row for row in table.to_pylist()}
    assert set(rows) == {*(f"u{k:02d}" for k in range(12)), "cold", COLD_START_USER}
    assert {row["checkpoint_id"] for row in rows.values()} == {home.checkpoint.name}
    assert {row["observation_cutoff"] for row in rows.values()} == {TONIGHT}
    assert {row["written_at"] for row in rows.values()} == {WRITTEN_AT}
    assert rows["u03"]["num_events"] == 7
    assert rows["u03"]["last_event_at"] == ROWS[9 + 6]["occurred_at"]
    assert (summary.num_users, summary.num_cold_start, summary.num_reused_states) == (13, 1, 0)
    assert summary.checkpoint_id == home.checkpoint.name
    assert summary.events_per_second > 0


def test_a_folder_that_was_completed_gives_what_a_fresh_one_gives(home: Home):
    """Users tokenized anew stand beside the linked files, one of them has no event any more."""
    home.tokenize([*ROWS, *COLD], TONIGHT)
    touched = {"u01", "u02"}
    late = event("u01", 470, "late", item_id="i1", category="c1")
    left = [*[row for row in ROWS if row["user_id"] != "u02"], *COLD, late]
    add_layer(home.storage, events_frame(left), touched)
    folder = home.storage.sequences(TOMORROW)
    earlier = [home.storage.sequences(TONIGHT)]
    arguments = (home.storage, home.settings, home.vocabulary, TOMORROW, folder)
    assert write_sequences(*arguments, earlier=earlier).num_tokenized_users == 1
    completed = embed(home, TOMORROW)
    expected = read(home.storage.embeddings(TOMORROW))
    write_sequences(*arguments)
    fresh = embed(home, TOMORROW)
    assert read(home.storage.embeddings(TOMORROW)).equals(expected)
    assert completed.num_users == fresh.num_users == len(expected) - 1
    assert "u02" not in expected["user_id"].to_pylist()


def test_embeddings_equal_the_encoder_on_one_user_without_padding(home: Home):
    home.tokenize(ROWS, TONIGHT)
    embed(home, TONIGHT)
    found = vectors(home, TONIGHT)
    encoder = load_checkpoint(home.checkpoint).encoder
    for row in read(home.storage.sequences(TONIGHT)).to_pylist():
        names = {"action": "action_ids", "category": "property_ids"}
        fields = ("action", "item", "category", "location", "amount", "hour")
        ids = {names.get(f, f"{f}_ids"): torch.tensor([row[f"{f}_ids"]]) for f in fields}
        gaps = torch.tensor([row["gap_seconds"]]) / 86_400
        silence = (TONIGHT - row["last_event_at"]) / timedelta(days=1)
        with torch.inference_mode():
            out = encoder(**ids, time_gaps=gaps, silence_days=torch.tensor([silence]))
        np.testing.assert_allclose(found[row["user_id"]], out["embedding"][0], atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [8, 100, 8_000])
def test_the_size_of_batches_changes_no_embedding(home: Home, batch_tokens: int):
    home.tokenize(ROWS, TONIGHT)
    embed(home, TONIGHT)
    expected = vectors(home, TONIGHT)
    embed(home, TONIGHT, batch_tokens=batch_tokens)
    for user, vector in vectors(home, TONIGHT).items():
        np.testing.assert_allclose(vector, expected[user], atol=1e-5)


def test_who_else_is_embedded_changes_no_byte(home: Home):
    home.tokenize(ROWS, TONIGHT)
    embed(home, TONIGHT)
    expected = vectors(home, TONIGHT)
    few = [row for row in ROWS if row["user_id"] in {"u01", "u02", "u07"}]
    home.tokenize(few, TONIGHT)
    embed(home, TONIGHT)
    for user, vector in vectors(home, TONIGHT).items():
        assert vector.tobytes() == expected[user].tobytes()


def test_events_at_or_after_the_cutoff_change_no_byte(home: Home):
    home.tokenize([*ROWS, *COLD], TONIGHT)
    embed(home, TONIGHT)
    expected = contents(home.storage.embeddings(TONIGHT))
    future = [event(user, 480 + k, f"f{k}", "buy") for k, user in enumerate(["u00", "u05", "new"])]
    home.tokenize([*future, *ROWS, *COLD], TONIGHT)
    embed(home, TONIGHT)
    assert contents(home.storage.embeddings(TONIGHT)) == expected


def test_chunks_change_no_byte_of_a_vector(home: Home, monkeypatch: pytest.MonkeyPatch):
    home.tokenize([*ROWS, *COLD], TONIGHT)
    embed(home, TONIGHT)
    expected = read(home.storage.embeddings(TONIGHT))
    monkeypatch.setattr(inference, "CHUNK_USERS", 2)
    embed(home, TONIGHT)
    assert read(home.storage.embeddings(TONIGHT)).equals(expected)


def test_the_same_inputs_give_the_same_bytes(home: Home):
    home.tokenize([*ROWS, *COLD], TONIGHT)
    embed(home, TONIGHT)
    states = contents(home.storage.states(TONIGHT))
    embeddings = contents(home.storage.embeddings(TONIGHT))
    embed(home, TONIGHT)
    assert contents(home.storage.states(TONIGHT)) == states
    assert contents(home.storage.embeddings(TONIGHT)) == embeddings


def test_the_number_of_threads_changes_no_byte(home: Home):
    home.tokenize([*ROWS, *COLD], TONIGHT)
    embed(home, TONIGHT, threads=1)
    expected = contents(home.storage.embeddings(TONIGHT))
    before = torch.get_num_threads()
    embed(home, TONIGHT, threads=3)
    assert contents(home.storage.embeddings(TONIGHT)) == expected
    assert torch.get_num_threads() == before


def test_silence_changes_the_embedding_and_not_the_state(home: Home):
    for cutoff in (TONIGHT, TOMORROW):
        home.tokenize(ROWS, cutoff)
        embed(home, cutoff)
    states = [read(home.storage.states(cutoff))["state"] for cutoff in (TONIGHT, TOMORROW)]
    assert states[0].equals(states[1])
    tonight, tomorrow = vectors(home, TONIGHT), vectors(home, TOMORROW)
    for row in ROWS:
        assert np.abs(tonight[row["user_id"]] - tomorrow[row["user_id"]]).max() > 1e-4


def test_a_user_without_a_usable_event_gets_the_prior_and_the_flag(home: Home):
    checkpoint = load_checkpoint(home.checkpoint)
    prior = torch.arange(checkpoint.encoder.embedding_width, dtype=torch.float32) / 7
    checkpoint.encoder.set_prior(prior)
    trained = save_checkpoint(
        checkpoint.encoder, home.storage.vocabulary, home.storage.checkpoints, TRAINED_THROUGH, {}
    )
    home.tokenize([*ROWS, *COLD], TONIGHT)
    embed(home, TONIGHT, checkpoint=trained)
    rows = {row["user_id"]: row for row in read(home.storage.embeddings(TONIGHT)).to_pylist()}
    for user in ("cold", COLD_START_USER):
        assert rows[user]["embedding"] == prior.tolist()
        assert rows[user]["is_cold_start"]
        assert rows[user]["num_events"] == 0
        assert rows[user]["last_event_at"] is None
    others = [row for user, row in rows.items() if user.startswith("u")]
    assert not any(row["is_cold_start"] for row in others)
    (reserved,) = pq.read_table(home.storage.embeddings(TONIGHT) / PRIOR_FILE).to_pylist()
    assert reserved["user_id"] == COLD_START_USER


class CountedUsers:
    """How many histories went through the transformer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = Encoder.encode_state

        def counted(encoder: Encoder, batch: Any) -> torch.Tensor:
            self.count += batch.num_users
            return original(encoder, batch)

        monkeypatch.setattr(Encoder, "encode_state", counted)


def test_only_touched_users_pass_through_the_transformer(
    home: Home, monkeypatch: pytest.MonkeyPatch
):
    home.tokenize([*ROWS, *COLD], TONIGHT)
    embed(home, TONIGHT)
    new = [
        event("u03", 481, "tomorrow"),  # acts after the first cutoff
        event("u04", 2, "late", item_id="i1"),  # a late event inside the old history
        event("new", 482, "first"),
        event("cold", 483, "warm"),
    ]
    home.tokenize([*ROWS, *COLD, *new], TOMORROW)
    passes = CountedUsers(monkeypatch)
    summary = embed(home, TOMORROW, previous_states_folder=home.storage.states(TONIGHT))
    assert passes.count == 4
    assert summary.num_reused_states == 10
    reused = contents(home.storage.states(TOMORROW)), contents(home.storage.embeddings(TOMORROW))
    embed(home, TOMORROW)
    assert passes.count == 4 + 14
    assert reused == (
        contents(home.storage.states(TOMORROW)),
        contents(home.storage.embeddings(TOMORROW)),
    )


def test_a_run_may_reuse_the_states_that_it_replaces(home: Home, monkeypatch: pytest.MonkeyPatch):
    home.tokenize(ROWS, TONIGHT)
    embed(home, TONIGHT)
    before = contents(home.storage.states(TONIGHT))
    passes = CountedUsers(monkeypatch)
    embed(home, TONIGHT, previous_states_folder=home.storage.states(TONIGHT))
    assert passes.count == 0
    assert contents(home.storage.states(TONIGHT)) == before


def test_a_history_that_only_grew_longer_in_the_past_is_touched(
    home: Home, monkeypatch: pytest.MonkeyPatch
):
    """The list is cut, so its tokens stay; but the encoder also reads the length of the history."""
    cut = home.settings.model_copy(update={"max_sequence_events": 5})
    short = Home(home.storage, cut, home.vocabulary, home.checkpoint)
    short.tokenize(ROWS, TONIGHT)
    embed(short, TONIGHT)
    short.tokenize([*ROWS, event("u11", 0, "earlier")], TONIGHT)
    passes = CountedUsers(monkeypatch)
    embed(short, TONIGHT, previous_states_folder=home.storage.states(TONIGHT))
    assert passes.count == 1


def test_states_of_another_checkpoint_are_not_reused(home: Home, monkeypatch: pytest.MonkeyPatch):
    home.tokenize(ROWS, TONIGHT)
    embed(home, TONIGHT)
    other = load_checkpoint(home.checkpoint).encoder
    other.set_prior(torch.ones(other.embedding_width))
    checkpoint = save_checkpoint(
        other, home.storage.vocabulary, home.storage.checkpoints, TRAINED_THROUGH, {}
    )
    passes = CountedUsers(monkeypatch)
    summary = embed(
        home,
        TONIGHT,
        checkpoint=checkpoint,
        previous_states_folder=home.storage.states(TONIGHT),
    )
    assert summary.num_reused_states == 0
    assert passes.count == 12


def test_a_checkpoint_from_the_future_is_refused(home: Home):
    before = TRAINED_THROUGH - timedelta(microseconds=1)
    home.tokenize(ROWS, TRAINED_THROUGH)
    embed(home, TRAINED_THROUGH)  # exactly at the cutoff nothing leaks
    home.tokenize(ROWS, before)
    with pytest.raises(PipelineError, match="would leak"):
        embed(home, before)


def test_another_vocabulary_is_refused(home: Home):
    home.tokenize(ROWS, TONIGHT)
    path = home.storage.vocabulary / "vocabulary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocabulary_id": "another"}))
    encoder = load_checkpoint(home.checkpoint).encoder
    checkpoint = save_checkpoint(
        encoder, home.storage.vocabulary, home.storage.checkpoints, TRAINED_THROUGH, {}
    )
    with pytest.raises(PipelineError, match="another vocabulary"):
        embed(home, TONIGHT, checkpoint=checkpoint)


def test_sequences_of_another_cutoff_are_refused(home: Home):
    sequences = home.tokenize(ROWS, TONIGHT)
    shutil.copytree(sequences, home.storage.sequences(TOMORROW))
    with pytest.raises(PipelineError, match="not tokenized as of the cutoff 2024-01-22"):
        embed(home, TOMORROW)


def test_the_reserved_user_id_is_refused(home: Home):
    home.tokenize([*ROWS, event(COLD_START_USER, 1, "odd")], TONIGHT)
    with pytest.raises(PipelineError, match="reserved"):
        embed(home, TONIGHT)


def test_an_interrupted_run_leaves_what_was_there(home: Home):
    home.tokenize(ROWS, TONIGHT)
    embed(home, TONIGHT)
    before = contents(home.storage.states(TONIGHT)), contents(home.storage.embeddings(TONIGHT))

    def interrupted(done: int, total: int, _message: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(home, TONIGHT, written_at=TOMORROW, report=interrupted)
    assert before == (
        contents(home.storage.states(TONIGHT)),
        contents(home.storage.embeddings(TONIGHT)),
    )
    assert not list(home.storage.home.rglob(".*.aside"))


def test_an_embedding_that_is_not_finite_stops_the_run(home: Home, monkeypatch: pytest.MonkeyPatch):
    home.tokenize(ROWS, TONIGHT)
    original = inference.read_out

    def broken(*arguments: Any) -> np.ndarray:
        embeddings = original(*arguments)
        embeddings[-1, 3] = np.nan
        return embeddings

    monkeypatch.setattr(inference, "read_out", broken)
    with pytest.raises(AssertionError, match=r"bucket=00\d.parquet"):
        embed(home, TONIGHT)
    assert not home.storage.embeddings(TONIGHT).exists()
