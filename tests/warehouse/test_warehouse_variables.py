from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import yaml
from warehouse_builders import LIVE_CUTOFF, make_preset, make_windows

from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage
from behavior_pipeline.warehouse.dbt import DBT_PROJECT
from behavior_pipeline.warehouse.variables import dbt_variables


def test_every_variable_of_the_project_is_given(settings: Settings, storage: Storage):
    project = yaml.safe_load((DBT_PROJECT / "dbt_project.yml").read_text())
    variables = dbt_variables(settings, make_preset(), storage, make_windows())
    assert variables.keys() | {"warehouse_path"} == project["vars"].keys()


def test_cutoffs_are_written_in_order(settings: Settings, storage: Storage):
    variables = dbt_variables(settings, make_preset(), storage, make_windows(LIVE_CUTOFF))
    assert variables["observation_cutoffs"] == [
        "2024-03-01 00:00:00+00",
        "2024-03-11 00:00:00+00",
        "2024-03-21 00:00:00+00",
    ]
    assert variables["train_cutoff"] == "2024-03-01 00:00:00+00"


@pytest.mark.parametrize(
    "cutoff",
    [datetime(2024, 3, 11, 1, tzinfo=UTC), datetime(2024, 3, 11)],  # noqa: DTZ001
)
def test_a_cutoff_that_is_no_midnight_in_utc_is_refused(
    settings: Settings, storage: Storage, cutoff: datetime
):
    windows = replace(make_windows(), cutoff=cutoff, test_cutoff=cutoff, train_cutoff=cutoff)
    with pytest.raises(ValueError, match=re.escape(cutoff.isoformat())):
        dbt_variables(settings, make_preset(), storage, windows)


def test_null_types_stay_null(settings: Settings, storage: Storage):
    preset = make_preset(qualifying_event_types=None)
    variables = dbt_variables(settings, preset, storage, make_windows())
    assert variables["qualifying_event_types"] is None
    assert variables["propensity_event_types"] is None
