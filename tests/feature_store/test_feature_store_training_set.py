from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_builders import (
    NOVEMBER,
    OCTOBER,
    vectors,
    write_embeddings,
    write_predictions,
    write_rfm,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from behavior_pipeline.cli import app
from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store import training_set as module
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import offline_folder
from behavior_pipeline.feature_store.training_set import write_training_set
from behavior_pipeline.storage import Storage

USERS = ["ada", "bob", "cem"]
TTL = timedelta(days=35)
DAY = timedelta(days=1)
NIGHTS = {  # who is in the night's partition, and how long after its cutoff it was written
    OCTOBER: (["ada", "bob"], timedelta(hours=3)),
    OCTOBER + DAY: (["bob"], timedelta(hours=3)),
    OCTOBER + 2 * DAY: (["ada", "cem"], timedelta(days=90)),  # filled in much later
    OCTOBER + 9 * DAY: (["cem"], timedelta(hours=30)),
    NOVEMBER: (["ada", "cem"], timedelta(hours=3)),
}
VIEWS = ("user_embedding", "user_rfm", "user_predictions")


def rewrite(
    storage: Storage, view: str, cutoff: datetime, written_at: datetime, checkpoint: str
) -> None:
    """Make a published partition say when it was written, and by which checkpoint."""
    path = offline_folder(storage, view) / f"cutoff={cutoff:%Y-%m-%d}" / "features.parquet"
    table = pq.read_table(path)
    values = {
        "written_at": pa.repeat(pa.scalar(written_at, TIMESTAMP), table.num_rows),
        "checkpoint_id": pa.repeat(pa.scalar(checkpoint), table.num_rows),
    }
    for name in set(values) & set(table.column_names):
        table = table.set_column(table.column_names.index(name), name, values[name])
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Sparse nights: each holds some users, one was filled in, the last has another checkpoint."""
    storage = Storage(tmp_path_factory.mktemp("training_set") / "data" / "test")
    for number, (cutoff, (users, delay)) in enumerate(NIGHTS.items()):
        checkpoint = "checkpoint-b" if cutoff == NOVEMBER else "checkpoint-a"
        write_embeddings(storage, cutoff, users, vectors(len(users), number))
        write_rfm(storage, cutoff, users)
        write_predictions(storage, cutoff, users)
        for view in VIEWS:
            publish_view(storage, view, cutoff)
            rewrite(storage, view, cutoff, cutoff + delay, checkpoint)
    return storage


def write_labels(path: Path, *rows: tuple[str, datetime]) -> Path:
    users, moments = zip(*rows, strict=True)
    columns = {"label": list(range(len(rows))), "user_id": list(users)}
    pq.write_table(pa.table(columns | {"event_timestamp": pa.array(moments, TIMESTAMP)}), path)
    return path


def expected_cutoff(user: str, moment: datetime, *, as_published: bool) -> datetime | None:
    """The newest valid night that holds the user: what a loop over everything finds."""
    valid = [
        cutoff
        for cutoff, (users, delay) in NIGHTS.items()
        if user in users
        and cutoff <= moment <= cutoff + TTL
        and (not as_published or cutoff + delay <= moment)
    ]
    return max(valid) if valid else None


moments = st.one_of(
    st.timedeltas(-DAY, timedelta(days=140)).map(lambda gap: OCTOBER + gap),
    st.sampled_from(
        [
            edge + step
            for cutoff, (_, delay) in NIGHTS.items()
            for edge in (cutoff, cutoff + delay, cutoff + TTL)
            for step in (-timedelta(microseconds=1), timedelta(0), timedelta(microseconds=1))
        ]
    ),
)


@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(st.sampled_from([*USERS, "nobody"]), moments), min_size=1, max_size=14),
    as_published=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_it_equals_a_loop_over_all_nights_and_nothing_is_later(
    home: Storage, rows: list[tuple[str, datetime]], as_published: bool, chunk: int
):
    labels = write_labels(home.home / "labels.parquet", *rows)
    out = home.home / "out.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "JOIN_ROWS", chunk)
        summary = write_training_set(home, labels, out, as_published=as_published)
    found = pq.read_table(out)
    assert summary.num_rows == len(rows)
    assert found.select(["label", "user_id", "event_timestamp"]).equals(pq.read_table(labels))
    for row in found.to_pylist():
        moment = row["event_timestamp"]
        cutoff = expected_cutoff(row["user_id"], moment, as_published=as_published)
        for view in VIEWS:
            assert row[f"{view}__cutoff_at"] == cutoff
            written = row[f"{view}__written_at"]
            assert written == (cutoff and cutoff + NIGHTS[cutoff][1])
            assert written is None or not as_published or written <= moment
        if cutoff is None:
            assert row["user_embedding__embedding"] is None
            continue
        users = NIGHTS[cutoff][0]
        place = users.index(row["user_id"])
        expected = vectors(len(users), list(NIGHTS).index(cutoff))[place]
        given = np.array(row["user_embedding__embedding"], np.float32)
        assert (given.view(np.uint32) == expected.view(np.uint32)).all()
        assert row["user_rfm__frequency"] == place + 1


def test_the_summary_counts_and_the_file_says_what_it_is(home: Storage, tmp_path: Path):
    filled_in = OCTOBER + 2 * DAY
    rows = [("ada", filled_in), ("ada", NOVEMBER + DAY), ("bob", OCTOBER), ("nobody", NOVEMBER)]
    labels = write_labels(tmp_path / "labels.parquet", *rows)
    summary = write_training_set(home, labels, tmp_path / "out.parquet")
    counts = summary.views["user_embedding"]
    assert (counts.num_found, counts.num_written_later, counts.is_mixed) == (3, 2, True)
    assert counts.checkpoints == {"checkpoint-a": 2, "checkpoint-b": 1}
    assert not summary.views["user_rfm"].checkpoints
    described = json.loads(
        pq.read_metadata(tmp_path / "out.parquet").metadata[b"behavior_pipeline"]
    )
    assert described["clock"] == "event time"
    assert described["views"]["user_embedding"]["num_written_later"] == 2
    assert "user_rfm:frequency" in described["features"]


def test_one_checkpoint_may_be_demanded_and_nothing_is_written(home: Storage, tmp_path: Path):
    rows = [("ada", OCTOBER), ("ada", NOVEMBER), ("ada", OCTOBER)]
    labels = write_labels(tmp_path / "labels.parquet", *rows)
    message = "2 checkpoints: checkpoint-a in 2 rows, checkpoint-b in 1 rows"
    with pytest.raises(PipelineError, match=message):
        write_training_set(home, labels, tmp_path / "out.parquet", one_checkpoint=True)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.parquet"]


def test_csv_keeps_ids_as_they_are_and_reads_zones(home: Storage, tmp_path: Path):
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "at,user_id,churned\n"
        "2011-11-09,ada,1\n"
        "2011-11-09 01:30:00+02:00,ada,0\n"
        "2011-11-08T23:59:59.999999Z,007,1\n"
    )
    write_training_set(home, labels, tmp_path / "a.parquet", "training_set", time_column="at")
    found = pq.read_table(tmp_path / "a.parquet")
    assert found["user_id"].to_pylist() == ["ada", "ada", "007"]
    assert found["churned"].to_pylist() == [1, 0, 1]
    assert found["at"].to_pylist()[1] == datetime(2011, 11, 8, 23, 30, tzinfo=UTC)
    assert found["user_rfm__cutoff_at"].to_pylist() == [NOVEMBER, OCTOBER + 2 * DAY, None]


@pytest.mark.parametrize(
    "moment",
    [
        pa.array([NOVEMBER.replace(tzinfo=None)], pa.timestamp("ns")),
        pa.array([NOVEMBER], pa.timestamp("s", "Asia/Tokyo")),
        pa.array([NOVEMBER.date()], pa.date32()),
        pa.array(["2011-11-09T00:00"], pa.large_string()),
    ],
)
def test_moments_of_any_type_are_the_same_moment(home: Storage, tmp_path: Path, moment: pa.Array):
    labels = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"user_id": ["ada"], "event_timestamp": moment}), labels)
    write_training_set(home, labels, tmp_path / "out.parquet", ["user_rfm:frequency"])
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["event_timestamp"].to_pylist() == [NOVEMBER]
    assert found["user_rfm__cutoff_at"].to_pylist() == [NOVEMBER]


MISTAKES = {
    "user_id,at\nada,2011-11-09\n": "lacks the column 'event_timestamp'; it has user_id, at",
    "user,event_timestamp\nada,2011-11-09\n": "lacks the column 'user_id'",
    "user_id,event_timestamp\n": "holds no row",
    "user_id,event_timestamp\nada,2011-11-09\nbob,9 Nov\n": (
        "labels.csv, row 2, column 'event_timestamp': '9 Nov' is no time"
    ),
    "user_id,event_timestamp\nada,2011-11-09\nbob,2011-11-09T08:00+1\n": (
        "row 2, column 'event_timestamp': '2011-11-09T08:00.1' is no time"
    ),
    "user_id,event_timestamp\nada,2011-11-09\n,2011-11-09\n": (
        "row 2, column 'user_id': there is no user"
    ),
    "user_id,event_timestamp\nada,\n": "row 1, column 'event_timestamp': there is no time",
    "user_id,event_timestamp\nada,2300-01-01\n": "row 1, .*: the time lies outside 1678 to 2261",
    "user_id,event_timestamp\nada,2011-11-09,5\n": "cannot be read as CSV: .*Expected 2 columns",
    "user_id,event_timestamp,a,a\nada,2011-11-09,5,6\n": "has the column 'a' twice",
    "user_id,event_timestamp,user_rfm__frequency\nada,2011-11-09,5\n": "is a feature's name",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_in_labels_name_file_row_and_column(home: Storage, tmp_path: Path, text: str):
    labels, out = tmp_path / "labels.csv", tmp_path / "out.parquet"
    labels.write_text(text)
    with pytest.raises(PipelineError, match=MISTAKES[text]) as caught:
        write_training_set(home, labels, out)
    assert str(labels) in str(caught.value)
    assert caught.value.way_out
    assert not out.exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["ada"], "event_timestamp": [20111109]}, "holds int64, which is no time"),
        ({"user_id": [17.0], "event_timestamp": [NOVEMBER]}, "holds double, which is no id"),
        (
            {
                "user_id": ["ada", "bob"],
                "event_timestamp": pa.array([0, 2**62], pa.timestamp("ms")),
            },
            "row 2, column 'event_timestamp': the time is out of range",
        ),
    ],
)
def test_mistakes_in_parquet_are_named(
    home: Storage, tmp_path: Path, columns: dict[str, object], message: str
):
    labels = tmp_path / "labels.parquet"
    pq.write_table(pa.table(columns), labels)
    with pytest.raises(PipelineError, match=message):
        write_training_set(home, labels, tmp_path / "out.parquet")


def test_rows_are_counted_over_chunks(home: Storage, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "JOIN_ROWS", 2)
    labels = tmp_path / "labels.csv"
    labels.write_text("user_id,event_timestamp\n" + "ada,2011-11-09\n" * 4 + "ada,soon\n")
    with pytest.raises(PipelineError, match="row 5, column 'event_timestamp': 'soon'"):
        write_training_set(home, labels, tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("labels", "out", "message"),
    [
        ("absent.csv", "out.parquet", "There is no file"),
        ("labels.txt", "out.parquet", "cannot be read as Parquet"),
        ("labels.csv", "out.csv", "does not end in .parquet"),
        ("labels.parquet", "labels.parquet", "holds the labels"),
    ],
)
def test_mistakes_about_files_are_named(
    home: Storage, tmp_path: Path, labels: str, out: str, message: str
):
    for name in ("labels.csv", "labels.txt"):
        (tmp_path / name).write_text("user_id,event_timestamp\nada,2011-11-09\n")
    write_labels(tmp_path / "labels.parquet", ("ada", NOVEMBER))
    with pytest.raises(PipelineError, match=message):
        write_training_set(home, tmp_path / labels, tmp_path / out)


def test_the_command_warns_of_what_would_mislead(home: Storage, tmp_path: Path):
    labels = write_labels(tmp_path / "labels.parquet", ("ada", OCTOBER), ("ada", NOVEMBER))
    arguments = ["training-set", "--labels", str(labels), "--out", str(tmp_path / "out.parquet")]
    place = ["--source", "simulated", "--data-root", str(home.home.parent)]
    (home.home.parent / "simulated").symlink_to(home.home, target_is_directory=True)
    outcome = CliRunner().invoke(app, [*arguments, *place])
    assert outcome.exit_code == 0, outcome.output
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 2
    assert "Warning: user_embedding holds rows of 2 checkpoints" in outcome.output
    assert "--as-published leaves them out" in outcome.output
    outcome = CliRunner().invoke(app, [*arguments, *place, "--one-checkpoint"])
    assert outcome.exit_code == 2
    outcome = CliRunner().invoke(app, [*arguments, *place, "--features", "user_rfm:shoes"])
    assert "There is no feature 'user_rfm:shoes'" in outcome.output
