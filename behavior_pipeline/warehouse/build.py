"""Builds the warehouse: everybody from nothing, or the users touched since the last build.

Both run the same plan on the same canonical events, so they give the same rows. Everybody is built
bucket by bucket, in a file aside that is swapped in at the end. Users touched are built in the file
that is there, in one transaction: a night that fails or is killed leaves what was there before.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import duckdb

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.arrivals import Arrival, loaded_arrivals, num_buckets
from behavior_pipeline.ingest.presets import Preset
from behavior_pipeline.layers import (
    CURRENT_FILE,
    EVENTS_FILE,
    USERS_FILE,
    Layer,
    Layers,
    bucket_file,
    layers_of,
    point_to_layers,
    read_layers,
    remove_unused,
)
from behavior_pipeline.progress import Report, counting, report_nothing
from behavior_pipeline.settings import Settings
from behavior_pipeline.sql import (
    fetch_one,
    open_engine,
    parquet,
    quote_text,
    transaction,
)
from behavior_pipeline.storage import (
    Storage,
    working_alone,
    writing_folder,
)
from behavior_pipeline.warehouse.data_tests import run_tests, touched_scope
from behavior_pipeline.warehouse.plan import Model, Plan, load_plan
from behavior_pipeline.warehouse.readers import folders_read
from behavior_pipeline.warehouse.state import (
    MAX_LAYERED_SHARE,
    MAX_TOUCHED_SHARE,
    TOUCHED,
    State,
    find_touched,
    read_state,
    why_rebuild,
    write_state,
)
from behavior_pipeline.warehouse.swap import database_aside, swap_in
from behavior_pipeline.warehouse.variables import written_cutoff
from behavior_pipeline.warehouse.workbench import EVENTS, Workbench
from behavior_pipeline.windows import EvaluationWindows


@dataclass(frozen=True)
class WarehouseSummary:
    """What a build did.

    Attributes:
        models: names of all models, each after what it depends on.
        rebuilt: why everybody was rebuilt; empty if only the users touched were.
        num_users: users with an event.
        num_users_touched: users that were built.
        rows: rows of each table.
        seconds: time that each model took.
        failures: rows that fail each data test that was run.
    """

    models: tuple[str, ...]
    rebuilt: str
    num_users: int
    num_users_touched: int
    rows: Mapping[str, int]
    seconds: Mapping[str, float]
    failures: Mapping[str, int]


@dataclass(frozen=True)
class _Build:
    """What a build works with."""

    storage: Storage
    settings: Settings
    plan: Plan
    windows: EvaluationWindows
    arrivals: list[Arrival]
    report: Report

    @property
    def night_cutoff(self) -> str:
        """The night's own cutoff, as the models read it."""
        return written_cutoff(max(self.windows.cutoffs))

    def event_files(self, bucket: int | None = None) -> list[Path]:
        """Canonical events that may be of a bucket, or of any."""
        return [file for arrival in self.arrivals for file in arrival.event_files(bucket)]

    def state(self, layers: Layers, num_users: int) -> State:
        """Return the state that this build leaves."""
        applied = {arrival.key: arrival.load_id for arrival in self.arrivals}
        fingerprint = self.plan.fingerprint
        return State(fingerprint, applied, self.night_cutoff, num_users, layers.document())


def build_warehouse(
    storage: Storage,
    settings: Settings,
    preset: Preset,
    windows: EvaluationWindows,
    report: Report = report_nothing,
    *,
    from_nothing: bool = False,
) -> WarehouseSummary:
    """Bring every model up to date with the canonical events and the night, and test it.

    Args:
        storage: the source's home, with canonical events.
        settings: memory, threads, buckets.
        preset: what counts in the source.
        windows: the night's cutoffs.
        report: told of each model that is done, bucket by bucket.
        from_nothing: build everybody, whatever is there.

    Raises:
        PipelineError: if there are no events, or a model or a data test fails (FailedTestsError).
            The warehouse then stays as it was.
    """
    with working_alone(storage):
        arrivals = loaded_arrivals(storage)
        if not any(arrival.event_files() for arrival in arrivals):
            raise PipelineError(
                f"There are no events in {storage.events}.", "Ingest a source first."
            )
        plan = load_plan(storage, settings, preset, windows, report)
        build = _Build(storage, settings, plan, windows, arrivals, report)
        state = read_state(storage.warehouse)
        reason = "asked for" if from_nothing else why_rebuild(state, plan.fingerprint, arrivals)
        if state is not None and not reason and not _layers_of(storage, state).are_there:
            reason = "sessionized events are gone"
        if state is not None and not reason:
            outcome = _build_touched(build, state)
            if isinstance(outcome, WarehouseSummary):
                return outcome
            reason = outcome
        return _build_everybody(build, state, reason)


