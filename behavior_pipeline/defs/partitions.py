"""Nights: a partition is a day of arrival, its observation cutoff the midnight that ends it."""

from __future__ import annotations

import dagster as dg

from behavior_pipeline.settings import load_settings

nights = dg.DailyPartitionsDefinition(start_date=f"{load_settings().partitions_start}")

ONE_NIGHT_A_RUN = dg.BackfillPolicy.multi_run(max_partitions_per_run=1)
"""A backfill of many nights is one run a night."""

DUCKDB_WRITER = "duckdb_writer"
"""Pool of the steps that write a DuckDB file or the events: one at a time (see `dagster.yaml`)."""

ENCODER = "encoder"
"""Pool of the steps that fill the machine with tensor work: one at a time."""
