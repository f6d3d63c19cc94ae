"""Stage 1 in Dagster: the dbt models, the exported marts, and what analysts open."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_dbt import DagsterDbtTranslator, DagsterDbtTranslatorSettings, DbtProject
from dagster_dbt.asset_utils import build_dbt_specs

from behavior_pipeline.contracts import USER_RFM
from behavior_pipeline.defs.loggers import report_to
from behavior_pipeline.defs.metadata import row_count, table_schema
from behavior_pipeline.defs.partitions import DUCKDB_WRITER, ONE_NIGHT_A_RUN, nights
from behavior_pipeline.defs.resources import Night, PipelineResource
from behavior_pipeline.storage import read_json
from behavior_pipeline.warehouse.analytics import publish_analytics
from behavior_pipeline.warehouse.build import WarehouseSummary, build_warehouse
from behavior_pipeline.warehouse.data_tests import FailedTestsError
from behavior_pipeline.warehouse.dbt import DBT_PROJECT, dbt_arguments, run_dbt
from behavior_pipeline.warehouse.export import export_marts

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


def _specs() -> tuple[dict[str, dg.AssetSpec], dict[str, dg.AssetCheckSpec]]:
    """Return dbt's models as assets and its data tests as checks that hold a night back."""
    assets, checks = build_dbt_specs(
        translator=Translator(
            DagsterDbtTranslatorSettings(enable_duplicate_source_asset_keys=True)
        ),
        manifest=read_json(current_manifest()),
        select="fqn:*",
        exclude="test_type:unit",  # unit tests check the SQL, not the night's data
        selector="",
        io_manager_key=None,
        project=None,
    )
    specs = {
        spec.key.path[-1]: spec.replace_attributes(partitions_def=nights, skippable=True)
        for spec in assets
    }
    return specs, {check.name: check._replace(partitions_def=nights) for check in checks}


# Dictionaries: folder loading would take a list of specs for assets of its own.
ASSETS, CHECKS = _specs()


@dg.multi_asset(
    name="warehouse",
    specs=list(ASSETS.values()),
    check_specs=list(CHECKS.values()),
    backfill_policy=ONE_NIGHT_A_RUN,
    pool=DUCKDB_WRITER,
    can_subset=True,  # without it Dagster 1.13 refuses a backfill of several nights from its page
)
def warehouse(
    context: dg.AssetExecutionContext, pipeline: PipelineResource
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    """Bring every model up to date and test it: the users touched, or everybody if need be.

    Whichever models are chosen, all are built: one without the others would be of another night.
    """
    night = Night(context, pipeline)
    opened = night.pipeline
    try:
        done = build_warehouse(
            opened.storage,
            opened.settings,
            opened.preset,
            night.windows,
            report=report_to(context, "building"),
        )
    except FailedTestsError as error:  # the page shows which checks held the night back
        yield from _check_results(context, CHECKS.values(), error.failures)
        raise
    for name, spec in ((name, ASSETS[name]) for name in done.models):
        if spec.key in context.selected_asset_keys:
            own = [check for check in CHECKS.values() if check.asset_key == spec.key]
            yield dg.MaterializeResult(
                asset_key=spec.key,
                metadata=_model_metadata(name, done),
                check_results=list(_check_results(context, own, done.failures)),
            )


def _check_results(
    context: dg.AssetExecutionContext,
    checks: Iterable[dg.AssetCheckSpec],
    failures: Mapping[str, int],
) -> Iterator[dg.AssetCheckResult]:
    """Tell of those checks that the run was asked for."""
    for check in checks:
        if check.key in context.selected_asset_check_keys:
            yield dg.AssetCheckResult(
                passed=failures[check.name] == 0,
                asset_key=check.asset_key,
                check_name=check.name,
                metadata={"num_failing_rows": failures[check.name]},
            )


def _model_metadata(name: str, done: WarehouseSummary) -> dict[str, Any]:
    """Show a model's rows, what it cost, and how many users were built."""
    rows = row_count(done.rows[name]) if name in done.rows else {}
    return rows | {
        "seconds": round(done.seconds.get(name, 0.0), 3),
        "num_users_built": done.num_users_touched,
        "num_users": done.num_users,
        "everybody_because": done.rebuilt or "no: only users touched",
    }


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
    """`analytics.duckdb`, what analysts open: replaced in one rename, never by an older night."""
    night = Night(context, pipeline)
    opened = night.pipeline
    is_published = publish_analytics(opened.storage, opened.settings, night.cutoff)
    return dg.MaterializeResult(
        metadata={
            "num_bytes": opened.storage.analytics.stat().st_size,
            "is_published": is_published,  # False: analysts have a newer night
        }
    )
