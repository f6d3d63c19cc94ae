"""The frozen vocabulary: which values have a token id, and how amounts fall into buckets.

It is counted once, over events before `trained_through`, and named after its content: tokens made
under one vocabulary are never read under another.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import NUM_SPECIAL_IDS, TOKEN_FIELDS
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.layers import read_layers
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine, quote_identifier
from behavior_pipeline.storage import Storage, read_json, write_json, writing_file, writing_folder

VALUE_COLUMNS: Final = {
    "action": "event_type",
    "item": "item_id",
    "category": "category",
    "location": "location",
}
"""Token fields whose ids stand for values, and the event column that holds the value."""

MAX_AMOUNT_BUCKETS: Final = 32
HOURS_OF_WEEK: Final = 168
VOCABULARY_FILE: Final = "vocabulary.json"
TOKENS_FILE: Final = "tokens.parquet"

_TOKENS_SCHEMA: Final = pa.schema(
    [
        pa.field("field", pa.string(), metadata={"meaning": "token field, one of VALUE_COLUMNS"}),
        pa.field("token_id", pa.int32(), metadata={"meaning": "id inside the field"}),
        pa.field("value", pa.string(), metadata={"meaning": "the value that the id stands for"}),
        pa.field("num_events", pa.int64(), metadata={"meaning": "events before trained_through"}),
    ]
)


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean. Ids below `NUM_SPECIAL_IDS` are special in every field.

    Attributes:
        values: per value field (see VALUE_COLUMNS) the known values in id order: the first has id
            `NUM_SPECIAL_IDS`. Most frequent first, equal counts by value.
        counts: events behind each value, in the same order.
        amount_edges: inclusive upper bounds of all amount buckets but the last, ascending and with
            their sign; None if no event had an amount.
        ignored_event_types: events of these types are no tokens.
        trained_through: only events before this were counted.
    """

    values: dict[str, tuple[str, ...]]
    counts: dict[str, tuple[int, ...]]
    amount_edges: tuple[float, ...] | None
    ignored_event_types: tuple[str, ...]
    trained_through: datetime

    @cached_property
    def vocabulary_id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of everything above."""
        content = {
            "values": self.values,
            "counts": self.counts,
            "amount_edges": self.amount_edges,
            "ignored_event_types": self.ignored_event_types,
            "trained_through": self.trained_through.isoformat(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def fields(self) -> tuple[str, ...]:
        """All token fields, also those without values of their own, in order."""
        return TOKEN_FIELDS

    def size(self, field: str) -> int:
        """Return the number of ids of a token field, special ids included."""
        if field == "hour":
            return NUM_SPECIAL_IDS + HOURS_OF_WEEK
        if field == "amount":
            return NUM_SPECIAL_IDS + (
                0 if self.amount_edges is None else len(self.amount_edges) + 1
            )
        return NUM_SPECIAL_IDS + len(self.values[field])


def build_vocabulary(
    storage: Storage,
    settings: Settings,
    ignored_event_types: tuple[str, ...],
    trained_through: datetime,
    report: Report = report_nothing,
) -> Vocabulary:
    """Count the values of all events with `occurred_at < trained_through`.

    A value needs `settings.min_token_count` events to get an id, an event type only one; each
    field keeps at most `settings.max_vocabulary` values. Memory is bounded by
    `settings.memory_limit`: DuckDB streams the Parquet files and spills beyond it.

    Args:
        storage: the source's home, with `events_sessionized` built.
        settings: see settings.py.
        ignored_event_types: left out of tokens, so of the counts as well.
        trained_through: exclusive end of the events that are counted; in UTC.
        report: progress over token fields.

    Raises:
        PipelineError: if no event is left to count.
    """
    values: dict[str, tuple[str, ...]] = {}
    counts: dict[str, tuple[int, ...]] = {}
    num_steps = len(VALUE_COLUMNS) + 1
    ignored = tuple(sorted(set(ignored_event_types)))
    with open_engine(settings.memory_limit, settings.threads, storage.scratch) as connection:
        _open_events(connection, storage, ignored, trained_through)
        for step, (field, column) in enumerate(VALUE_COLUMNS.items()):
            report(step, num_steps, field)
            min_count = 1 if field == "action" else settings.min_token_count
            rows = _count_values(connection, column, min_count, settings.max_vocabulary)
            values[field] = tuple(value for value, _ in rows)
            counts[field] = tuple(num_events for _, num_events in rows)
        report(num_steps - 1, num_steps, "amount")
        amount_edges = _amount_edges(connection)
    if not values["action"]:
        raise PipelineError(
            f"No event before {trained_through:%Y-%m-%d} is left for the vocabulary.",
            "Choose a later cutoff, or ignore fewer event types in the preset.",
        )
    report(num_steps, num_steps, "counted")
    return Vocabulary(values, counts, amount_edges, ignored, trained_through)


def _open_events(
    connection: duckdb.DuckDBPyConnection,
    storage: Storage,
    ignored_event_types: tuple[str, ...],
    trained_through: datetime,
) -> None:
    """Name the countable events `events`."""
    layers = read_layers(storage.events_sessionized)
    # Views take no bound parameters, so the bounds stand in a table of one row.
    connection.execute(
        "create table bounds as select ?::timestamptz as trained_through, ?::varchar[] as ignored",
        [trained_through, list(ignored_event_types)],
    )
    connection.execute(f"create view all_events as {layers.relation()}")
    connection.execute(
        "create view events as select all_events.* from all_events, bounds "
        "where occurred_at < trained_through and not list_contains(ignored, event_type)"
    )


def _count_values(
    connection: duckdb.DuckDBPyConnection, column: str, min_count: int, max_values: int
) -> list[tuple[str, int]]:
    """Return the values of a column with their counts, most frequent first, ties by value."""
    name = quote_identifier(column)
    rows: list[tuple[str, int]] = connection.execute(
        f"select {name} as value, count(*) as num_events from events where {name} is not null "
        "group by value having count(*) >= ? order by num_events desc, value limit ?",
        [min_count, max_values],
    ).fetchall()
    return rows


def _amount_edges(connection: duckdb.DuckDBPyConnection) -> tuple[float, ...] | None:
    """Return the upper bounds of the quantile buckets of amounts, the last bucket's left out.

    Bucket k of n ends at the k/n quantile: the smallest amount that at least k/n of all amounts do
    not exceed. A frequent amount is several quantiles at once, so it leaves fewer buckets. Counts
    are integers, so the edges do not depend on the order in which threads read.
    """
    rows = connection.execute(
        """
        with counted as (
            select amount, count(*)::bigint as num_events
            from events where isfinite(amount) group by amount
        ),
        ranked as (
            select
                amount,
                num_events,
                sum(num_events) over (order by amount)::bigint as up_to,
                (sum(num_events) over ())::bigint as total
            from counted
        )
        select amount from ranked
        where up_to * $buckets // total > (up_to - num_events) * $buckets // total
        order by amount
        """,
        {"buckets": MAX_AMOUNT_BUCKETS},
    ).fetchall()
    # Adding zero turns -0.0 into 0.0: which of the two a group shows depends on the threads.
    return tuple(float(amount) + 0.0 for (amount,) in rows)[:-1] if rows else None


def save_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write `vocabulary.json` and `tokens.parquet` into a folder, which is replaced as a whole.

    `tokens.parquet` holds the fields of VALUE_COLUMNS; amount and hour need no table.
    """
    fields = {field: {"size": vocabulary.size(field)} for field in vocabulary.fields}
    with writing_folder(folder) as aside:
        with writing_file(aside / TOKENS_FILE) as target:
            pq.write_table(_tokens_table(vocabulary), target)
        write_json(
            aside / VOCABULARY_FILE,
            {
                "vocabulary_id": vocabulary.vocabulary_id,
                "trained_through": vocabulary.trained_through.isoformat(),
                "fields": fields,
                "amount_edges": vocabulary.amount_edges,
                "ignored_event_types": vocabulary.ignored_event_types,
            },
        )


