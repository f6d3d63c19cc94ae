from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoder_builders import CUTOFF, SIZES, STARTED, random_rows, sequences_table, user_row
from hypothesis import given, settings
from hypothesis import strategies as st

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.batches import read_batches, table_batches
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.history import BEFORE, DECAY_DAYS, history_scalars
from behavior_pipeline.encoder.inference import encode_files, encode_table, read_out
from behavior_pipeline.encoder.layouts import padded_length
from behavior_pipeline.encoder.sequence_files import (
    read_in_order,
    read_shuffled,
    read_table,
    sequence_files,
    survey,
)
from behavior_pipeline.errors import PipelineError

SHAPE = EncoderConfig.named("tiny", SIZES)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig.named("tiny", SIZES)).eval()


def test_lists_become_flat_arrays():
    rows = [user_row("a", [0, 1, 1.25], 1), user_row("b", [], 2), user_row("c", [2, 9], 3)]
    table = read_table(sequences_table(rows), "here")
    assert table.offsets.tolist() == [0, 3, 3, 5]
    assert table.ids["action"].tolist() == rows[0]["action_ids"] + rows[2]["action_ids"]
    assert table.gap_days.tolist() == [0, 1, 0.25, 0, 7]
    assert table.visits.tolist() == [0, 1, 2, 0, 1]


def test_a_slice_of_a_table_reads_like_the_rows_alone():
    rows = random_rows(9)
    part = read_table(sequences_table(rows).slice(3, 4), "here")
    alone = read_table(sequences_table(rows[3:7]), "here")
    assert part.offsets.tolist() == alone.offsets.tolist()
    for field in SIZES:
        assert part.ids[field].tolist() == alone.ids[field].tolist()


def test_only_the_newest_events_are_read_and_what_came_before_is_told():
    days = [0, 2, 4, 4.1, 7, 11]
    table = read_table(sequences_table([user_row("a", days, 1, kept=5)]), "here")
    (batch,) = table_batches(table, replace(SHAPE, max_events=3), batch_tokens=24)
    assert batch.gap_days[0, :3].tolist() == pytest.approx([0.1, 2.9, 4])
    # Three events before: on day 0, which the list does not hold, and on days 2 and 4.
    # Only the two listed visits have a gap and a known time: 2.1 and .1 days before day 4.1.
    decayed = [math.exp(-2.1 / days) + math.exp(-0.1 / days) for days in DECAY_DAYS]
    gaps = [2, 2 * math.log(3), 2 * math.log(3) ** 2, 2]
    assert batch.before[0].tolist() == pytest.approx([3, 4.1, 3, *gaps, *decayed], rel=1e-5)
    silence = (CUTOFF - STARTED - timedelta(days=11)) / timedelta(days=1)
    assert batch.silence_days[0].item() == pytest.approx(silence)


@settings(max_examples=50, deadline=None)
@given(
    days=st.lists(st.floats(0, 3000), min_size=1, max_size=20, unique=True).map(sorted),
    num_read=st.integers(1, 20),
)
def test_scalars_do_not_depend_on_how_many_events_are_read(days, num_read):
    table = read_table(sequences_table([user_row("a", days, 1)]), "here")
    whole = history_scalars(
        torch.from_numpy(table.gap_days)[None],
        torch.tensor([len(days)]),
        torch.zeros(1, len(BEFORE)),
    )
    start = max(0, len(days) - num_read)
    before = torch.from_numpy(table.before(np.array([0]), np.array([start])))
    gaps = torch.from_numpy(table.gap_days[start:])[None]
    newest = history_scalars(gaps, torch.tensor([len(days) - start]), before)
    torch.testing.assert_close(newest, whole, atol=2e-4, rtol=1e-4)


def test_states_and_embeddings_stand_in_the_order_of_the_files(encoder, folders):
    files = sequence_files(folders.sequences)
    expected = [user for path in files for user in pq.read_table(path)["user_id"].to_pylist()]
    parts = list(encode_files(encoder, files, chunk_users=7))
    assert [user for part in parts for user in part.user_ids.to_pylist()] == expected
    seen = [user for users, _ in read_batches(files, encoder.config, 256) for user in users]
    assert sorted(seen) == sorted(expected)


