"""What the command line makes of Dagster's runs."""

from pathlib import Path

import dagster as dg
import pytest

from behavior_pipeline.defs.partitions import nights
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.runs import _as_of, _raise_cause, dagster_home
from behavior_pipeline.settings import Settings

LATER_THAN_ANY_CLOCK = "2999-01-01"


def test_events_may_be_dated_later_than_the_clock() -> None:
    assert not nights.has_partition_key(LATER_THAN_ANY_CLOCK)
    with _as_of(LATER_THAN_ANY_CLOCK, Settings()):
        assert nights.has_partition_key(LATER_THAN_ANY_CLOCK)


def test_a_night_before_the_first_is_refused() -> None:
    with pytest.raises(PipelineError, match="partitions_start"), _as_of("1999-12-31", Settings()):
        pass


def failed_run(*definitions: object) -> dg.ExecuteInProcessResult:
    """Execute assets and checks of which one fails."""
    return dg.materialize(list(definitions), raise_on_error=False)  # type: ignore[arg-type]


@dg.asset
def table(context: dg.AssetExecutionContext) -> None:
    """Something to check."""


@dg.asset_check(asset=table, blocking=True)
def is_sound() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False)


@dg.asset
def spoilt() -> None:
    raise PipelineError("The file 'a: b' is empty.", "Fill it.")


def test_a_blocking_check_is_told_without_a_traceback() -> None:
    with pytest.raises(RuntimeError, match="blocking check") as caught:
        _raise_cause(failed_run(table, is_sound))
    assert "Stack Trace" not in str(caught.value)


def test_a_mistake_keeps_its_words() -> None:
    with pytest.raises(PipelineError) as caught:
        _raise_cause(failed_run(spoilt))
    assert str(caught.value) == "The file 'a: b' is empty.\nFill it."


def test_nights_of_a_backfill_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    dagster_home(Settings())
    with dg.DagsterInstance.get() as instance:
        assert instance.get_concurrency_config().run_queue_config.max_concurrent_runs == 1
