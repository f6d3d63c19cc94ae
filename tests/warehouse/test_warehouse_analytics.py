from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warehouse_builders import LIVE_CUTOFF, Built

from behavior_pipeline.contracts import PREDICTIONS, SEGMENTS
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.analytics import publish_analytics

QUESTIONS = Path(__file__).parents[2] / "docs" / "sql.md"
NOW = datetime(2024, 3, 21, 2, tzinfo=UTC)


def write_scores(storage: Storage, users: list[str]) -> None:
    """Write segments and predictions as the stages to the right do."""
    common = {"observation_cutoff": LIVE_CUTOFF, "checkpoint_id": "abc", "written_at": NOW}
    segments = [
        {"user_id": user, "segment": i % 2, "segment_name": f"kind {i % 2}", "distance": 0.5}
        for i, user in enumerate(users)
    ]
    predictions = [
        {"user_id": user, "churn_probability": i / len(users), "top_target": "category 1",
         "top_target_probability": 0.25, "next_event_type": "view", "next_event_probability": 0.5}
        for i, user in enumerate(users)
    ]  # fmt: skip
    for rows, contract, path in (
        (segments, SEGMENTS, storage.segments(LIVE_CUTOFF) / "segments.parquet"),
        (predictions, PREDICTIONS, storage.predictions(LIVE_CUTOFF) / "predictions.parquet"),
    ):
        path.parent.mkdir(parents=True)
        table = pa.Table.from_pylist([row | common for row in rows], schema=contract.schema)
        pq.write_table(table, path)


@pytest.fixture(scope="module")
def published(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Another home with the same warehouse, published after everyone was scored."""
    storage = Storage(tmp_path_factory.mktemp("published"))
    storage.warehouse.write_bytes(built.storage.warehouse.read_bytes())
    with duckdb.connect(str(storage.warehouse), read_only=True) as connection:
        users = connection.execute("SELECT user_id FROM user_overview ORDER BY 1").fetchall()
    write_scores(storage, [user for (user,) in users])
    publish_analytics(storage, built.settings, LIVE_CUTOFF)
    return storage


@pytest.fixture
def analyst(published: Storage) -> Iterator[duckdb.DuckDBPyConnection]:
    """An analyst far from UTC."""
    with duckdb.connect(str(published.analytics), read_only=True) as connection:
        connection.execute("SET TimeZone = 'Asia/Kolkata'")
        yield connection


def queries() -> list[str]:
    return re.findall(r"```sql\n(.*?)```", QUESTIONS.read_text(), flags=re.DOTALL)


def test_there_are_at_least_eight_questions():
    assert len(queries()) >= 9


@pytest.mark.parametrize("query", queries())
def test_every_question_has_an_answer(analyst: duckdb.DuckDBPyConnection, query: str):
    assert analyst.execute(query).fetchall()


def test_the_funnel_counts_sessions_with_all_steps_so_far(analyst: duckdb.DuckDBPyConnection):
    (query,) = [query for query in queries() if "'cart'" in query]
    counts = [row[2] for row in analyst.execute(query).fetchall()]
    expected = analyst.execute(
        "SELECT count(*) FILTER (WHERE v), count(*) FILTER (WHERE v AND c), "
        "count(*) FILTER (WHERE v AND c AND p) FROM (SELECT bool_or(event_type = 'view') AS v, "
        "bool_or(event_type = 'cart') AS c, bool_or(event_type = 'purchase') AS p "
        "FROM events_sessionized GROUP BY user_id, session_started_at)"
    ).fetchone()
    assert tuple(counts) == expected


def test_relations_are_those_that_the_document_lists(analyst: duckdb.DuckDBPyConnection):
    found = {name for (name,) in analyst.execute("SELECT name FROM (SHOW TABLES)").fetchall()}
    rows = [line for line in QUESTIONS.read_text().splitlines() if line.startswith("| `")]
    assert found == {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_everything_says_what_it_means(analyst: duckdb.DuckDBPyConnection):
    mute = analyst.execute(
        "SELECT table_name, column_name FROM duckdb_columns()"
        " WHERE NOT internal AND comment IS NULL"
        " UNION ALL SELECT table_name, '' FROM duckdb_tables() WHERE comment IS NULL"
        " UNION ALL SELECT view_name, '' FROM duckdb_views() WHERE NOT internal AND comment IS NULL"
    ).fetchall()
    assert mute == []


def test_an_open_reader_keeps_the_night_it_opened(built: Built, tmp_path: Path):
    storage = Storage(tmp_path)
    storage.warehouse.write_bytes(built.storage.warehouse.read_bytes())
    publish_analytics(storage, built.settings, LIVE_CUTOFF)
    count = "SELECT count(*) FROM user_segments"
    with duckdb.connect(str(storage.analytics), read_only=True) as reader:
        write_scores(storage, ["one", "two"])
        publish_analytics(storage, built.settings, LIVE_CUTOFF)
        assert reader.execute(count).fetchone() == (0,)
        assert reader.execute("SELECT count(*) > 0 FROM user_overview").fetchone() == (True,)
    with duckdb.connect(str(storage.analytics), read_only=True) as reader:
        assert reader.execute(count).fetchone() == (2,)


def test_without_a_warehouse_the_message_says_so(settings: Settings, storage: Storage):
    with pytest.raises(PipelineError, match="no warehouse"):
        publish_analytics(storage, settings, LIVE_CUTOFF)