def _tokens_table(vocabulary: Vocabulary) -> pa.Table:
    """Return one row per known value, in the order of fields and ids."""
    rows = [
        (field, NUM_SPECIAL_IDS + place, value, num_events)
        for field in VALUE_COLUMNS
        for place, (value, num_events) in enumerate(
            zip(vocabulary.values[field], vocabulary.counts[field], strict=True)
        )
    ]
    columns = list(zip(*rows, strict=True))
    return pa.table([list(column) for column in columns], schema=_TOKENS_SCHEMA)


def load_vocabulary(folder: Path) -> Vocabulary:
    """Read what `save_vocabulary` wrote.

    Raises:
        PipelineError: if there is none, or its content is not what its id was computed from.
    """
    if not (folder / VOCABULARY_FILE).is_file():
        raise PipelineError(f"There is no vocabulary in {folder}.", "Run the pretraining first.")
    content = read_json(folder / VOCABULARY_FILE)
    vocabulary = _vocabulary_of(content, pq.read_table(folder / TOKENS_FILE).to_pylist())
    if vocabulary.vocabulary_id != content["vocabulary_id"]:
        raise PipelineError(
            f"The vocabulary in {folder} was changed after it was saved.",
            "Build it again, and train a checkpoint with it.",
        )
    return vocabulary


def _vocabulary_of(content: dict[str, Any], tokens: list[dict[str, Any]]) -> Vocabulary:
    """Put a vocabulary together from its two files."""
    by_field = {field: list(rows) for field, rows in groupby(tokens, lambda row: row["field"])}
    edges = content["amount_edges"]
    return Vocabulary(
        values={
            name: tuple(row["value"] for row in by_field.get(name, ())) for name in VALUE_COLUMNS
        },
        counts={
            name: tuple(row["num_events"] for row in by_field.get(name, ()))
            for name in VALUE_COLUMNS
        },
        amount_edges=None if edges is None else tuple(edges),
        ignored_event_types=tuple(content["ignored_event_types"]),
        trained_through=datetime.fromisoformat(content["trained_through"]),
    )
