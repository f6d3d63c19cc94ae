from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from behavior_pipeline.downstream.statistics import Estimate
from behavior_pipeline.sequences.tokenization import tokenize
from behavior_pipeline.sequences.vocabulary import VALUE_COLUMNS, Vocabulary, save_vocabulary

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import quality_cells as cells  # noqa: E402
import quality_cutoffs as cutoffs  # noqa: E402
import quality_networks as networks  # noqa: E402
import quality_statistics as statistics  # noqa: E402
import quality_table as page  # noqa: E402

FIRST = datetime(2024, 3, 1, tzinfo=UTC)
HORIZON = timedelta(days=10)
TESTS = [datetime(2024, 5, day, tzinfo=UTC) for day in (1, 8, 15)]
PAIRS = [(test - HORIZON, test) for test in TESTS]
MOMENTS = sorted({moment for pair in PAIRS for moment in pair})
TYPES = ("view", "cart", "buy")
NUM_USERS = 90
PRESET = """
name: handmade
description: Events made for tests.
columns:
  {user_id: user_id, event_type: event_type, occurred_at: occurred_at, category: category,
   item_id: item_id, amount: amount}
tasks: {propensity_column: category, horizon_days: 10, lookback_days: 30}
"""
PROGRAM = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import quality
if __name__ == "__main__":
    quality.main(sys.argv[1:])
    print("again", file=sys.stderr)
    quality.main([*sys.argv[1:], "--finished"])
    # What a bare GPU machine lacks.
    lacking = {{"duckdb", "polars", "dagster", "feast", "pydantic", "transformers"}}
    sys.exit(f"loaded {{lacking & sys.modules.keys()}}" if lacking & sys.modules.keys() else 0)
"""


def make_events(seed: int = 0) -> pl.DataFrame:
    """Users who like one category each, some of whom fall silent."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(NUM_USERS):
        last = 90 if random.random() < 0.5 else 60
        days = np.sort(random.uniform(0, last, random.integers(6, 30)))
        rows += [
            {
                "user_id": f"u{user:03d}",
                "occurred_at": FIRST + timedelta(days=round(float(day), 3)),
                "event_id": f"{user:03d}-{number:03d}",
                "event_type": str(random.choice(TYPES)),
                "item_id": f"i{random.integers(6)}",
                "category": f"c{user % 3 if random.random() < 0.8 else 3}",
                "location": None,
                "amount": float(random.integers(1, 50)),
            }
            for number, day in enumerate(days)
        ]
    frame = pl.DataFrame(rows, schema_overrides={"location": pl.String})
    return frame.with_columns(pl.col("occurred_at").dt.cast_time_unit("us"))


def vocabulary_of(events: pl.DataFrame) -> Vocabulary:
    """The values before the earliest train cutoff."""
    past = events.filter(pl.col("occurred_at") < MOMENTS[0])
    values = {
        field: tuple(sorted(past[column].drop_nulls().unique().to_list()))
        for field, column in VALUE_COLUMNS.items()
    }
    counts = {field: tuple([9] * len(found)) for field, found in values.items()}
    return Vocabulary(values, counts, (5.0, 20.0), (), MOMENTS[0])


