"""Writing a table in its contract's order without holding all of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline import sql
from behavior_pipeline.contracts import Contract
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, writing_file

BATCH_ROWS = 65_536


def write_sorted(
    target: Path,
    contract: Contract,
    tables: Iterable[pa.Table],
    storage: Storage,
    settings: Settings,
) -> int:
    """Write tables as one Parquet file in the contract's order; return the number of rows.

    Tables are written one by one as they come and sorted by DuckDB, which spills to disk.
    """
    unsorted = storage.scratch / f"unsorted_{contract.name}.parquet"
    with writing_file(unsorted) as aside, pq.ParquetWriter(aside, contract.schema) as writer:
        for table in tables:
            writer.write_table(table.cast(contract.schema))
    try:
        return _sort(unsorted, target, contract, storage, settings)
    finally:
        unsorted.unlink(missing_ok=True)


def _sort(
    source: Path, target: Path, contract: Contract, storage: Storage, settings: Settings
) -> int:
    """Copy a Parquet file in the contract's order; return the number of rows."""
    order = ", ".join(sql.quote_identifier(name) for name in contract.sort_order)
    query = f"select * from read_parquet($source) order by {order}"
    num_rows = 0
    with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
        reader = engine.execute(query, {"source": str(source)}).to_arrow_reader(BATCH_ROWS)
        with pq.ParquetWriter(target, contract.schema) as writer:
            for batch in reader:
                writer.write_table(pa.Table.from_batches([batch]).cast(contract.schema))
                num_rows += batch.num_rows
    return num_rows
