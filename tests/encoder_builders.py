"""Small sequence files and a vocabulary for tests of the encoder, made without other rooms."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behavior_pipeline.contracts import SEQUENCES, TOKEN_FIELDS

CUTOFF = datetime(2024, 7, 1, tzinfo=UTC)
STARTED = CUTOFF - timedelta(days=180)
SIZES = {"action": 8, "item": 40, "category": 12, "location": 4, "amount": 10, "hour": 172}
VOCABULARY_ID = "0123456789abcdef"
ALONE = """
import sys
from importlib.util import spec_from_loader

class Absent:
    others = {"pandas", "polars", "duckdb", "pydantic", "sklearn", "rich", "dagster", "feast"}

    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self) if name in self.others else None

    def create_module(self, spec):
        raise ModuleNotFoundError(spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Absent())
"""  # begins a program that finds none of the pipeline's other libraries


class Folders(NamedTuple):
    sequences: Path
    vocabulary: Path
    checkpoints: Path


def user_row(user_id: str, days: list[float], seed: int, kept: int | None = None) -> dict:
    """One user's row; `days` are the times of the events in days since STARTED, in order."""
    random = np.random.default_rng(seed)
    times = [STARTED + timedelta(days=day) for day in days]
    gaps = [0.0, *np.diff(days)] if days else []
    taste = random.integers(4, SIZES["category"])
    ids = {
        field: random.integers(4, max(size, 5), len(days)).tolist() for field, size in SIZES.items()
    }
    ids["category"] = [int(taste)] * len(days)
    ids["location"] = [0] * len(days)
    keep = slice(-kept if kept else None, None)
    return {
        "user_id": user_id,
        "observation_cutoff": CUTOFF,
        "vocabulary_id": VOCABULARY_ID,
        "num_events": len(days),
        "first_event_at": times[0] if times else None,
        "last_event_at": times[-1] if times else None,
        **{f"{field}_ids": ids[field][keep] for field in TOKEN_FIELDS},
        "gap_seconds": [gap * 86_400 for gap in gaps][keep],
        "occurred_at": times[keep],
    }


def sequences_table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SEQUENCES.schema)


def random_rows(num_users: int, seed: int = 0) -> list[dict]:
    """Users with 0 to 40 events; the last of them has none."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(num_users):
        count = 0 if number == num_users - 1 else int(random.integers(1, 41))
        days = np.sort(random.uniform(0, 180, count)).tolist()
        rows.append(user_row(f"user{number:04d}", days, seed=number))
    return rows


def write_folders(folder: Path, rows: list[dict]) -> Folders:
    """Write sequences in two files of small row groups, and a vocabulary."""
    folders = Folders(folder / "sequences", folder / "vocabulary", folder / "checkpoints")
    folders.sequences.mkdir(parents=True)
    folders.vocabulary.mkdir()
    for number in range(2):
        table = sequences_table(rows[number::2])
        path = folders.sequences / f"bucket={number:03d}.parquet"
        pq.write_table(table, path, row_group_size=16)
    content = {
        "vocabulary_id": VOCABULARY_ID,
        "trained_through": CUTOFF.isoformat(),
        "fields": {field: {"size": size} for field, size in SIZES.items()},
    }
    (folders.vocabulary / "vocabulary.json").write_text(json.dumps(content))
    pq.write_table(pa.table({"value": ["a"]}), folders.vocabulary / "tokens.parquet")
    return folders
