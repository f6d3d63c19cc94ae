"""What Dagster loads, pinned: folder loading drops things in silence when it is misled."""

from __future__ import annotations

import dagster as dg
import pytest

from behavior_pipeline.definitions import defs
from behavior_pipeline.downstream.gates import GATES

GROUPS = {
    "ingest": {"raw_events", "historical_events", "arrived_events"},
    "warehouse": {
        "stg_events", "int_event_gaps", "int_event_versions", "int_observation_cutoffs",
        "int_session_starts", "int_user_diversity", "int_user_history", "int_user_target_days",
        "events_sessionized", "sessions", "user_days", "user_rfm", "user_aggregates", "labels",
        "propensity_targets", "propensity_labels", "daily_activity", "rfm_segments",
        "session_funnel", "user_overview", "marts", "analytics_database",
    },
    "sequences": {"vocabulary", "training_sequences", "sequences"},
    "encoder": {"checkpoint", "untrained_checkpoint"},
    "embeddings": {"user_embeddings", "evaluation_embeddings", "similar_users"},
    "feature_store": {
        "published_embeddings", "published_rfm", "published_predictions", "published_segments",
        "published_similar_users",
    },
    "downstream": {"predictions", "segments", "comparison", "drift", "report"},
    "candidate": {
        "candidate_sequences", "candidate_embeddings", "candidate_predictions",
        "candidate_segments", "candidate_similar_users", "published_candidate", "live_version",
    },
}  # fmt: skip

BLOCKING = {
    "is_history_whole", "is_arrival_whole", "are_features_before_the_cutoff",
    "are_schemas_as_agreed", "is_checkpoint_older_than_train_cutoff", "are_embeddings_sound",
    "is_read_back_equal", "are_tokens_before_the_cutoff", "is_source_schema_as_known",
    "do_probes_hold", *GATES,
}  # fmt: skip

ALARMS = {  # these warn and let the night go on
    ("comparison", "is_embedding_above_random"), ("sequences", "are_event_types_known"),
    ("drift", "is_night_like_those_before"),
}  # fmt: skip
DATA_TESTS = {  # of dbt, held against what a night has built
    ("daily_activity", "daily_activity_has_one_row_per_day_and_type"),
    ("events_sessionized", "events_sessionized_gaps_are_not_negative"),
    ("events_sessionized", "events_sessionized_lie_in_their_session"),
    ("events_sessionized", "events_sessionized_name_who_and_what"),
    ("int_event_versions", "event_versions_have_one_row_per_event_and_arrival"),
    ("int_observation_cutoffs", "cutoffs_are_midnights"),
    ("int_user_diversity", "user_diversity_has_one_row_per_user"),
    ("int_user_history", "user_history_has_one_row_per_user"),
    ("labels", "labels_have_one_row_per_cutoff_and_user"),
    ("propensity_labels", "propensity_labels_have_one_row_per_cutoff_target_and_user"),
    ("propensity_targets", "propensity_targets_are_distinct"),
    ("sessions", "sessions_do_not_end_before_they_start"),
    ("sessions", "sessions_have_one_row_per_user_and_start"),
    ("user_aggregates", "user_aggregates_have_one_row_per_cutoff_and_user"),
    ("user_aggregates", "user_aggregates_windows_nest"),
    ("user_days", "user_days_have_one_row_per_user_and_day"),
    ("user_rfm", "user_rfm_has_one_row_per_cutoff_and_user"),
    ("user_rfm", "user_rfm_knows_nothing_after_the_cutoff"),
}
DRIFT = {  # blocking only for what is documented as blocking
    ("historical_events", "is_source_schema_as_known"),
    ("arrived_events", "is_source_schema_as_known"),
}


@pytest.fixture(scope="module")
def loaded() -> dg.Definitions:
    definitions: dg.Definitions = defs()
    return definitions


def test_every_asset_is_loaded_in_the_group_of_its_stage(loaded: dg.Definitions) -> None:
    found: dict[str, set[str]] = {}
    for node in loaded.resolve_asset_graph().asset_nodes:
        found.setdefault(str(node.group_name), set()).add(node.key.to_user_string())
    assert found == GROUPS


