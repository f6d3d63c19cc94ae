"""Writes the marts that later stages read: Parquet under the contracts, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import (
    LABELS,
    PROPENSITY_LABELS,
    PROPENSITY_TARGETS,
    TIMESTAMP,
    USER_RFM,
    Contract,
)
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import open_engine, quote_identifier, quote_text
from behavior_pipeline.storage import Storage, writing_folder
from behavior_pipeline.windows import EvaluationWindows

USER_AGGREGATES: Final = "user_aggregates"
_ROWS_AT_ONCE: Final = (
    122_880  # rows of a row group, and the most that are in memory outside DuckDB
)
_CATALOG: Final = "warehouse"
_ARROW_TYPES: Final = {
    "VARCHAR": pa.string(),
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "TIMESTAMP WITH TIME ZONE": TIMESTAMP,
}


def export_marts(
    storage: Storage,
    settings: Settings,
    windows: EvaluationWindows,
    report: Report = report_nothing,
) -> dict[str, int]:
    """Write the marts of each cutoff; return row counts.

    Under `storage.marts(cutoff)` lie `user_rfm`, `user_aggregates`, `labels` and
    `propensity_labels` with the rows of that cutoff only, and `propensity_targets`, the same at
    each cutoff. Both kinds of labels are empty where the label window reaches past the data, and
    aggregates but at the night's own cutoff. Sessionized events need no export: the build leaves
    them in Parquet (see layers.py).

    Returns:
        Rows by mart, `<cutoff folder>/<mart>`.

    Raises:
        PipelineError: if there is no warehouse yet, or it was built for another night.
    """
    if not storage.warehouse.is_file():
        raise PipelineError(f"There is no warehouse at {storage.warehouse}.", "Build it first.")
    spill = storage.scratch / "spill"
    with open_engine(settings.memory_limit, settings.threads, spill) as connection:
        connection.execute(f"ATTACH {quote_text(str(storage.warehouse))} AS {_CATALOG} (READ_ONLY)")
        _check_night(connection, windows)
        rows: dict[str, int] = {}
        for step, cutoff in enumerate(windows.cutoffs, start=1):
            rows |= _export_cutoff(connection, storage.marts(cutoff), cutoff)
            report(step, len(windows.cutoffs), storage.marts(cutoff).name)
    return rows


def _check_night(connection: duckdb.DuckDBPyConnection, windows: EvaluationWindows) -> None:
    """Refuse a warehouse whose cutoffs are not the night's.

    Rows of the wanted cutoffs might be there all the same, beside propensity targets that were
    chosen at another train cutoff.
    """
    built = connection.execute(
        f"SELECT observation_cutoff, is_train_cutoff FROM {_CATALOG}.main.int_observation_cutoffs "
        "ORDER BY observation_cutoff"
    ).fetchall()
    wanted = [(cutoff, cutoff == windows.train_cutoff) for cutoff in windows.cutoffs]
    if built != wanted:
        days = ", ".join(f"{cutoff:%Y-%m-%d}" for cutoff, _ in built)
        raise PipelineError(
            f"The warehouse was built for the cutoffs {days}, not for the night that ends at "
            f"{windows.cutoff:%Y-%m-%d}.",
            "Build it for this night first; nights follow one another.",
        )


def user_aggregates_contract(connection: duckdb.DuckDBPyConnection) -> Contract:
    """Return the contract of `user_aggregates`, read from the attached warehouse.

    Its columns are declared once, in the dbt project, which also enforces them.
    """
    columns = connection.execute(
        "SELECT column_name, data_type, comment FROM duckdb_columns() "
        "WHERE database_name = ? AND table_name = ? ORDER BY column_index",
        [_CATALOG, USER_AGGREGATES],
    ).fetchall()
    fields = [
        pa.field(name, _ARROW_TYPES[type_], metadata={"meaning": comment or ""})
        for name, type_, comment in columns
    ]
    return Contract(USER_AGGREGATES, pa.schema(fields), ("observation_cutoff", "user_id"))


def _export_cutoff(
    connection: duckdb.DuckDBPyConnection, target: Path, cutoff: datetime
) -> dict[str, int]:
    """Write the marts of a cutoff as one set."""
    aggregates = user_aggregates_contract(connection)
    rows = {}
    with writing_folder(target) as folder:
        for contract in (USER_RFM, aggregates, LABELS, PROPENSITY_LABELS, PROPENSITY_TARGETS):
            at_cutoff = "observation_cutoff" in contract.schema.names
            query = _select(contract, "WHERE observation_cutoff = ?" if at_cutoff else "")
            rows[f"{target.name}/{contract.name}"] = _write(
                connection,
                query,
                [cutoff] if at_cutoff else [],
                contract,
                folder / f"{contract.name}.parquet",
            )
    return rows


def _select(contract: Contract, where: str) -> str:
    """Return the query for a contract's columns in its order."""
    columns = ", ".join(quote_identifier(name) for name in contract.schema.names)
    order = ", ".join(quote_identifier(name) for name in contract.sort_order)
    table = f"{_CATALOG}.main.{quote_identifier(contract.name)}"
    return f"SELECT {columns} FROM {table} {where} ORDER BY {order}"


def _write(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    parameters: Sequence[object],
    contract: Contract,
    target: Path,
) -> int:
    """Stream a query into a Parquet file of exactly the contract's schema; return its rows."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    reader = connection.execute(query, parameters).to_arrow_reader(_ROWS_AT_ONCE)
    num_rows = 0
    with pq.ParquetWriter(target, contract.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]).cast(contract.schema))
            num_rows += batch.num_rows
    target.chmod(0o600)
    return num_rows
