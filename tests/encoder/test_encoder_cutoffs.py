from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import islice

import numpy as np
import pytest
import torch
from encoder_builders import CUTOFF, SIZES, STARTED, sequences_table, user_row
from hypothesis import given
from hypothesis import strategies as st

from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import (
    BatchMaker,
    CutLabels,
    CutoffPlan,
    Cuts,
    is_validation,
    plan_cutoffs,
    window_rates,
)
from behavior_pipeline.encoder.sequence_files import (
    Survey,
    read_table,
    sequence_files,
    survey,
    to_microseconds,
)
from behavior_pipeline.encoder.training_batches import TrainingBatch

DAY = 86_400_000_000
CONFIG = TrainingConfig.named("tiny")
SHAPE = EncoderConfig.named("tiny", SIZES)


def at(days: float) -> int:
    return to_microseconds(STARTED + timedelta(days=days))


def cuts_of(days: list[float], cutoff_days: float, horizon_days: float = 30) -> tuple:
    table = read_table(sequences_table([user_row("a", days, 1)]), "here")
    moments = np.array([at(cutoff_days)])
    return table, Cuts.at(table, np.array([0]), moments, round(horizon_days * DAY))


def test_an_event_at_the_cutoff_belongs_to_the_label_window_and_one_at_its_end_does_not():
    _, cuts = cuts_of([1, 10, 15, 40], cutoff_days=10)
    assert cuts.places.tolist() == [1]
    assert cuts.window_ends.tolist() == [3]


def test_labels_by_hand():
    table, cuts = cuts_of([1, 10, 15, 60], cutoff_days=12)
    assert cuts.silence_days(table).tolist() == [2]
    assert cuts.next_time(table, 30 * DAY).tolist() == [2]  # after 3 of 30 days: at least 3/30
    seen = np.flatnonzero(cuts.window(table, "item", 36)[0])
    assert seen.tolist() == [table.ids["item"][2] - 4]
    table, cuts = cuts_of([1, 10, 60], cutoff_days=12)
    assert cuts.next_time(table, 30 * DAY).tolist() == [6]
    assert not cuts.window(table, "item", 36).any()


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
    st.integers(-1, 51),
    st.integers(1, 20),
)
def test_cuts_agree_with_a_search_in_each_list(days, cutoff, horizon):
    _, cuts = cuts_of(sorted(map(float, days)), cutoff, horizon)
    moments = np.array([cutoff, cutoff + horizon])
    expected = np.searchsorted(np.sort(days), moments)
    assert [cuts.places[0], cuts.window_ends[0]] == expected.tolist()


def test_label_windows_end_within_the_training_data(folders):
    found = survey(sequence_files(folders.sequences))
    plan = plan_cutoffs(found, CONFIG)
    assert plan.latest + plan.horizon == to_microseconds(CUTOFF)
    assert plan.earliest < plan.latest
    assert plan.horizon == 30 * DAY


def test_a_short_training_period_shortens_the_horizon():
    found = Survey(1, 1, datetime.fromisoformat("2024-06-22T00:00:00+00:00"), CUTOFF, "v")
    plan = plan_cutoffs(found, CONFIG)
    assert plan.horizon == 3 * DAY
    assert to_microseconds(found.started_at) < plan.earliest < plan.latest


def users_of(batch: TrainingBatch) -> torch.Tensor:
    """Tell which rows are users: those with an event before or after the cutoff."""
    histories, following = batch.prefixes.lengths[:, -1].chunk(2)
    return histories + following > 0


def test_histories_end_before_the_cutoff_and_windows_start_from_it(folders):
    files = sequence_files(folders.sequences)
    moment = at(120)
    plan = CutoffPlan(moment, moment, 30 * DAY)
    batches = BatchMaker(files, SHAPE, CONFIG, plan).validation()
    batches += list(islice(BatchMaker(files, SHAPE, CONFIG, plan).training(), 6))
    pairs = 0
    for batch in batches:
        histories, following = batch.prefixes.lengths[:, -1].chunk(2)
        silence = batch.cuts[0].silence_days
        assert (silence > 0).equal(histories > 0)
        starts = batch.prefixes.starts.chunk(2)[1][following > 0]
        assert not batch.tokens.gap_days[starts].any()
        assert not batch.prefixes.before.chunk(2)[1].any()
        # Everything of a user is either before or after: no event counts twice or is lost.
        assert users_of(batch).sum() == batch.num_users
        assert batch.is_pair.equal((histories > 0) & (following > 0))
        pairs += int(batch.is_pair.sum())
    assert pairs > 10