def test_definitions_can_be_loaded(loaded: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(loaded)


def test_nightly_assets_share_the_daily_partitions(loaded: dg.Definitions) -> None:
    graph = loaded.resolve_asset_graph()
    unpartitioned = {
        node.key.to_user_string() for node in graph.asset_nodes if node.partitions_def is None
    }
    assert unpartitioned == {
        "raw_events", "historical_events", "vocabulary", "training_sequences", "checkpoint",
        "untrained_checkpoint",
    }  # fmt: skip


def test_jobs_and_their_hours(loaded: dg.Definitions) -> None:
    assert {job.name for job in loaded.resolve_all_job_defs()} >= {
        "history", "pretraining", "nightly", "pretraining_and_nightly", "candidate", "promotion",
        "rollback",
    }  # fmt: skip
    crons = {
        name: loaded.resolve_schedule_def(name).cron_schedule
        for name in ("nightly_schedule", "weekly_pretraining")
    }
    assert crons == {"nightly_schedule": "0 2 * * *", "weekly_pretraining": "0 3 * * 0"}


def test_the_nightly_job_trains_nothing_and_reloads_no_history(loaded: dg.Definitions) -> None:
    keys = {
        key.to_user_string()
        for key in loaded.resolve_job_def("nightly").asset_layer.selected_asset_keys
    }
    assert {"arrived_events", "user_embeddings", "published_embeddings", "report"} <= keys
    assert keys.isdisjoint({"historical_events", "checkpoint", "vocabulary", *GROUPS["candidate"]})


def test_leaks_and_holes_are_held_back(loaded: dg.Definitions) -> None:
    graph = loaded.resolve_asset_graph()
    blocking = {
        key.name
        for key in graph.asset_check_keys
        if graph.get_check_spec(key).blocking and key.name in BLOCKING
    }
    assert blocking == BLOCKING


def test_dbts_data_tests_hold_a_night_back(loaded: dg.Definitions) -> None:
    graph = loaded.resolve_asset_graph()
    in_warehouse = {
        key for key in graph.asset_check_keys if graph.get(key.asset_key).group_name == "warehouse"
    }
    found = {(key.asset_key.to_user_string(), key.name) for key in in_warehouse}
    marts = {("marts", "are_features_before_the_cutoff"), ("marts", "are_schemas_as_agreed")}
    assert found == DATA_TESTS | marts
    assert all(graph.get_check_spec(key).blocking for key in in_warehouse)


def test_all_models_are_one_step_that_needs_what_arrived(loaded: dg.Definitions) -> None:
    graph = loaded.resolve_asset_graph()
    models = GROUPS["warehouse"] - {"marts", "analytics_database"}
    (step,) = {graph.get(dg.AssetKey(model)).assets_def for model in models}
    assert {key.to_user_string() for key in step.keys} == models
    assert step.can_subset  # or Dagster refuses several nights of some models from its page
    assert dg.AssetKey("arrived_events") in graph.get(dg.AssetKey("stg_events")).parent_keys
    assert graph.get(dg.AssetKey("user_aggregates")).parent_keys >= {
        dg.AssetKey("int_user_diversity"), dg.AssetKey("int_user_history"),
    }  # fmt: skip
    assert set(loaded.resources or {}) == {"pipeline"}


def test_drift_is_looked_for_in_every_load_and_every_night(loaded: dg.Definitions) -> None:
    graph = loaded.resolve_asset_graph()
    is_blocking = {
        (key.asset_key.to_user_string(), key.name): graph.get_check_spec(key).blocking
        for key in graph.asset_check_keys
    }
    assert {pair for pair in ALARMS | DRIFT if pair in is_blocking} == ALARMS | DRIFT
    assert not any(is_blocking[pair] for pair in ALARMS)
    assert all(is_blocking[pair] for pair in DRIFT)


def test_what_services_read_has_a_deadline(loaded: dg.Definitions) -> None:
    graph = loaded.resolve_asset_graph()
    for name in ("user_embeddings", "published_embeddings"):
        policy = graph.get(dg.AssetKey(name)).freshness_policy_or_from_metadata
        assert policy is not None


def test_writers_queue_in_a_pool(loaded: dg.Definitions) -> None:
    graph = loaded.resolve_asset_graph()
    pools = {
        node.key.to_user_string(): node.pools
        for node in graph.asset_nodes
        if node.key.to_user_string() in {"historical_events", "arrived_events", "user_rfm"}
    }
    assert all(found == {"duckdb_writer"} for found in pools.values())
    assert len(pools) == 3