def _build_everybody(build: _Build, state: State | None, reason: str) -> WarehouseSummary:
    """Build all users, a bucket at a time, in a file aside."""
    storage, plan = build.storage, build.plan
    buckets = num_buckets(storage, build.settings.num_buckets)
    before = _newest_layers(storage, state)
    base = Layer(_new_id(), before.version + 1 if before else 1)
    layers = Layers(storage.events_sessionized, base, (), buckets)
    once = plan.of_grain("arrivals", "sum", "night", "view")
    num_steps = buckets * len(plan.of_grain("user", "sum")) + len(once)
    with (
        database_aside(storage, storage.warehouse) as aside,
        _open(build, aside) as connection,
    ):
        bench = Workbench(connection, plan, counting(build.report, num_steps))
        bench.set_night(build.arrivals, build.windows)
        bench.set_events(build.event_files())
        _create_first(bench)
        with writing_folder(layers.folder / f"base={base.id}") as folder:
            for bucket in range(buckets):
                bench.part = f"bucket {bucket + 1} of {buckets}"
                _fill_bucket(bench, build, bucket, folder / bucket_file(bucket))
        bench.part = ""
        bench.clear_scope()
        _finish(bench, layers, is_new=True)
        failures = run_tests(bench, {})
        num_users = _count_users(connection)
        write_state(connection, build.state(layers, num_users))
        summary = _summary(bench, reason, num_users, num_users, failures)
        connection.execute("CHECKPOINT")
        connection.close()
        swap_in(aside, storage.warehouse)
    point_to_layers(layers)
    remove_unused(layers, before, folders_read(storage))
    return summary


def _newest_layers(storage: Storage, state: State | None) -> Layers | None:
    """Return the newest sessionized events, also those that a lost warehouse went with.

    Versions never begin anew: whoever made something of one must see that another came after it.
    """
    folder = storage.events_sessionized
    found = [_layers_of(storage, state)] if state else []
    if (folder / CURRENT_FILE).is_file():
        found.append(read_layers(folder))
    return max(found, key=lambda layers: layers.version, default=None)


def _create_first(bench: Workbench) -> None:
    """Make what the buckets are filled into, and the views over events that they go through."""
    for model in bench.plan.of_grain("arrivals"):
        bench.create(model)
        bench.insert(model)
    for model in bench.plan.of_grain("user", "sum"):
        if not model.is_parquet:
            bench.create(model)
        if model.grain == "sum":
            bench.begin_sum(model, with_what_is_there=False)
    for model in _views_over_events(bench.plan):
        bench.create(model)


def _views_over_events(plan: Plan) -> list[Model]:
    """Return the views that come before the first model that is stored by user."""
    names = [model.name for model in plan.models]
    end = names.index(EVENTS)
    return [model for model in plan.models[:end] if model.grain == "view"]


def _fill_bucket(bench: Workbench, build: _Build, bucket: int, file: Path) -> None:
    """Build the users of a bucket."""
    files = build.event_files(bucket)
    bench.set_events(files or build.event_files(), f"user_bucket = {bucket}")
    for model in bench.plan.of_grain("user", "sum"):
        if model.is_parquet:
            bench.write(model, file)
            bench.set_scope(model.name, f"FROM {parquet([file])}")
        elif model.grain == "sum":
            bench.add(model)
        else:
            bench.insert_users(model)


def _build_touched(build: _Build, state: State) -> WarehouseSummary | str:
    """Build the users touched, in place; or say why everybody must be."""
    storage, plan = build.storage, build.plan
    known = _layers_of(storage, state)
    with _open(build, storage.warehouse) as connection:
        with transaction(connection):
            num_touched = find_touched(connection, state, build.arrivals, build.night_cutoff)
            if num_touched > MAX_TOUCHED_SHARE * state.num_users:
                return f"{num_touched:,} of {state.num_users:,} users are touched"
            layered = _num_layered(connection, known) if num_touched else 0
            if layered > MAX_LAYERED_SHARE * state.num_users:
                return "more than half of the users are in layers"
            steps = [*plan.of_grain("arrivals", "night")]
            if num_touched:  # of a sum the old rows are taken out, the new ones added, then all
                steps += [*plan.of_grain("user"), *3 * plan.of_grain("sum")]
            bench = Workbench(connection, plan, counting(build.report, len(steps)))
            layers, summary = _work_in(bench, build, known, num_touched)
        connection.execute("CHECKPOINT")
    point_to_layers(layers)
    remove_unused(layers, known, folders_read(storage))
    return summary