def write_prepared(folder: Path, events: pl.DataFrame, num_pairs: int = 3) -> Path:
    """A folder as quality_prepare.py writes it, without a warehouse."""
    folder.mkdir(parents=True)
    vocabulary = vocabulary_of(events)
    save_vocabulary(vocabulary, folder / "vocabulary")
    histories = tokenize(events, vocabulary, MOMENTS[-1], 10**6)
    pq.write_table(histories, folder / "sequences.parquet")
    population = {}
    for moment in MOMENTS:
        day = f"{moment:%Y-%m-%d}"
        users, aggregates = users_at(events, moment)
        pq.write_table(users, folder / f"users_{day}.parquet")
        pq.write_table(aggregates, folder / f"aggregates_{day}.parquet")
        population[day] = len(users)
    about = {
        "source": "handmade", "propensity_column": "category", "horizon_days": 10,
        "lookback_days": 30, "pairs": [[m.isoformat() for m in pair] for pair in PAIRS[:num_pairs]],
        "trained_through": MOMENTS[0].isoformat(), "training_digest": "f" * 32,
        "training_users": NUM_USERS, "judged_users": population, "population": population,
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def users_at(events: pl.DataFrame, moment: datetime) -> tuple[pa.Table, pa.Table]:
    """Users with RFM, labels and two aggregates."""
    past = events.filter(pl.col("occurred_at") < moment)
    future = events.filter(pl.col("occurred_at").is_between(moment, moment + HORIZON, "left"))
    found = past.group_by("user_id").agg(
        ((moment - pl.col("occurred_at").max()).dt.total_hours() / 24).alias("recency_days"),
        pl.len().cast(pl.Float64).alias("frequency"),
        pl.col("amount").sum().alias("monetary"),
    ).sort("user_id")  # fmt: skip
    active = set(future["user_id"])
    columns = {name: found[name].to_arrow() for name in found.columns}
    columns["user_id"] = columns["user_id"].cast(pa.string())
    columns["is_churned"] = pa.array([user not in active for user in found["user_id"]])
    for target in ("c0", "c1"):
        takers = set(future.filter(pl.col("category") == target)["user_id"])
        columns[f"target:{target}"] = pa.array([user in takers for user in found["user_id"]])
    features = {"num": found["frequency"].to_numpy(), "gap": found["recency_days"].to_numpy()}
    return pa.table(columns), pa.table(features)


def run(data: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    program = out / "program.py"
    out.mkdir(exist_ok=True)
    program.write_text(PROGRAM)
    command = [
        sys.executable, str(program), "--data", str(data), "--out", str(out), "--seeds", "0,1",
        "--preset", "tiny", "--steps", "3", "--coles-steps", "2", "--threads", "1", "--samples",
        "20", "--device", "cpu", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_measures_tells_and_goes_on(tmp_path):
    data = write_prepared(tmp_path / "data", make_events(), num_pairs=2)
    told_at = tmp_path / "quality.md"
    told_at.write_text(
        "# Words\n\n<!-- written by benchmarks/quality.py: everything below -->\nold"
    )
    some = ["rfm", "aggregates", "embedding", "aggregates+embedding", "supervised", "coles"]
    more = ["--splits", "100%", "--table", str(told_at), "--only", ",".join(some)]
    done = run(data, tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "quality.jsonl").read_text().splitlines()
    ]
    scores = {
        (line["task"], line["representation"]): line
        for line in lines
        if line.get("kind") == "score" and line["split"] == "100%" and line["rule"] == "stated"
    }
    assert {name for _, name in scores} == set(some)
    assert all(len(line["by_cutoff"]) == 2 for line in scores.values())
    assert scores["churn", "rfm"]["spread_over_seeds"] is None
    assert scores["churn", "embedding"]["spread_over_seeds"] is not None
    low, high = scores["churn", "embedding"]["interval"]
    assert low < scores["churn", "embedding"]["value"] < high
    told = told_at.read_text()
    assert told.startswith("# Words")
    assert "old" not in told
    assert "aggregates+embedding against aggregates" in told
    assert done.stderr.endswith("again\n")  # nothing was measured a second time
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:]


@pytest.mark.parametrize("max_events", [3, 512])
def test_cutting_equals_tokenizing_at_the_moment(max_events):
    events = make_events()
    vocabulary = vocabulary_of(events)
    whole = tokenize(events, vocabulary, MOMENTS[-1], 10**6)
    for moment in [FIRST, *MOMENTS]:
        found = cutoffs.cut(whole, moment, max_events)
        expected = tokenize(events, vocabulary, moment, max_events)
        assert found.filter(
            pc.is_in(found["user_id"], expected["user_id"].combine_chunks())
        ).equals(expected)
        assert pc.sum(found["num_events"]).as_py() == pc.sum(expected["num_events"]).as_py() or (
            moment == FIRST
        )


def test_what_happens_at_or_after_a_moment_changes_nothing_that_is_read_at_it(tmp_path):
    events = make_events()
    data = cutoffs.Moments.at(write_prepared(tmp_path / "data", events))
    for moment in MOMENTS[:-1]:
        later = pl.col("occurred_at") >= moment
        changed = events.with_columns(
            category=pl.when(later).then(pl.lit("new")).otherwise("category"),
            event_type=pl.when(later).then(pl.lit("view")).otherwise("event_type"),
            amount=pl.when(later).then(99.0).otherwise("amount"),
        )
        added = events.filter(later).with_columns(
            event_id=pl.lit("x"), user_id=pl.lit("a newcomer")
        )
        other = cutoffs.Moments.at(
            write_prepared(tmp_path / f"{moment:%m-%d}", pl.concat([changed, added]))
        )
        before, after = data.cut(moment), other.cut(moment)
        assert before.sequences.user_ids.equals(after.sequences.user_ids)
        for field, ids in before.sequences.ids.items():
            np.testing.assert_array_equal(ids, after.sequences.ids[field])
        for name in ("gap_days", "times", "num_events", "first_times", "cutoffs", "visits"):
            np.testing.assert_array_equal(
                getattr(before.sequences, name), getattr(after.sequences, name)
            )
        np.testing.assert_array_equal(before.population.rfm, after.population.rfm)
        np.testing.assert_array_equal(before.aggregates, after.aggregates)
        assert data.training_sequences().equals(other.training_sequences())
        assert all(
            (data.vocabulary / name).read_bytes() == (other.vocabulary / name).read_bytes()
            for name in ("vocabulary.json", "tokens.parquet")
        )
        assert data.trained_through <= min(before for before, _ in data.pairs)


@pytest.mark.slow
def test_nothing_that_is_prepared_for_fitting_knows_of_later_events(tmp_path):
    events = make_events().drop("event_id")
    later = pl.col("occurred_at") >= MOMENTS[0]
    changed = events.with_columns(
        category=pl.when(later).then(pl.lit("new")).otherwise("category"),
        amount=pl.when(later).then(99.0).otherwise("amount"),
    )
    newcomer = events.filter(later).with_columns(user_id=pl.lit("a newcomer"))
    one, other = (
        prepare(tmp_path / name, table)
        for name, table in (("one", events), ("other", pl.concat([changed, newcomer])))
    )
    day = cutoffs.day_of(MOMENTS[0])
    for name in (f"aggregates_{day}.parquet", "vocabulary/tokens.parquet"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    users = [pq.read_table(folder / f"users_{day}.parquet") for folder in (one, other)]
    assert users[0].column_names == users[1].column_names  # the same targets
    known = ["user_id", "recency_days", "frequency", "monetary"]
    assert users[0].select(known).equals(users[1].select(known))
    data = [cutoffs.Moments.at(folder) for folder in (one, other)]
    assert data[0].training_sequences().equals(data[1].training_sequences())
    assert data[0].trained_through == MOMENTS[0]
    assert data[0].about["judged_users"] != {}


def prepare(folder: Path, events: pl.DataFrame) -> Path:
    """Prepare the first pair of cutoffs by the command."""
    folder.mkdir()
    events.write_parquet(folder / "events.parquet")
    (folder / "preset.yaml").write_text(PRESET)
    command = [
        sys.executable, str(BENCHMARKS / "quality_prepare.py"), "--out", str(folder / "data"),
        "--source", str(folder / "preset.yaml"), "--path", str(folder / "events.parquet"),
        "--cutoffs", cutoffs.day_of(PAIRS[0][1]), "--threads", "1", "--max-training-users", "50",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "data"


def test_a_user_is_drawn_at_all_cutoffs_as_often():
    people = [["a", "b", "c"], ["c", "b"], ["d", "a"]]
    first, second, third = statistics.shared_resamples(people, 50)
    assert [counts.shape for counts in (first, second, third)] == [(50, 3), (50, 2), (50, 2)]
    np.testing.assert_array_equal(first[:, 2], second[:, 0])
    np.testing.assert_array_equal(first[:, 0], third[:, 1])
    total = first.sum(axis=1) + third[:, 0]
    assert set(total) == {4}


def test_macro_auroc_by_hand():
    labels = [np.array([True, False, False]), np.array([False, False, True]), np.zeros(3, bool)]
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.5, 0.5], [0.2, 0.4, 0.5]], np.float32)
    counts = np.array([[1, 1, 1], [0, 2, 1], [1, 2, 0]], np.uint16)
    found = statistics.macro_auroc(labels, scores, counts)
    assert found.value == pytest.approx((1.0 + 0.5) / 2)  # the third target has one class
    # In the second resample the first target has no positive; in the third, the second has none.
    np.testing.assert_allclose(found.samples, [0.75, 0.0, 1.0])


