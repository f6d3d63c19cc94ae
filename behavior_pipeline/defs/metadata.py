"""Metadata of materializations: schemas, row counts, pictures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from behavior_pipeline.contracts import Contract


def table_schema(schema: pa.Schema) -> dg.TableSchema:
    """Describe an Arrow schema, with each column's meaning, as the UI shows it."""
    return dg.TableSchema(columns=[_column(field) for field in schema])


def contract_metadata(contract: Contract) -> dict[str, Any]:
    """Return the static metadata of an asset under a contract."""
    return {
        "dagster/column_schema": table_schema(contract.schema),
        "dagster/table_name": contract.name,
        "sort_order": ", ".join(contract.sort_order),
    }


def row_count(rows: int, *, is_partition: bool = True) -> dict[str, int]:
    """Return the row count under the key that the UI plots."""
    key = "dagster/partition_row_count" if is_partition else "dagster/row_count"
    return {key: rows}


def picture(path: Path, alternative: str) -> dg.MarkdownMetadataValue:
    """Embed a PNG file, so that it shows without access to the file."""
    return drawing(path.read_bytes(), alternative)


def drawing(content: bytes, alternative: str) -> dg.MarkdownMetadataValue:
    """Embed a PNG."""
    encoded = base64.b64encode(content).decode()
    return dg.MetadataValue.md(f"![{alternative}](data:image/png;base64,{encoded})")


def _column(field: pa.Field) -> dg.TableColumn:
    meaning = (field.metadata or {}).get(b"meaning", b"").decode()
    constraints = dg.TableColumnConstraints(nullable=field.nullable)
    return dg.TableColumn(field.name, str(field.type), description=meaning, constraints=constraints)
