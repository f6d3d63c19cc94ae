"""Stage 1 in Dagster: the dbt models, the exported marts, and what analysts open."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_dbt import DagsterDbtTranslator, DbtCliResource, DbtProject, dbt_assets

from behavior_pipeline.contracts import USER_RFM
from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import table_schema
from behavior_pipeline.defs.partitions import DUCKDB_WRITER, ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import Night, PipelineResource
from behavior_pipeline.terminal import active
from behavior_pipeline.warehouse.analytics import publish_analytics
from behavior_pipeline.warehouse.build import (
    DBT_PROJECT,
    dbt_arguments,
    run_dbt,
    swap_in_warehouse,
    warehouse_aside,
)
from behavior_pipeline.warehouse.export import export_marts
from behavior_pipeline.warehouse.variables import dbt_variables

MANIFEST = DBT_PROJECT / "target" / "manifest.json"


def current_manifest() -> Path:
    """Return dbt's manifest, parsed anew when it is missing or older than the project."""
    sources = [path for pattern in ("*.sql", "*.yml") for path in DBT_PROJECT.rglob(pattern)]
    sources = [path for path in sources if MANIFEST.parent not in path.parents]
    newest = max(path.stat().st_mtime for path in sources)
    if not MANIFEST.exists() or MANIFEST.stat().st_mtime < newest:
        run_dbt(dbt_arguments("parse", {}, DBT_PROJECT))
        MANIFEST.touch()
    return MANIFEST


class Translator(DagsterDbtTranslator):
    """Names dbt's models as plain assets of the group `warehouse`."""

    def get_asset_spec(
        self, manifest: Mapping[str, Any], unique_id: str, project: DbtProject | None
    ) -> dg.AssetSpec:
        """Key a model by its name alone; the source is what ingest leaves behind."""
        spec = super().get_asset_spec(manifest, unique_id, project)
        node = self.get_resource_props(manifest, unique_id)
        if node["resource_type"] == "source":
            return spec.replace_attributes(key=dg.AssetKey("arrived_events"))
        return spec.replace_attributes(
            key=dg.AssetKey(node["name"]),
            group_name="warehouse",
            kinds={"dbt", "duckdb"},
            deps=[dg.AssetDep(dep.asset_key) for dep in spec.deps],
        )


@dbt_assets(
    manifest=current_manifest(),
    exclude="test_type:unit",  # unit tests check the SQL, not the night's data
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    dagster_dbt_translator=Translator(),
    pool=DUCKDB_WRITER,
    name="warehouse",
)
def warehouse(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, dbt: DbtCliResource
) -> Iterator[Any]:
    """Build and test every model in a file aside, then put it in place in one rename."""
    night = Night(context, pipeline)
    opened = night.pipeline
    variables = dbt_variables(opened.settings, opened.preset, opened.storage, night.windows)
    with warehouse_aside(opened.storage) as aside:
        variables["warehouse_path"] = str(aside)
        arguments = ["build", "--vars", json.dumps(variables, sort_keys=True)]
        with _quiet_in_a_terminal():
            invocation = dbt.cli(arguments, context=context, target_path=aside.parent / "target")
            yield from invocation.stream()
        swap_in_warehouse(opened.storage, aside)


@contextmanager
def _quiet_in_a_terminal() -> Iterator[None]:
    """Keep dbt's own lines out of the terminal that shows the run; the UI keeps them."""
    if active() is None:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


@dg.asset(
    group_name="warehouse",
    deps=[
        "events_sessionized",
        "user_rfm",
        "user_aggregates",
        "labels",
        "propensity_targets",
        "propensity_labels",
    ],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"duckdb", "parquet"},
    metadata={"dagster/column_schema": table_schema(USER_RFM.schema)},
)
def marts(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """The marts as Parquet: what later stages read instead of an open database."""
    night = Night(context, pipeline)
    opened = night.pipeline
    rows = export_marts(
        opened.storage, opened.settings, night.windows, report=report_to(context, "exporting")
    )
    return dg.MaterializeResult(metadata=rows)


@dg.asset(
    group_name="warehouse",
    deps=["marts", "predictions", "segments", "rfm_segments", "session_funnel", "user_overview"],
    partitions_def=nights,
    backfill_policy=ONE_NIGHT_A_RUN,
    kinds={"duckdb"},
    pool=DUCKDB_WRITER,
)
def analytics_database(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> dg.MaterializeResult[None]:
    """`analytics.duckdb`, what analysts open: replaced in one rename."""
    night = Night(context, pipeline)
    opened = night.pipeline
    publish_analytics(opened.storage, opened.settings, night.cutoff)
    return dg.MaterializeResult(metadata={"num_bytes": opened.storage.analytics.stat().st_size})
