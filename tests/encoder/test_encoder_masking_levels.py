from __future__ import annotations

import numpy as np
import pytest

from behavior_pipeline.contracts import MASK_ID, NUM_SPECIAL_IDS, PAD_ID
from behavior_pipeline.encoder.masking_levels import HiddenEvents, Masking, hide_events

NUM_RUNS, NUM_TYPES = 1500, 12
TOKEN, EVENT, TYPE = (
    Masking(level_shares=shares) for shares in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
)


def flat_events() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Events of runs of 1 to 60 events, a third of them without an item, then filler."""
    random = np.random.default_rng(0)
    runs = np.repeat(np.arange(NUM_RUNS), random.integers(1, 61, NUM_RUNS))
    count = len(runs)
    ids = {
        "action": random.integers(NUM_SPECIAL_IDS, NUM_TYPES, count),
        "item": random.integers(NUM_SPECIAL_IDS, 5000, count),
        "category": random.integers(NUM_SPECIAL_IDS, 40, count),
    }
    ids["item"][random.random(count) < 0.3] = PAD_ID
    ids = {name: np.pad(values, (0, 500)) for name, values in ids.items()}
    return ids, np.pad(runs, (0, 500), constant_values=-1)


def hidden_by(masking: Masking, seed: int = 1) -> HiddenEvents:
    return hide_events(*flat_events(), masking, np.random.default_rng(seed))


@pytest.mark.parametrize("masking", [TOKEN, EVENT, TYPE, Masking(), Masking(share=0.4)])
def test_the_share_of_the_events_is_hidden_and_no_filler(masking):
    ids, runs = flat_events()
    hidden = hidden_by(masking)
    room = round(masking.share * (runs >= 0).sum())
    assert room - 60 <= len(hidden.chosen) <= room  # one type of one run may not fit any more
    if masking in (TOKEN, EVENT):
        assert len(hidden.chosen) == room
    for name, targets in hidden.targets.items():
        is_target = targets != PAD_ID
        assert (runs[is_target] >= 0).all()
        assert np.array_equal(targets[is_target], ids[name][is_target])
    some = np.any([targets != PAD_ID for targets in hidden.targets.values()], axis=0)
    assert np.array_equal(np.flatnonzero(some), hidden.chosen)


def test_a_token_is_one_field_of_an_event_and_every_field_has_its_turn():
    ids, _ = flat_events()
    hidden = hidden_by(TOKEN)
    count = sum((targets != PAD_ID).astype(int) for targets in hidden.targets.values())
    assert (count[hidden.chosen] == 1).all()
    has_item = ids["item"][hidden.chosen] != PAD_ID
    for name in ids:
        drawn = (hidden.targets[name] != PAD_ID)[hidden.chosen]
        assert drawn[has_item].mean() == pytest.approx(1 / 3, abs=0.03)


def test_an_event_is_hidden_with_all_its_fields():
    ids, _ = flat_events()
    hidden = hidden_by(EVENT)
    for name, targets in hidden.targets.items():
        assert np.array_equal(targets[hidden.chosen], ids[name][hidden.chosen])


def test_a_type_is_hidden_in_all_events_of_its_run():
    ids, runs = flat_events()
    hidden = hidden_by(TYPE)
    is_chosen = np.zeros(len(runs), bool)
    is_chosen[hidden.chosen] = True
    pairs = runs * NUM_TYPES + ids["action"]
    real = runs >= 0
    covered, shown = np.unique(pairs[is_chosen]), np.unique(pairs[real & ~is_chosen])
    assert not np.isin(covered, shown).any()
    assert np.array_equal(hidden.targets["category"][is_chosen], ids["category"][is_chosen])
    # All types are hidden in some runs, about as often as their share.
    counts = np.bincount(covered % NUM_TYPES, minlength=NUM_TYPES)[NUM_SPECIAL_IDS:]
    every = np.bincount(np.unique(pairs[real]) % NUM_TYPES, minlength=NUM_TYPES)[NUM_SPECIAL_IDS:]
    assert counts / every == pytest.approx(np.full(len(counts), 0.15), abs=0.04)


def test_levels_are_dealt_to_runs_in_their_shares():
    _, runs = flat_events()
    hidden = hidden_by(Masking(share=0.5, level_shares=(0.5, 0.5, 0.0)))
    fields = sum((targets != PAD_ID).astype(int) for targets in hidden.targets.values())
    several = np.unique(runs[fields > 1])
    single = np.unique(runs[fields == 1])
    assert len(np.intersect1d(several, single)) == 0
    assert len(several) / (len(several) + len(single)) == pytest.approx(0.5, abs=0.05)


def test_what_is_hidden_is_masked_swapped_or_kept_in_berts_shares():
    ids, _ = flat_events()
    hidden = hidden_by(Masking(share=0.5, level_shares=(0.0, 1.0, 0.0)))
    before, after = ids["category"][hidden.chosen], hidden.ids["category"][hidden.chosen]
    assert (after == MASK_ID).mean() == pytest.approx(0.8, abs=0.01)
    # A swap takes another event's value, which is the same one time in 36.
    assert (after == before).mean() == pytest.approx(0.1 + 0.1 / 36, abs=0.01)
    # An event's fields share their fate, and what an event lacks it does not get.
    masked = hidden.ids["action"][hidden.chosen] == MASK_ID
    assert np.array_equal(masked, after == MASK_ID)
    for name, values in hidden.ids.items():
        assert np.array_equal(values == PAD_ID, ids[name] == PAD_ID)
        shown = hidden.targets[name] == PAD_ID
        assert np.array_equal(values[shown], ids[name][shown])


def test_a_generator_decides_everything_and_nothing_given_is_changed():
    ids, runs = flat_events()
    runs_of = [hidden_by(Masking(), seed) for seed in (5, 5, 6)]
    for name in ids:
        assert np.array_equal(runs_of[0].ids[name], runs_of[1].ids[name])
        assert not np.array_equal(runs_of[0].ids[name], runs_of[2].ids[name])
    kept = {name: values.copy() for name, values in ids.items()}
    hide_events(ids, runs, Masking(), np.random.default_rng(0))
    assert all(np.array_equal(values, ids[name]) for name, values in kept.items())


def test_nothing_but_filler_and_whole_shares_are_no_trouble():
    ids, runs = flat_events()
    only_filler = {name: values[-500:] for name, values in ids.items()}
    hidden = hide_events(only_filler, runs[-500:], Masking(), np.random.default_rng(0))
    assert len(hidden.chosen) == 0
    assert len(hidden_by(Masking(share=0.0)).chosen) == 0
    everything = hidden_by(Masking(share=1.0))
    assert len(everything.chosen) == (runs >= 0).sum()
    empty = {name: values[:0] for name, values in ids.items()}
    assert len(hide_events(empty, runs[:0], Masking(), np.random.default_rng(0)).chosen) == 0


def test_shares_without_meaning_are_refused():
    for share, levels in ((1.5, (1.0, 0.0, 0.0)), (0.1, (0.5, 0.2, 0.2)), (0.1, (2.0, -1.0, 0.0))):
        with pytest.raises(ValueError, match="share"):
            Masking(share, levels)