def _work_in(
    bench: Workbench, build: _Build, known: Layers, num_touched: int
) -> tuple[Layers, WarehouseSummary]:
    """Bring the open warehouse up to date with the users touched and the night."""
    bench.set_night(build.arrivals, build.windows)
    for model in bench.plan.of_grain("arrivals"):
        bench.renew(model)
    bench.part = f"{num_touched:,} users touched"
    layers = _add_layer(bench, build, known) if num_touched else known
    bench.part = ""
    bench.clear_scope()
    _finish(bench, layers, is_new=False)
    newest = layers.layer_folder(layers.layers[-1]) if num_touched else None
    failures = run_tests(bench, touched_scope(bench, newest))
    num_users = _count_users(bench.connection)
    write_state(bench.connection, build.state(layers, num_users))
    return layers, _summary(bench, "", num_users, num_touched, failures)


def _add_layer(bench: Workbench, build: _Build, known: Layers) -> Layers:
    """Build the users touched and put their rows in place of the old ones."""
    layer = Layer(_new_id(), known.version + 1)
    layers = Layers(known.folder, known.base, (*known.layers, layer), known.num_buckets)
    scope = f"user_id IN (SELECT user_id FROM {TOUCHED})"
    bench.set_scope(EVENTS, f"SELECT * FROM ({known.relation()}) WHERE {scope}")
    for model in bench.plan.of_grain("sum"):
        bench.begin_sum(model, with_what_is_there=True)
        bench.add(model, -1)
    bench.set_events(build.event_files(), scope)
    with writing_folder(layers.layer_folder(layer)) as folder:
        users = folder / USERS_FILE
        bench.connection.execute(
            f"COPY (FROM {TOUCHED} ORDER BY user_id) TO {quote_text(str(users))} (FORMAT parquet)"
        )
        users.chmod(0o600)
        for model in bench.plan.of_grain("user", "sum"):
            if model.is_parquet:
                bench.write(model, folder / EVENTS_FILE)
                reader = f"FROM {parquet([folder / EVENTS_FILE])}"
                bench.set_scope(model.name, reader)
            elif model.grain == "sum":
                bench.add(model)
                bench.total(model)
            else:
                bench.replace_users(model, TOUCHED)
    return layers


def _finish(bench: Workbench, layers: Layers, *, is_new: bool) -> None:
    """Build what depends on more than one user, and the views over it."""
    over_events = {model.name for model in _views_over_events(bench.plan)}
    for model in bench.plan.models:
        if model.is_parquet:
            bench.point_events_to(model, layers)
        elif model.grain == "sum" and is_new:
            bench.total(model)
        elif model.grain == "night":
            if is_new:
                bench.create(model)
            bench.renew(model)
        elif model.grain == "view" and is_new and model.name not in over_events:
            bench.create(model)


def _summary(
    bench: Workbench, rebuilt: str, num_users: int, num_touched: int, failures: Mapping[str, int]
) -> WarehouseSummary:
    """Say what was done; call it while the warehouse is open."""
    tables = [model for model in bench.plan.models if model.grain != "view"]
    rows = {model.name: bench.count(model) for model in tables}
    return WarehouseSummary(
        models=tuple(model.name for model in bench.plan.models),
        rebuilt=rebuilt,
        num_users=num_users,
        num_users_touched=num_touched,
        rows=rows,
        seconds=dict(bench.seconds),
        failures=failures,
    )


def _open(build: _Build, database: Path) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
    """Open a warehouse to write to."""
    settings = build.settings
    spill = build.storage.scratch / "spill"
    return open_engine(settings.memory_limit, settings.threads, spill, database)


def _count_users(connection: duckdb.DuckDBPyConnection) -> int:
    """Count the users with an event."""
    return int(fetch_one(connection, "SELECT count(DISTINCT user_id) FROM main.user_days")[0])


def _num_layered(connection: duckdb.DuckDBPyConnection, layers: Layers) -> int:
    """Count the users that are in a layer, as often as they are."""
    files = layers.users_files(layers.base.version)
    if not files:
        return 0
    return int(fetch_one(connection, f"SELECT count(*) FROM {parquet(files)}")[0])


def _layers_of(storage: Storage, state: State) -> Layers:
    """Return the sessionized events that go with a warehouse."""
    return layers_of(storage.events_sessionized, dict(state.layers))


def _new_id() -> str:
    """Return a name that no folder has had: files of a version are never changed."""
    return uuid4().hex[:12]
