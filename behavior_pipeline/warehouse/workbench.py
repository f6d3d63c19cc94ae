"""Runs a plan's models in an open warehouse, for the users or the days that it is pointed at.

Compiled models name each other without a schema. The schema `scope` comes before `main` in the
search path, so a view there stands for the rows at work while `main` keeps those of everybody.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import duckdb

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.arrivals import VERSIONS_FILE, Arrival
from behavior_pipeline.layers import Layers
from behavior_pipeline.sql import fetch_one, parquet, quote_identifier, quote_text
from behavior_pipeline.warehouse.plan import DataTest, Model, Plan
from behavior_pipeline.warehouse.variables import written_cutoff
from behavior_pipeline.windows import EvaluationWindows

EVENTS: Final = "events_sessionized"
ROW_GROUP_ROWS: Final = 122_880


class Workbench:
    """An open warehouse with a plan to run in it.

    Attributes:
        connection: the open warehouse.
        seconds: time that each model took, over all its runs.
        part: which users the models are run for, as progress tells it.
        main: the schema with the tables of everybody.
    """

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, plan: Plan, finished: Callable[[str], None]
    ) -> None:
        self.connection = connection
        self.plan = plan
        self.seconds: dict[str, float] = defaultdict(float)
        self.part = ""
        self._finished = finished
        (database,) = fetch_one(connection, "SELECT current_database()")
        # With the database's name: temporary tables, which come first, have a schema `main` too.
        self.main = f"{quote_identifier(database)}.main"
        for schema in ("pipeline", "scope"):
            connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        connection.execute("SET search_path = 'scope,main'")
        connection.execute("SET checkpoint_threshold = '4GB'")  # one at the end is enough

    def table(self, model: Model) -> str:
        """Return the name of a model's table or view of everybody."""
        return f"{self.main}.{quote_identifier(model.name)}"

    def set_night(self, arrivals: Sequence[Arrival], windows: EvaluationWindows) -> None:
        """Lay out the sources that are the same for everybody."""
        versions = parquet(arrival.folder / VERSIONS_FILE for arrival in arrivals)
        # A version counts only while the load that it was seen in does.
        self.connection.execute(
            "CREATE OR REPLACE TEMP TABLE loads (arrival VARCHAR, load_id VARCHAR)"
        )
        self.connection.executemany(
            "INSERT INTO loads VALUES (?, ?)", [(each.key, each.load_id) for each in arrivals]
        )
        self.connection.execute(
            "CREATE OR REPLACE TABLE pipeline.event_versions AS SELECT versions.* "
            f"FROM {versions} AS versions "
            "SEMI JOIN loads USING (arrival, load_id)"
        )
        cutoffs = ", ".join(
            f"(TIMESTAMPTZ {quote_text(written_cutoff(cutoff))}, {cutoff == windows.train_cutoff})"
            for cutoff in windows.cutoffs
        )
        self.connection.execute(
            "CREATE OR REPLACE TABLE pipeline.night_cutoffs AS "
            f"FROM (VALUES {cutoffs}) AS cutoffs (observation_cutoff, is_train_cutoff)"
        )

    def set_events(self, files: Sequence[Path], condition: str = "true") -> None:
        """Lay out the canonical events that the next models see."""
        self.connection.execute(
            "CREATE OR REPLACE VIEW pipeline.canonical_events AS SELECT * FROM "
            f"{parquet(files, with_folders=True)} WHERE {condition}"
        )

    def set_scope(self, name: str, relation: str) -> None:
        """Let a relation stand for a model until `clear_scope`."""
        self.connection.execute(
            f"CREATE OR REPLACE VIEW scope.{quote_identifier(name)} AS {relation}"
        )

    def clear_scope(self) -> None:
        """Let every name mean what `main` has under it."""
        self.connection.execute("DROP SCHEMA scope CASCADE")
        self.connection.execute("CREATE SCHEMA scope")
        self.connection.execute("SET search_path = 'scope,main'")
        for model in self.plan.of_grain("user"):
            self.connection.execute(f"DROP TABLE IF EXISTS temp.{quote_identifier(model.name)}")

    def create(self, model: Model) -> None:
        """Make a model's empty table, or its view, with what is known of it."""
        name = self.table(model)
        if model.grain == "view":
            columns = ", ".join(quote_identifier(column.name) for column in model.columns)
            self._run(
                model, f"CREATE OR REPLACE VIEW {name} AS SELECT {columns} FROM ({model.sql})"
            )
        else:
            columns = ", ".join(
                f"{quote_identifier(column.name)} {column.type}{' NOT NULL' * column.is_required}"
                for column in model.columns
            )
            self.connection.execute(f"CREATE OR REPLACE TABLE {name} ({columns})")
        self._describe(model)

    def insert(self, model: Model) -> None:
        """Add the rows that a model has for what is in scope."""
        name = self.table(model)
        columns = ", ".join(quote_identifier(column.name) for column in model.columns)
        self._run(model, f"INSERT INTO {name} BY NAME SELECT {columns} FROM ({model.sql})")

    def renew(self, model: Model) -> None:
        """Put a model's rows in place of all that are there."""
        self.connection.execute(f"DELETE FROM {self.table(model)}")
        self.insert(model)

    def insert_users(self, model: Model) -> None:
        """Add the rows of the users in scope; models that follow see these rows alone."""
        own, all_ = f"temp.{quote_identifier(model.name)}", self.table(model)
        columns = ", ".join(quote_identifier(column.name) for column in model.columns)
        self._run(
            model,
            f"CREATE OR REPLACE TEMP TABLE {quote_identifier(model.name)} AS "
            f"SELECT {columns} FROM ({model.sql}); "
            f"INSERT INTO {all_} BY NAME SELECT * FROM {own}",
        )

    def replace_users(self, model: Model, users: str) -> None:
        """Put the rows of the users in scope in place of those that they had."""
        self.connection.execute(
            f"DELETE FROM {self.table(model)} WHERE user_id IN (SELECT user_id FROM {users})"
        )
        self.insert_users(model)

    def add(self, model: Model, sign: int = 1) -> None:
        """Add what the users in scope make of a sum to what `total` will add up, or take it out."""
        added = [column for column in model.columns if column.name not in model.key]
        values = ", ".join(f"{sign} * {quote_identifier(c.name)} AS {c.name}" for c in added)
        self._run(
            model,
            f"INSERT INTO {_parts(model)} BY NAME "
            f"SELECT {', '.join(model.key)}, {values} FROM ({model.sql})",
        )

    def begin_sum(self, model: Model, *, with_what_is_there: bool) -> None:
        """Make the table that `add` fills, empty or with the rows that are there."""
        rows = f"SELECT * FROM {self.table(model)}"
        limit = "" if with_what_is_there else " LIMIT 0"
        self.connection.execute(f"CREATE OR REPLACE TEMP TABLE {_parts(model)} AS {rows}{limit}")

    def total(self, model: Model) -> None:
        """Add up what `add` was given; keys to which nobody adds anything go."""
        added = [column for column in model.columns if column.name not in model.key]
        key = ", ".join(model.key)
        sums = ", ".join(f"CAST(sum({c.name}) AS {c.type}) AS {c.name}" for c in added)
        has_any = " OR ".join(f"sum({c.name}) <> 0" for c in added)
        self.connection.execute(f"DELETE FROM {self.table(model)}")
        self._run(
            model,
            f"INSERT INTO {self.table(model)} BY NAME SELECT {key}, {sums} "
            f"FROM {_parts(model)} GROUP BY {key} HAVING {has_any}",
        )

    def write(self, model: Model, file: Path) -> None:
        """Write a model's rows for what is in scope to Parquet.

        Window functions leave each user's rows together and in order, and an ordered write keeps
        them so; sorting whole users too would cost a third more and serve nobody.
        """
        names = [(quote_identifier(column.name), column.type) for column in model.columns]
        columns = ", ".join(f"CAST({name} AS {type_}) AS {name}" for name, type_ in names)
        self._run(
            model,
            f"SET preserve_insertion_order = true; COPY (SELECT {columns} FROM ({model.sql})) "
            f"TO {quote_text(str(file))} (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, "
            f"ROW_GROUP_SIZE {ROW_GROUP_ROWS}); SET preserve_insertion_order = false",
        )
        file.chmod(0o600)

    def point_events_to(self, model: Model, layers: Layers) -> None:
        """Make the view of all sessionized events."""
        columns = ", ".join(quote_identifier(column.name) for column in model.columns)
        self.connection.execute(
            f"CREATE OR REPLACE VIEW {self.table(model)} AS "
            f"SELECT {columns} FROM ({layers.relation()})"
        )
        self._describe(model, is_view=True)

    def check(self, test: DataTest) -> int:
        """Return how many rows fail a data test."""
        return int(fetch_one(self.connection, f"SELECT count(*) FROM ({test.sql})")[0])

    def count(self, model: Model) -> int:
        """Count a model's rows of everybody."""
        if model.is_parquet:  # every event is of some day; adding them up opens no file
            query = f"SELECT coalesce(sum(num_events), 0) FROM {self.main}.user_days"
            return int(fetch_one(self.connection, query)[0])
        name = self.table(model)
        return int(fetch_one(self.connection, f"SELECT count(*) FROM {name}")[0])

    def _run(self, model: Model, statement: str) -> None:
        """Run a statement of a model; say which one could not be run."""
        started = time.perf_counter()
        try:
            self.connection.execute(statement)
        except (
            duckdb.BinderException,
            duckdb.ConstraintException,
            duckdb.ConversionException,
        ) as error:
            raise PipelineError(
                f"The model {model.name} could not be built: {error}",
                "The warehouse that analysts read stays as it was.",
            ) from None
        self.seconds[model.name] += time.perf_counter() - started
        self._finished(f"{self.part}: {model.name}" if self.part else model.name)

    def _describe(self, model: Model, *, is_view: bool = False) -> None:
        """Keep the descriptions of a model and its columns as comments."""
        name = self.table(model)
        kind = "VIEW" if is_view or model.grain == "view" else "TABLE"
        self.connection.execute(f"COMMENT ON {kind} {name} IS {quote_text(model.description)}")
        for column in model.columns:
            place = f"{name}.{quote_identifier(column.name)}"
            self.connection.execute(
                f"COMMENT ON COLUMN {place} IS {quote_text(column.description)}"
            )


def _parts(model: Model) -> str:
    """Return the name of the table whose rows add up to a sum."""
    return quote_identifier(f"parts_of_{model.name}")