def test_the_probe_is_chosen_by_what_is_held_out_at_the_train_cutoff():
    result = {
        "churn/logistic_regression": {"auroc": 0.6, "held_out_loss": 0.3},
        "churn/gradient_boosting": {"auroc": 0.9, "held_out_loss": 0.4},
    }
    chosen = statistics.chosen_probe
    assert chosen(result, "embedding", "churn", "stated") == "logistic_regression"
    assert chosen(result, "rfm", "churn", "stated") == "gradient_boosting"
    assert chosen(result, "rfm", "churn", "held_out") == "logistic_regression"
    assert chosen(result, "rfm", "propensity", "stated") is None


def test_few_labels_take_logistic_regression_with_the_penalty_of_five_folds():
    random = np.random.default_rng(0)
    values = random.normal(size=(25, 8))
    labels = [values[:, 0] > 0, np.zeros(25, bool)]
    blocks = (cells.Block("vector", values),)
    found = cells.fitted_probes(cells.Cell("embedding", 0, 0, cells.FEW), blocks, labels)
    ((fitted, _),) = found.values()
    assert list(found) == ["logistic_regression"]
    folds = np.arange(25) % cells.NUM_FOLDS
    columns = fitted.columns(blocks)
    losses = {c: cells.folded_loss(columns, labels, folds, c) for c in cells.PENALTIES}
    assert fitted.penalty == min(losses, key=losses.get)
    probabilities = cells.positive(fitted, blocks)
    assert probabilities.shape == (25, 2)
    assert (probabilities[:, 1] == 0).all()  # one class was seen


