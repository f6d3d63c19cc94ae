"""Resources: the opened pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from behavior_pipeline.erasure.erase import complete_pending
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.promotion import settle
from behavior_pipeline.holding import holding
from behavior_pipeline.pipeline import Pipeline, open_pipeline
from behavior_pipeline.windows import EvaluationWindows, cutoff_of

PARTITION_TAG = "dagster/partition"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"


class PipelineResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Opens the pipeline of a run; a run's configuration may override any setting."""

    overrides: dict[str, Any] = Field(
        default={}, description="settings of this run, such as source, path and seed"
    )

    def open(self) -> Pipeline:
        """Open the pipeline with this run's overrides."""
        return open_pipeline(**self.overrides)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[PipelineResource]:
        """Hold the source's home while the steps of a run use this; wait for it if need be."""
        try:
            storage = self.open().storage
        except PipelineError:
            yield self  # the first step that opens it says so
            return

        def waiting() -> None:
            if context.log is not None:
                context.log.info("Another run is at work in %s: waiting for it.", storage.home)

        with holding(storage, waiting):
            settle(storage)  # what was killed half-way is completed first
            complete_pending(storage)
            yield self


class Night:
    """One night of one source: the pipeline, its cutoff and its evaluation windows."""

    def __init__(
        self,
        context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext,
        resource: PipelineResource,
    ) -> None:
        self.pipeline = resource.open()
        self.cutoff: datetime = cutoff_of(partition_key_of(context))

    @property
    def windows(self) -> EvaluationWindows:
        """The night's train and test cutoffs."""
        return self.pipeline.windows(self.cutoff)

    @property
    def before(self) -> EvaluationWindows | None:
        """Those of the night before; None if there is too little history for one."""
        try:
            return self.pipeline.windows(self.cutoff - timedelta(days=1))
        except PipelineError:
            return None


def partition_key_of(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> str:
    """Return the night of a run, also for assets and checks that are not partitioned themselves."""
    key = night_of(context.run.tags)
    if key is None:
        raise dg.Failure("Choose a partition: every run belongs to a night.")
    return key


def night_of(tags: Mapping[str, str]) -> str | None:
    """Return the night that a run's tags name, None without a single one.

    A backfill of assets names a range, here of one night a run.
    """
    first, last = tags.get(RANGE_START_TAG), tags.get(RANGE_END_TAG)
    return tags.get(PARTITION_TAG) or (first if first == last else None)


def now() -> datetime:
    """Return the time that goes into `written_at` and `ingested_at`."""
    return datetime.now(UTC)


@dg.definitions
def resources() -> dg.Definitions:
    """Bind the resources, and run the steps of a run one after another in its own process.

    Alone in its module: folder loading ignores whatever stands beside such a function.
    """
    return dg.Definitions(
        resources={"pipeline": PipelineResource()}, executor=dg.in_process_executor
    )
