"""What a night is named, on made-up histories."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from drift_builders import Alter, altered, calm_nights, with_counts, with_figures
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from behavior_pipeline.downstream.drift.history import NightFigures
from behavior_pipeline.downstream.drift.verdicts import (
    ALARMING,
    Kind,
    Verdict,
    is_aligned,
    judge_nights,
)
from behavior_pipeline.settings import Settings

NUM_NIGHTS = 60
CHANGED = 50
SETTINGS = Settings()


def verdicts_of(alter: Alter, seed: int = 0, until: int = NUM_NIGHTS) -> list[Verdict]:
    """Judge nights of which those from CHANGED to `until` are altered."""
    nights = altered(calm_nights(NUM_NIGHTS, seed), CHANGED, alter)
    nights[until:] = calm_nights(NUM_NIGHTS, seed)[until:]
    return judge_nights(nights, SETTINGS)


def first_of(alter: Alter, seed: int = 0) -> Verdict:
    return verdicts_of(alter, seed)[CHANGED]


def lost(share: float, name: str = "cart") -> Alter:
    def alter(night: NightFigures) -> NightFigures:
        return with_counts(night, **{name: int((night.event_counts or {})[name] * share)})

    return alter


def searching(night: NightFigures) -> NightFigures:
    counts = night.event_counts or {}
    moved = counts["view"] // 5
    return with_counts(night, view=counts["view"] - moved, search=counts["search"] + moved)


def halved(night: NightFigures) -> NightFigures:
    return replace(
        night, event_counts={name: n // 2 for name, n in (night.event_counts or {}).items()}
    )


def test_nights_without_a_change_are_calm_once_calibrated() -> None:
    verdicts = judge_nights(calm_nights(NUM_NIGHTS), SETTINGS)
    kinds = [verdict.kind for verdict in verdicts]
    first_calm = kinds.index(Kind.CALM)
    assert set(kinds[:first_calm]) == {Kind.CALIBRATING}
    assert set(kinds[first_calm:]) == {Kind.CALM}
    assert first_calm == SETTINGS.drift_calm_nights
    assert not any(verdict.is_alarm for verdict in verdicts)


def test_a_type_that_hardly_comes_any_more_is_broken_tracking() -> None:
    verdict = first_of(lost(0.1))
    assert verdict.kind is Kind.BROKEN_TRACKING
    assert "'cart'" in verdict.words
    assert "while the others hold" in verdict.words
    assert "'view'" not in verdict.words


def test_the_most_frequent_type_broken_is_named_alone_though_all_other_shares_rise() -> None:
    verdict = first_of(lost(0.05, "view"))
    assert verdict.kind is Kind.BROKEN_TRACKING
    assert "'view'" in verdict.words
    assert "'search'" not in verdict.words


@given(
    name=st.sampled_from(["view", "search", "cart", "buy"]),
    share=st.floats(0, 0.2),
    seed=st.integers(0, 50),
)
@hypothesis_settings(max_examples=12)
def test_whatever_type_is_lost_is_named_on_the_first_night(
    name: str, share: float, seed: int
) -> None:
    verdict = first_of(lost(share, name), seed)
    assert verdict.kind is Kind.BROKEN_TRACKING
    assert f"'{name}'" in verdict.words


def test_a_renamed_type_is_asked_about() -> None:
    def rename(night: NightFigures) -> NightFigures:
        return with_counts(night, cart=None, add_to_basket=(night.event_counts or {})["cart"])

    assert "of type 'add_to_basket', which is new: renamed?" in first_of(rename).words


def test_another_mix_says_from_what_to_what() -> None:
    verdict = first_of(searching)
    assert verdict.kind is Kind.EVENT_MIX
    assert "'search'" in verdict.words
    assert "→" in verdict.words


def test_half_of_everything_is_a_number_of_events_not_a_mix() -> None:
    verdict = first_of(halved)
    assert verdict.kind is Kind.VOLUME
    assert "num events" in verdict.words


def test_one_change_alarms_once_and_the_new_level_is_then_the_expected_one() -> None:
    for alter in (lost(0.1), searching, halved):
        alarms = [verdict.is_alarm for verdict in verdicts_of(alter)]
        assert alarms[CHANGED]
        assert not any(alarms[CHANGED + 1 :])


def test_a_fault_of_one_night_leaves_the_old_level_as_the_expected_one() -> None:
    verdicts = verdicts_of(lost(0.1), until=CHANGED + 1)
    assert [verdict.is_alarm for verdict in verdicts].count(True) == 1
    assert verdicts[CHANGED].kind is Kind.BROKEN_TRACKING


def test_a_mended_tracking_is_told_too() -> None:
    verdicts = verdicts_of(lost(0.0), until=CHANGED + 5)
    assert verdicts[CHANGED + 5].kind is Kind.EVENT_MIX
    assert "'cart' 0." in verdicts[CHANGED + 5].words


def test_users_whose_rfm_jumps() -> None:
    verdict = first_of(lambda night: with_figures(night, psi_recency_days=0.3))
    assert verdict.kind is Kind.USERS
    assert "psi recency days" in verdict.words


def test_many_new_users_at_once() -> None:
    verdict = first_of(
        lambda night: with_figures(night, num_users=night.figures["num_users"] * 1.2)
    )
    assert verdict.kind is Kind.USERS


def test_embeddings_alone_are_a_fault_of_the_encoder() -> None:
    verdict = first_of(lambda night: with_figures(night, neighbour_overlap=0.1, norm_p50=9.0))
    assert verdict.kind is Kind.ENCODER_FAULT
    assert verdict.is_alarm
    assert "neighbour overlap" in verdict.words


def test_embeddings_that_follow_the_data_are_no_fault_of_the_encoder() -> None:
    def both(night: NightFigures) -> NightFigures:
        return with_figures(searching(night), neighbour_overlap=0.5)

    verdict = first_of(both)
    assert [finding.kind for finding in verdict.findings] == [Kind.EVENT_MIX, Kind.ECHO]


def retrained(**figures: float) -> Alter:
    def alter(night: NightFigures) -> NightFigures:
        is_first = night.cutoff == calm_nights(CHANGED + 1)[-1].cutoff
        former = "one" if is_first else "two"
        lasting = {name: value for name, value in figures.items() if name.startswith("norm")}
        shown = with_figures(night, **(figures if is_first else lasting))
        return replace(shown, checkpoint_id="two", previous_checkpoint_id=former)

    return alter


def test_a_retraining_is_named_and_is_no_alarm() -> None:
    verdicts = verdicts_of(
        retrained(
            cross_overlap=0.01, aligned_overlap=0.4, neighbour_overlap=0.4, segment_churn=0.5,
            norm_p50=20.0,
        )
    )  # fmt: skip
    verdict = verdicts[CHANGED]
    assert verdict.kind is Kind.RETRAINING
    assert not verdict.is_alarm
    assert "one → two; not aligned: 1% of the neighbours kept" in verdict.words
    assert "more than alignment explains: neighbour overlap" in verdict.words
    assert "norm" not in verdict.words.split("more than")[1]
    assert {verdict.kind for verdict in verdicts[CHANGED + 1 :]} == {Kind.CALM}


def test_a_retraining_that_was_aligned_says_so() -> None:
    verdict = first_of(retrained(cross_overlap=0.39, aligned_overlap=0.4))
    assert "; aligned: 39%" in verdict.words
    assert "no more moved than alignment explains" in verdict.words


def test_a_retraining_does_not_hide_data_drift() -> None:
    first = retrained(cross_overlap=0.01, aligned_overlap=0.4)
    verdict = first_of(lambda night: lost(0.1)(first(night)))
    assert [finding.kind for finding in verdict.findings] == [
        Kind.BROKEN_TRACKING, Kind.RETRAINING,
    ]  # fmt: skip


def test_a_retraining_is_named_before_anything_is_calibrated() -> None:
    nights = calm_nights(3)
    nights[2] = replace(nights[2], checkpoint_id="two")
    assert judge_nights(nights, SETTINGS)[2].kind is Kind.RETRAINING


def test_an_encoder_that_embedded_the_night_before_again_is_still_another() -> None:
    nights = calm_nights(NUM_NIGHTS)
    for place in range(CHANGED, NUM_NIGHTS):
        nights[place] = replace(nights[place], checkpoint_id="two", previous_checkpoint_id="two")
    verdicts = judge_nights(nights, SETTINGS)
    assert verdicts[CHANGED].kind is Kind.RETRAINING
    assert verdicts[CHANGED + 1].kind is Kind.CALM


def test_changes_are_not_taken_across_nights_that_are_missing() -> None:
    nights = calm_nights(NUM_NIGHTS)
    grown = with_figures(nights[CHANGED], num_users=nights[CHANGED].figures["num_users"] * 1.2)
    later = [
        with_figures(night, num_users=night.figures["num_users"] * 1.2)
        for night in nights[CHANGED + 1 :]
    ]
    verdicts = judge_nights([*nights[: CHANGED - 1], grown, *later], SETTINGS)
    assert not any(verdict.is_alarm for verdict in verdicts)


def test_without_measured_overlap_nothing_is_said_of_alignment() -> None:
    night = replace(calm_nights(1)[0], figures={})
    assert is_aligned(night) is None


@given(num_nights=st.integers(1, NUM_NIGHTS))
@hypothesis_settings(max_examples=10)
def test_a_night_is_judged_by_those_before_it_alone(num_nights: int) -> None:
    nights = altered(calm_nights(NUM_NIGHTS, 3), CHANGED, searching)
    whole = judge_nights(nights, SETTINGS)
    assert judge_nights(nights[:num_nights], SETTINGS) == whole[:num_nights]


def test_a_gap_of_nights_is_not_compared_across() -> None:
    nights = calm_nights(NUM_NIGHTS)
    after = with_figures(nights[CHANGED + 3], neighbour_overlap=0.2, psi_recency_days=0.4)
    gapped = [
        *nights[:CHANGED],
        replace(after, previous_cutoff=after.cutoff - timedelta(days=4)),
        *nights[CHANGED + 4 :],
    ]
    assert not any(verdict.is_alarm for verdict in judge_nights(gapped, SETTINGS))


def test_nights_without_recorded_events_are_judged_by_the_rest() -> None:
    nights = [replace(night, event_counts=None) for night in calm_nights(NUM_NIGHTS)]
    last = with_figures(nights[-1], neighbour_overlap=0.1)
    verdicts = judge_nights([*nights[:-1], last], SETTINGS)
    assert verdicts[-1].kind is Kind.ENCODER_FAULT


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_is_an_alarm_or_not(kind: Kind) -> None:
    assert (kind in ALARMING) == (kind.startswith("data drift") or "without" in kind)