def test_claims_count_cells_under_either_rule():
    def line(
        task: str, rule: str, value: float, verdict: str, split: str = "100%", theirs: str = "rfm"
    ) -> dict[str, object]:
        return {
            "kind": "comparison", "data": "d", "task": task, "split": split, "rule": rule,
            "ours": "embedding", "theirs": theirs, "value": value, "relative": value / 0.7,
            "verdict": verdict,
        }  # fmt: skip

    lines = [
        line("churn", "stated", 0.07, "win"), line("churn", "held_out", -0.01, "loss"),
        line("propensity", "stated", 0.05, "tie"), line("propensity", "held_out", 0.05, "tie"),
        line("churn", "held_out", 0.01, "tie", "1%", "aggregates"),
    ]  # fmt: skip
    told = {
        rule: [sum(map(claim.is_met, claim.cells)) for claim in page.claims_of(lines, rule)]
        for rule in statistics.RULES
    }
    assert told == {"stated": [0, 1, 2, 0, 0, 0, 0, 0, 1], "held_out": [0, 0, 1, 0, 0, 0, 0, 0, 1]}


@pytest.mark.parametrize(
    ("samples", "expected"), [([0.1, 0.2], "win"), ([-0.1, 0.2], "tie"), ([-0.2, -0.1], "loss")]
)
def test_verdicts(samples, expected):
    assert statistics.verdict(Estimate(0.0, np.array(samples))) == expected


def test_shares_are_nested_and_halves_disjoint(tmp_path):
    data = cutoffs.Moments.at(write_prepared(tmp_path / "data", make_events()))
    before, after = (data.users(moment) for moment in data.pairs[0])
    rows = {
        split: cells.rows_of(cells.Cell("rfm", 1, 0, split), before, after)
        for split in cells.SPLITS
    }
    assert set(rows["1%"][0]) <= set(rows["25%"][0]) <= set(rows["100%"][0])
    assert len(rows["1%"][0]) == cells.FEWEST
    fitted, judged = rows[cells.NEW_USERS]
    ids = (before.user_ids.take(fitted).to_pylist(), after.user_ids.take(judged).to_pylist())
    assert set(ids[0]).isdisjoint(ids[1])
    assert min(len(fitted), len(judged)) > 20


def test_slices_lie_in_their_users_histories_and_the_loss_pulls_owners_together(tmp_path):
    data = cutoffs.Moments.at(write_prepared(tmp_path / "data", make_events()))
    table = data.cut(MOMENTS[0]).sequences
    users = np.flatnonzero(table.lengths >= 10)
    runs, owners = networks.random_slices(table, users, np.random.default_rng(0))
    rows = users[owners]
    assert (runs.begins >= table.offsets[rows]).all()
    assert (runs.ends <= table.offsets[rows + 1]).all()
    assert (runs.ends - runs.begins >= 5).all()
    torch = networks.torch
    near = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    apart = networks.coles_loss(near, torch.tensor([0, 0, 1, 1]))
    mixed = networks.coles_loss(near, torch.tensor([0, 1, 0, 1]))
    assert apart == pytest.approx(0.0, abs=1e-6)
    # Positives at a distance of root 2, of the negatives one at distance 0 and one at root 2.
    assert mixed == pytest.approx(2 + 0.5**2 / 2, abs=1e-3)
