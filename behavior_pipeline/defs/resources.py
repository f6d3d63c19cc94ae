"""Resources: the opened pipeline."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import dagster as dg
from pydantic import Field

from behavior_pipeline.pipeline import Pipeline, open_pipeline
from behavior_pipeline.windows import EvaluationWindows, cutoff_of


class PipelineResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Opens the pipeline of a run; a run's configuration may override any setting."""

    overrides: dict[str, Any] = Field(
        default={}, description="settings of this run, such as source, path and seed"
    )

    def open(self) -> Pipeline:
        """Open the pipeline with this run's overrides."""
        return open_pipeline(**self.overrides)


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


def partition_key_of(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> str:
    """Return the night of a run, also for assets and checks that are not partitioned themselves."""
    run = context.run
    key = run.tags.get("dagster/partition")
    if key is None:
        raise dg.Failure("Choose a partition: every run belongs to a night.")
    return key


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
