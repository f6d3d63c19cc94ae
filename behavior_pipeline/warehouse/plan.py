"""The plan: what dbt compiles of `dbt_sql/`, ready to be run for some users or for all.

dbt knows the models, their order, their contracts and their tests. It compiles them once for a
preset; nights then run the same SQL without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, read_json, write_json
from behavior_pipeline.warehouse.dbt import DBT_PROJECT, dbt_arguments, run_dbt
from behavior_pipeline.warehouse.swap import database_aside
from behavior_pipeline.warehouse.variables import task_variables
from behavior_pipeline.windows import EvaluationWindows

Grain = Literal["view", "arrivals", "user", "sum", "night"]
"""What a model's rows depend on, and so when they are made anew:

- view: nothing is stored.
- arrivals: the list of arrivals; always anew.
- user: each row on one user's events alone; only users touched.
- sum: each row is a sum over users, its `key` and all else added up; what users touched added is
  taken out and what they add now is put in.
- night: everything; always anew, so such models read tables of the grains above, not events.
"""

PLAN_VERSION: Final = 2  # raise it when plans on disk can no longer be read


@dataclass(frozen=True)
class Column:
    """A column of a model's contract."""

    name: str
    type: str
    is_required: bool
    description: str


@dataclass(frozen=True)
class Model:
    """A model as dbt compiled it.

    Attributes:
        name: of the model, and of its table or view.
        sql: compiled; names other models without a schema.
        grain: see Grain.
        is_parquet: its rows are files under `storage.events_sessionized`, not a table.
        key: of a sum, the columns that are not added up.
        description, columns: its contract.
    """

    name: str
    sql: str
    grain: Grain
    is_parquet: bool
    key: tuple[str, ...]
    description: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class DataTest:
    """A data test: its SQL selects the rows that fail."""

    name: str
    model: str
    sql: str


@dataclass(frozen=True)
class Plan:
    """Models in the order of their dependencies, and their tests.

    Attributes:
        fingerprint: hash of the dbt project and of all variables behind the plan.
        models: see Model.
        tests: see DataTest.
    """

    fingerprint: str
    models: tuple[Model, ...]
    tests: tuple[DataTest, ...]

    def of_grain(self, *grains: Grain) -> list[Model]:
        """Return the models of some grains, in order."""
        return [model for model in self.models if model.grain in grains]


def load_plan(
    storage: Storage,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    report: Report = report_nothing,
) -> Plan:
    """Return the plan of a preset, compiled anew if the dbt project or a variable has changed.

    Of the windows only their lengths matter.

    Raises:
        PipelineError: if dbt cannot compile the project.
    """
    variables = task_variables(settings, preset, windows)
    fingerprint = _fingerprint(variables)
    kept = _kept_file(storage)
    content = read_json(kept) if kept.is_file() else {}
    if content.get("fingerprint") != fingerprint:
        report(0, 1, "compiling the models")
        content = asdict(_compile(storage, variables, fingerprint))
        write_json(kept, content)
    return _plan_of(content)


def kept_plan(storage: Storage) -> Plan | None:
    """Return the plan that was loaded last, None before the first one."""
    kept = _kept_file(storage)
    return _plan_of(read_json(kept)) if kept.is_file() else None


def _kept_file(storage: Storage) -> Path:
    return storage.home / "warehouse_plan.json"


def plan_from_manifest(manifest: Mapping[str, Any], fingerprint: str) -> Plan:
    """Return the plan that a compiled manifest holds."""
    nodes = {key: node for key, node in manifest["nodes"].items() if node.get("compiled_code")}
    models = {key: node for key, node in nodes.items() if node["resource_type"] == "model"}
    tests = [
        DataTest(node["name"], models[node["attached_node"]]["name"], node["compiled_code"])
        for node in nodes.values()
        if node["resource_type"] == "test" and node["attached_node"] in models
    ]
    return Plan(
        fingerprint,
        tuple(_model(models[key]) for key in _in_order(models)),
        tuple(sorted(tests, key=lambda test: (test.model, test.name))),
    )


def _compile(storage: Storage, variables: dict[str, object], fingerprint: str) -> Plan:
    """Let dbt compile the project."""
    with database_aside(storage, storage.home / "plan.duckdb") as database:
        work = database.parent
        arguments = dbt_arguments("compile", variables, work, database)
        run_dbt([*arguments, "--exclude", "test_type:unit"])
        return plan_from_manifest(read_json(work / "target" / "manifest.json"), fingerprint)


def _fingerprint(variables: Mapping[str, object]) -> str:
    """Return a hash of everything that the compiled SQL depends on."""
    digest = hashlib.sha256(json.dumps([PLAN_VERSION, variables], sort_keys=True).encode())
    for path in project_files():
        digest.update(path.relative_to(DBT_PROJECT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def project_files() -> list[Path]:
    """Return the files that make the dbt project, sorted."""
    folders = ("models", "macros", "tests")
    found = [path for folder in folders for path in (DBT_PROJECT / folder).rglob("*.*")]
    return sorted([*found, DBT_PROJECT / "dbt_project.yml"])


def _in_order(models: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Return the ids of models so that each follows what it depends on; ties by name."""
    done: dict[str, None] = {}
    while len(done) < len(models):
        ready = [
            key
            for key, node in models.items()
            if key not in done
            and all(name in done for name in node["depends_on"]["nodes"] if name in models)
        ]
        done.update(dict.fromkeys(sorted(ready)))
    return done


def _model(node: Mapping[str, Any]) -> Model:
    """Read a model of the manifest."""
    meta = node["config"].get("meta") or {}
    is_view = node["config"]["materialized"] == "view"
    return Model(
        name=node["name"],
        sql=node["compiled_code"],
        grain="view" if is_view else meta.get("grain", "night"),
        is_parquet=meta.get("stored_as") == "parquet",
        key=tuple(meta.get("key", ())),
        description=node["description"],
        columns=tuple(_column(column) for column in node["columns"].values()),
    )


def _column(column: Mapping[str, Any]) -> Column:
    """Read a column of the manifest."""
    types = {constraint["type"] for constraint in column.get("constraints") or []}
    return Column(column["name"], column["data_type"], "not_null" in types, column["description"])


def _plan_of(content: Mapping[str, Any]) -> Plan:
    """Read a plan that was kept as JSON."""
    models = [
        Model(
            **model
            | {
                "key": tuple(model["key"]),
                "columns": tuple(Column(**column) for column in model["columns"]),
            }
        )
        for model in content["models"]
    ]
    tests = [DataTest(**test) for test in content["tests"]]
    return Plan(content["fingerprint"], tuple(models), tuple(tests))
