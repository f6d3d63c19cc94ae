"""What is measured of a night, and the history that it joins."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from downstream_builders import (
    CHECKPOINT,
    LIVE_WINDOWS,
    TEST,
    WRITTEN_AT,
    write_home,
    write_mart,
    write_vectors,
)
from drift_builders import altered, calm_nights, with_counts
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from behavior_pipeline.cli import app
from behavior_pipeline.commands import drift as command
from behavior_pipeline.contracts import USER_RFM
from behavior_pipeline.downstream.drift.figures import measure_night, segment_churn
from behavior_pipeline.downstream.drift.history import (
    NightFigures,
    read_history,
    row_path,
    write_figures,
)
from behavior_pipeline.downstream.drift.picture import drift_png, drift_svg
from behavior_pipeline.downstream.drift.stability import (
    RFM_COLUMNS,
    mix_stability,
    population_stability,
    rfm_histograms,
)
from behavior_pipeline.downstream.drift.verdicts import judge_nights
from behavior_pipeline.downstream.report import _drift
from behavior_pipeline.downstream.segmentation import segment
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.schemas import KnownSchemas, SourceSchema, write_schemas
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, read_json
from behavior_pipeline.windows import partition_of

EVE, NIGHT = TEST, TEST + timedelta(days=1)
NUM_USERS = 120
SETTINGS = Settings(threads=1, memory_limit="1GB", num_segments=3, drift_sample_users=50)

counts_lists = st.integers(2, 8).flatmap(
    lambda size: st.tuples(*[st.lists(st.integers(0, 500), min_size=size, max_size=size)] * 2)
)


def test_population_stability_by_hand() -> None:
    # shares .5, .5 and .25, .75: .25 ln 2 - .25 ln (2/3) = .27465; half a user per bin is nothing
    many = 10**7
    assert population_stability([2 * many, 2 * many], [many, 3 * many]) == pytest.approx(
        0.25 * np.log(2.0) - 0.25 * np.log(2.0 / 3.0), abs=1e-6
    )
    # with few users the half counts: shares 1.5/2, .5/2 and .5/2, 1.5/2
    assert population_stability([1, 0], [0, 1]) == pytest.approx(np.log(3.0))


@given(counts_lists)
def test_population_stability_is_a_symmetric_divergence(pair: tuple[list[int], list[int]]) -> None:
    one, other = pair
    assert population_stability(one, other) == pytest.approx(population_stability(other, one))
    assert population_stability(one, other) >= 0.0
    assert population_stability(one, one) == 0.0


def test_histograms_of_other_bins_are_not_compared() -> None:
    with pytest.raises(ValueError, match="2 bins beside 3"):
        population_stability([1, 2], [1, 2, 3])


def test_a_type_that_only_one_mix_has_counts_nothing_in_the_other() -> None:
    assert mix_stability({"a": 1}, {"b": 1}) == pytest.approx(np.log(3.0))


def test_segments_under_other_numbers_are_the_same_segments() -> None:
    for numbers in itertools.permutations(range(3)):
        pairs = [(numbers[segment], segment, 10 + segment) for segment in range(3)]
        assert segment_churn(pairs) == 0.0


def test_users_who_changed_segments_are_counted_after_matching() -> None:
    # 0 -> 1 (8 stay, 2 leave), 1 -> 0 (all 10 stay): 2 of 20 have changed
    assert segment_churn([(1, 0, 8), (0, 0, 2), (0, 1, 10)]) == pytest.approx(0.1)


def test_a_segment_more_than_before() -> None:
    assert segment_churn([(0, 0, 6), (2, 0, 4), (1, 1, 10)]) == pytest.approx(0.2)


def test_without_users_in_common_nothing_has_churned() -> None:
    assert segment_churn([]) is None


@pytest.fixture
def home(tmp_path: Path) -> Storage:
    """Two nights of users whose vectors move a little, with arrivals and segments."""
    storage = Storage(tmp_path / "home")
    write_home(storage, NUM_USERS, cutoffs=(EVE, NIGHT))
    users = [f"user-{number:05d}" for number in range(NUM_USERS)]
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(NUM_USERS, 6))
    for cutoff, noise in ((EVE, 0.0), (NIGHT, 0.01)):
        moved = vectors + noise * rng.normal(size=vectors.shape)
        write_vectors(storage.embeddings(cutoff), users, moved, cutoff)
        segment(storage, SETTINGS, replace(LIVE_WINDOWS, cutoff=cutoff), WRITTEN_AT)
    shown = SourceSchema("parquet", {}, {"view": 80, "purchase": 20})
    write_schemas(KnownSchemas({partition_of(NIGHT): shown}), storage)
    return storage


def test_a_night_is_measured_beside_the_night_before(home: Storage) -> None:
    night = measure_night(home, SETTINGS, NIGHT, WRITTEN_AT)
    assert night.previous_cutoff == EVE
    assert night.follows_its_eve
    assert night.previous_checkpoint_id == CHECKPOINT
    assert night.checkpoint_id == CHECKPOINT
    assert night.event_counts == {"view": 80, "purchase": 20}
    figures = night.figures
    assert figures["num_users"] == NUM_USERS
    assert figures["num_compared_users"] == SETTINGS.drift_sample_users
    assert figures["cold_start_share"] == 0.0
    assert figures["neighbour_overlap"] > 0.9
    assert 0.0 < figures["moved"] < 0.05
    assert figures["segment_churn"] < 0.1
    assert figures["norm_p05"] < figures["norm_p50"] < figures["norm_p95"]
    assert {f"psi_{column}" for column in RFM_COLUMNS} <= figures.keys()
    assert all(sum(counts) == NUM_USERS for counts in night.rfm.values())


def test_the_first_night_has_no_night_before(home: Storage) -> None:
    night = measure_night(home, SETTINGS, EVE, WRITTEN_AT)
    assert night.previous_cutoff is None
    assert "neighbour_overlap" not in night.figures
    assert night.event_counts is None


def test_another_checkpoint_is_a_retraining(home: Storage) -> None:
    users = [f"user-{number:05d}" for number in range(NUM_USERS)]
    vectors = np.random.default_rng(9).normal(size=(NUM_USERS, 6))
    write_vectors(home.embeddings(NIGHT), users, vectors, NIGHT, "checkpoint-b")
    night = measure_night(home, SETTINGS, NIGHT, WRITTEN_AT)
    (verdict,) = judge_nights([night], SETTINGS)
    assert verdict.words.startswith(f"retraining: {CHECKPOINT} → checkpoint-b")
    assert night.figures["neighbour_overlap"] < 0.5
    assert [each.checkpoint_id for each in read_history(home)] == ["checkpoint-b"]


def test_a_night_whose_segments_and_marts_are_gone_is_measured_without(home: Storage) -> None:
    (home.segments(EVE) / "segments.parquet").unlink()
    (home.marts(EVE) / "user_rfm.parquet").unlink()
    figures = measure_night(home, SETTINGS, NIGHT, WRITTEN_AT).figures
    assert "segment_churn" not in figures
    assert "psi_frequency" not in figures
    assert "neighbour_overlap" in figures


def test_without_embeddings_there_is_nothing_to_measure(home: Storage) -> None:
    with pytest.raises(PipelineError, match="no embeddings"):
        measure_night(home, SETTINGS, NIGHT + timedelta(days=1), WRITTEN_AT)


def test_measuring_again_replaces_the_nights_row(home: Storage) -> None:
    first = measure_night(home, SETTINGS, NIGHT, WRITTEN_AT)
    path = row_path(home, NIGHT, CHECKPOINT)
    content = path.read_bytes()
    assert measure_night(home, SETTINGS, NIGHT, WRITTEN_AT) == first
    assert path.read_bytes() == content
    assert read_history(home) == [first]


def test_bins_are_those_of_the_first_night_measured(home: Storage) -> None:
    measure_night(home, SETTINGS, EVE, WRITTEN_AT)
    bins = read_json(home.drift / "rfm_bins.json")
    measure_night(home, SETTINGS, NIGHT, WRITTEN_AT)
    assert read_json(home.drift / "rfm_bins.json") == bins


def test_histograms_by_hand(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    numbers = np.arange(1, 11)
    write_mart(
        tmp_path,
        USER_RFM,
        {
            "observation_cutoff": [NIGHT] * 10,
            "user_id": [f"u{number}" for number in numbers],
            "recency_days": numbers.astype(float),
            "frequency": np.minimum(numbers, 2),
            "monetary": np.zeros(10),
            "last_qualifying_at": [EVE] * 10,
            "is_in_population": [number > 1 for number in numbers],
        },
    )
    found = rfm_histograms(tmp_path / "user_rfm.parquet", storage, SETTINGS)
    assert found["recency_days"] == [1] * 9 + [0]  # nobody lies above the highest decile
    assert found["frequency"] == [9, 0]  # all of the population have two days
    assert found["monetary"] == [9, 0]


def test_a_history_is_the_same_in_whatever_order_nights_came(tmp_path: Path) -> None:
    nights = calm_nights(6)
    for order, name in ((nights, "one"), (nights[::-1], "other")):
        for night in order:
            write_figures(Storage(tmp_path / name), night)
    one, other = (read_history(Storage(tmp_path / name)) for name in ("one", "other"))
    assert one == other == nights


def test_history_up_to_a_night(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    nights = calm_nights(6)
    for night in nights:
        write_figures(storage, night)
    assert read_history(storage, nights[2].cutoff) == nights[:3]


def test_of_two_checkpoints_of_a_night_the_one_measured_last_counts(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    (night,) = calm_nights(1)
    later = replace(night, checkpoint_id="a", measured_at=night.measured_at + timedelta(hours=1))
    write_figures(storage, later)
    write_figures(storage, night)
    assert read_history(storage) == [later]
    assert len(list(storage.drift.glob("cutoff=*/*.json"))) == 2


def test_a_candidate_has_a_history_of_its_own(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    (night,) = calm_nights(1)
    write_figures(storage.of_candidate("two"), night)
    assert read_history(storage) == []


def test_figures_survive_the_file() -> None:
    (night,) = calm_nights(1)
    assert NightFigures.from_json(night.to_json()) == night


def broken_history(storage: Storage) -> list[NightFigures]:
    nights = altered(calm_nights(45), 44, lambda night: with_counts(night, cart=3))
    nights[40] = replace(nights[40], checkpoint_id="two", previous_checkpoint_id="one")
    for night in nights:
        write_figures(storage, night)
    return nights


def test_the_pictures_have_a_panel_per_figure() -> None:
    verdicts = judge_nights(calm_nights(40), SETTINGS)
    assert drift_png(verdicts).startswith(b"\x89PNG")
    svg = drift_svg(verdicts)
    assert svg.startswith("<svg")
    for title in ("num events", "PSI of recency days", "share of 'cart'", "event mix PSI"):
        assert title in svg
    assert "var(--embedding)" in svg
    assert "#0000" not in svg


def test_a_single_night_is_drawn_too() -> None:
    assert drift_png(judge_nights(calm_nights(1), SETTINGS)).startswith(b"\x89PNG")


def test_the_page_tells_the_nights_verdict(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    nights = broken_history(storage)
    shown = _drift(storage, SETTINGS, replace(LIVE_WINDOWS, cutoff=nights[-1].cutoff))
    assert shown is not None
    assert shown["findings"][0].startswith("data drift: tracking broken: 3 events of type 'cart'")
    assert _drift(storage, SETTINGS, LIVE_WINDOWS) is None  # that night was not measured


def test_the_command_prints_the_last_nights_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(command, "console", Console(file=shown, width=200))
    nights = broken_history(Storage(tmp_path / "simulated"))
    target = tmp_path / "drift.png"
    arguments = ["drift", "--data-root", str(tmp_path), "--nights", "5", "--picture", str(target)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for words in (f"{nights[-1].cutoff:%Y-%m-%d}", "tracking broken", "retraining: one → two"):
        assert words in shown.getvalue()
    assert f"{nights[-6].cutoff:%Y-%m-%d}" not in shown.getvalue()
    assert target.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_when_no_night_was_measured(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["drift", "--data-root", str(tmp_path)])
    assert result.exit_code == 2
    assert "No night of 'simulated' was measured yet" in result.output


def test_embeddings_of_a_bucket_without_users_do_no_harm(home: Storage) -> None:
    for cutoff in (EVE, NIGHT):
        folder = home.embeddings(cutoff)
        schema = pq.read_schema(folder / "bucket=0.parquet")
        pq.write_table(pa.table(schema.empty_table()), folder / "bucket=9.parquet")
    assert measure_night(home, SETTINGS, NIGHT, WRITTEN_AT).figures["num_users"] == NUM_USERS
