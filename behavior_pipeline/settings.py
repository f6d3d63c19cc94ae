"""One typed settings object: defaults < `pipeline.yaml` < environment (`BEHAVIOR_…`)."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from behavior_pipeline.errors import PipelineError

SETTINGS_FILE = "pipeline.yaml"

MemoryLimit = Annotated[str, Field(pattern=r"(?i)^\d+(\.\d+)? ?[KMGT]i?B$")]
"""A size as DuckDB reads it, such as 3GB or 512MiB."""


class Settings(BaseSettings):
    """Everything that may differ between two installations of the pipeline."""

    model_config = SettingsConfigDict(
        env_prefix="BEHAVIOR_", yaml_file=SETTINGS_FILE, extra="forbid", frozen=True
    )

    data_root: Path = Field(Path("data"), description="folder that holds one home per source")
    source: str = Field("simulated", description="name of a mapping preset, or path of a YAML file")
    path: str | None = Field(
        None,
        description="file, folder or glob of raw events, file.duckdb::table, s3://bucket/… or "
        "postgresql://host/database?table=…; may hold {date} for nightly arrivals",
    )
    seed: int = Field(0, description="every random choice derives from it")
    partitions_start: date = Field(
        date(2005, 1, 1), description="first nightly partition, YYYY-MM-DD"
    )

    horizon_days: int | None = Field(None, description="overrides the preset's label window")
    lookback_days: int | None = Field(None, description="overrides the preset's population window")

    memory_limit: MemoryLimit = Field("3GB", description="DuckDB's memory before it spills to disk")
    threads: PositiveInt = Field(os.cpu_count() or 1, description="threads of DuckDB and torch")
    num_buckets: PositiveInt = Field(8, description="buckets of users: what is in memory at once")

    simulated_users: PositiveInt = Field(2400, description="users that `simulated` begins with")
    simulated_days: PositiveInt = Field(180, description="days that `simulated` covers")

    on_missing_arrival: Literal["fail", "accept"] = Field(
        "fail",
        description="a night for whose day no file has landed: fail, or accept it as a day without "
        "events; an empty file always means that",
    )
    max_quarantined_share: float = Field(
        0.5, ge=0, le=1, description="a load with a larger share of broken rows is refused"
    )

    max_unknown_event_share: float = Field(
        0.01, ge=0, le=1, description="a larger share of events the checkpoint cannot tell alarms"
    )

    min_token_count: PositiveInt = Field(5, description="rarer values become UNK")
    max_vocabulary: PositiveInt = Field(20_000, description="most values kept per token field")
    max_sequence_events: PositiveInt = Field(512, description="newest events kept per user")

    encoder_preset: Literal["tiny", "small", "base"] = Field("small", description="encoder size")
    max_training_steps: PositiveInt | None = Field(
        None, description="optimiser steps at the most; the encoder preset's own where absent"
    )

    promotion: Literal["automatic", "manual"] = Field(
        "automatic",
        description="a candidate that has passed every gate goes live at once, or waits for "
        "`behavior-pipeline promote`",
    )
    min_rank_share: float = Field(
        0.5,
        ge=0,
        description="gate: effective rank of a candidate's vectors, as a share of the live one's",
    )
    max_cold_start_share: float = Field(
        0.5, ge=0, le=1, description="gate: a larger share of users without a usable event"
    )
    max_foretelling_loss: float = Field(
        0.05, ge=0, description="gate: by so much more, relatively, may the next event's loss be"
    )
    max_probe_loss: float = Field(
        0.02, ge=0, description="gate: so much AUROC may the live version's probes lose"
    )

    max_published_drift: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="a published embedding stays while it is within this share of its length of a "
        "fresh one; 0 publishes whoever moved at all",
    )
    published_rows: Literal["changed", "all"] = Field(
        "changed", description="embeddings that a night publishes: those that changed, or all"
    )

    online_store: Literal["sqlite", "redis", "postgres"] = Field(
        "sqlite",
        description="where services read features; the servers' addresses and passwords are "
        "environment variables: see feature_repo/feature_store.*.yaml",
    )

    max_nightly_probe_loss: float = Field(
        0.05, ge=0, description="so much AUROC may yesterday's probe lose on tonight's vectors"
    )

    num_segments: PositiveInt = Field(6, description="groups of the segmentation")
    num_similar_users: PositiveInt = Field(20, description="neighbours published for each user")
    max_exact_similar_users: PositiveInt = Field(
        50_000, description="users compared with all others; of more, with the likeliest alone"
    )
    num_targets: PositiveInt = Field(30, description="most frequent propensity targets")
    max_probe_users: PositiveInt = Field(20_000, description="users that a probe is fitted on")
    bootstrap_samples: PositiveInt = Field(200, description="paired resamples behind an interval")

    drift_false_alarms_per_year: float = Field(
        2.0, gt=0, le=50, description="nights a year on which drift may alarm without a change"
    )
    drift_calm_nights: int = Field(
        28, ge=28, description="nights without a change that are seen before drift alarms"
    )
    drift_sample_users: PositiveInt = Field(
        2000, description="users whose neighbours are compared from night to night"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment before `pipeline.yaml`, and no other place."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_settings(**overrides: object) -> Settings:
    """Read the settings; arguments that are not None win over file and environment.

    Raises:
        PipelineError: if a setting is unknown or has no valid value.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise PipelineError(
            f"The setting '{name}' is not valid: {first['msg']}.",
            f"Correct it in {SETTINGS_FILE}, in BEHAVIOR_{name.upper()} or on the command line.",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{SETTINGS_FILE} is not valid YAML: {error}") from None
    except (ValueError, TypeError):  # raised by pydantic-settings for YAML that is no mapping
        raise PipelineError(
            f"{SETTINGS_FILE} holds no settings.", "Write one `name: value` per line."
        ) from None