def test_a_user_who_never_came_back_is_labelled_so(folders):
    files = sequence_files(folders.sequences)
    moment = at(149)
    batches = BatchMaker(files, SHAPE, CONFIG, CutoffPlan(moment, moment, 30 * DAY)).validation()
    for batch in batches:
        gone = users_of(batch) & (batch.prefixes.lengths[:, -1].chunk(2)[1] == 0)
        for cut in batch.cuts:
            assert (cut.next_time[gone] == 6).all()
            assert not cut.window["action"][gone].any()


def test_every_cutoff_of_a_batch_knows_only_what_came_before_it(folders):
    files = sequence_files(folders.sequences)
    plan = plan_cutoffs(survey(files), CONFIG)
    num_earlier = 0
    for batch in islice(BatchMaker(files, SHAPE, CONFIG, plan).training(), 8):
        assert len(batch.cuts) == CONFIG.cutoffs_per_user == 3
        size = len(batch.is_pair)
        histories = batch.prefixes.lengths[:size]
        assert torch.equal(batch.cuts[0].lengths, histories[:, -1])
        for column, cut in enumerate(reversed(batch.cuts)):
            assert torch.equal(cut.lengths, histories[:, column])
        ends = [end_of(batch, cut) for cut in batch.cuts]
        for cut, later, end, later_end in zip(
            batch.cuts[1:], batch.cuts, ends[1:], ends, strict=False
        ):
            known = cut.lengths > 0
            assert (cut.lengths <= later.lengths).all()
            # The moment of a cut is its last event and the silence after it: never a later one,
            # and never beyond the first event that it does not know.
            assert (end <= later_end + 1e-3)[known].all()
            following = batch.tokens.elapsed_days[batch.prefixes.starts[:size] + cut.lengths]
            has_following = known & (cut.lengths < histories[:, -1])
            assert (end <= following + 1e-3)[has_following].all()
            num_earlier += int((cut.lengths < later.lengths).sum())
    assert num_earlier > 10


def end_of(batch: TrainingBatch, cut: CutLabels) -> torch.Tensor:
    """Return each cut's moment in days since the user's first event that is read."""
    last = batch.prefixes.starts[: len(cut.lengths)] + (cut.lengths - 1).clamp(min=0)
    return batch.tokens.elapsed_days[last] + cut.silence_days


def test_window_rates_by_hand(folders):
    files = sequence_files(folders.sequences)
    plan = plan_cutoffs(survey(files), CONFIG)
    (batch,) = islice(BatchMaker(files, SHAPE, CONFIG, plan).training(), 1)
    found = torch.tensor([[True, False], [True, True], [False, False]])
    cuts = tuple(replace(cut, window={"item": found}) for cut in batch.cuts[:2])
    rates = window_rates([replace(batch, cuts=cuts, num_users=2)])
    # Two users at two cutoffs, and the imagined user with a hundredth of each target.
    assert rates["item"].tolist() == pytest.approx([4.01 / 5, 2.01 / 5])
    assert window_rates([]) == {}


def test_validation_users_are_never_trained_on(folders):
    files = sequence_files(folders.sequences)
    plan = plan_cutoffs(survey(files), CONFIG)
    config = replace(CONFIG, validation_share=0.3)
    users = [f"user{number:04d}" for number in range(60)]
    kept = is_validation(users, 0.3)
    assert 5 < kept.sum() < 35
    maker = BatchMaker(files, SHAPE, config, plan)
    validation = sum(batch.num_users for batch in maker.validation())
    assert validation == kept[:-1].sum()  # the last user has no event
    seen = list(islice(maker._parts(), 12))
    trained = {user for part in seen for user in part.table.user_ids.take(part.users).to_pylist()}
    assert trained == set(np.array(users)[:-1][~kept[:-1]])


def test_the_validation_share_is_a_function_of_the_user_alone():
    users = [f"u{number}" for number in range(5000)]
    kept = is_validation(users, 0.05)
    assert kept.mean() == pytest.approx(0.05, abs=0.01)
    assert is_validation(users[::-1], 0.05).tolist() == kept[::-1].tolist()