def test_a_user_embeds_to_the_same_bits_whoever_else_is_there(encoder):
    rows = random_rows(50)
    together = encode_table(encoder, read_table(sequences_table(rows), "here"), 256)
    embeddings = read_out(encoder, together.states, together.silence_days)
    for chosen in ([7], [3, 7, 20, 49], [49, 7]):
        few = read_table(sequences_table([rows[place] for place in chosen]), "here")
        apart = encode_table(encoder, few, 256)
        assert np.array_equal(apart.states, together.states[chosen])
        again = read_out(encoder, apart.states, apart.silence_days)
        assert np.array_equal(again, embeddings[chosen])


def test_batches_agree_with_the_plain_call(encoder):
    row = user_row("a", [0, 3, 3.5, 20], 5)
    table = read_table(sequences_table([row]), "here")
    result = encode_table(encoder, table)
    with torch.no_grad():
        plain = encoder(
            torch.tensor([row["action_ids"]]),
            torch.tensor([row["category_ids"]]),
            torch.tensor([row["gap_seconds"]]) / 86_400,
            item_ids=torch.tensor([row["item_ids"]]),
            amount_ids=torch.tensor([row["amount_ids"]]),
            hour_ids=torch.tensor([row["hour_ids"]]),
            silence_days=torch.from_numpy(result.silence_days),
        )["embedding"].numpy()
    embedding = read_out(encoder, result.states, result.silence_days)
    np.testing.assert_allclose(embedding, plain, atol=1e-5)


@given(st.lists(st.integers(0, 400), min_size=1), st.sampled_from([32, 100, 256]))
def test_padded_lengths_are_few_enough_and_long_enough(lengths, max_events):
    padded = padded_length(np.array(lengths), max_events)
    kept = np.minimum(lengths, max_events)
    assert (padded >= kept).all()
    assert (padded <= np.maximum(1.5 * kept, 8)).all()


def test_a_shuffled_reading_yields_everyone_once_and_the_seed_decides_the_order(folders):
    files = sequence_files(folders.sequences)

    def users(seed: int) -> list[str]:
        chunks = read_shuffled(files, 20, np.random.default_rng(seed))
        return [user for chunk in chunks for user in chunk.user_ids.to_pylist()]

    in_order = [user for t in read_in_order(files, 100) for user in t.user_ids.to_pylist()]
    assert sorted(users(1)) == sorted(in_order)
    assert users(1) == users(1)
    assert len({tuple(users(seed)) for seed in range(5)}) > 1


def test_a_survey_counts_and_refuses_mixed_cutoffs(tmp_path):
    rows = random_rows(5)
    path = tmp_path / "a.parquet"
    pq.write_table(sequences_table(rows), path)
    found = survey([path])
    assert found.num_users == 4
    assert found.num_events == sum(row["num_events"] for row in rows)
    assert found.trained_through == CUTOFF
    assert found.started_at == min(row["first_event_at"] for row in rows[:-1])
    rows[0]["observation_cutoff"] += timedelta(days=1)
    pq.write_table(sequences_table(rows), path)
    with pytest.raises(PipelineError, match="2 values of observation_cutoff"):
        survey([path])


def test_files_that_are_no_sequences_are_refused(tmp_path):
    with pytest.raises(PipelineError, match="no sequence file"):
        sequence_files(tmp_path)
    with pytest.raises(PipelineError, match="lacks user_id"):
        read_table(pa.table({"x": [1]}), "here")
    rows = [user_row("a", [1, 2], 1)]
    rows[0]["item_ids"] = [5]
    with pytest.raises(PipelineError, match="item_ids"):
        read_table(sequences_table(rows), "here")


def test_an_event_at_the_cutoff_is_refused(tmp_path):
    rows = [user_row("a", [1, 182], 1)]
    assert rows[0]["last_event_at"] >= CUTOFF
    pq.write_table(sequences_table(rows), tmp_path / "a.parquet")
    with pytest.raises(PipelineError, match="at or after its observation cutoff"):
        survey([tmp_path / "a.parquet"])
