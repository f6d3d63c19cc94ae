"""Prepares what `quality.py` reads, on a machine that has the pipeline.

    python benchmarks/quality_prepare.py --source oss_commits --path FILE \
        --cutoffs 2025-11-02,2026-01-31,2026-05-01 --out DIR

Through the pipeline's own stages. Each test cutoff has a train cutoff one horizon before it. The
vocabulary, the propensity targets and the choice of training users know nothing at or after the
earliest train cutoff; features at a cutoff know nothing at or after that cutoff.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from objectives_data import (
    Features,
    aggregates_table,
    columns_with_nulls,
    features_at,
    tell,
    users_table,
    write,
)
from quality_cutoffs import MAX_EVENTS, SEQUENCES_FILE, Pair, cut, day_of, digest, ids_of

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.arrivals import events_span
from behavior_pipeline.ingest.load import load_arrival
from behavior_pipeline.pipeline import Pipeline, open_pipeline
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.reading import read_bucket, sequence_files
from behavior_pipeline.sequences.vocabulary import build_vocabulary, save_vocabulary
from behavior_pipeline.storage import write_json, writing_folder
from behavior_pipeline.windows import EvaluationWindows, parse_cutoff

UNCUT = 1_000_000  # events of a user: more than anyone has
CHUNK_USERS = 16_384
EVERYONE = "f" * 32  # the greatest MD5
KNOWN = {
    "online_retail_ii": ("online_retail_ii.parquet", "2011-09-10,2011-10-10,2011-11-09"),
    "oss_commits": ("oss_commits.parquet", "2025-11-02,2026-01-31,2026-05-01"),
    "globo_news": ("globo_news.parquet", "2017-10-10,2017-10-12,2017-10-14"),
    "travel_stackexchange": (
        "travel_stackexchange_events.parquet", "2017-02-28,2017-04-29,2017-06-28",
    ),
}  # fmt: skip
"""File and test cutoffs of the data sets of the comparison."""


def prepare(opened: Pipeline, cutoffs: list[datetime], out: Path, max_training_users: int) -> None:
    """Load the source and write all that is measured on into a folder, which is replaced.

    Args:
        opened: `max_probe_users` is how many are judged at a cutoff at the most.
        cutoffs: test cutoffs.
        out: the folder.
        max_training_users: that encoders are trained on, those of the smallest MD5.
    """
    tell("events")
    load_arrival(
        opened.preset, opened.raw_path, opened.storage, opened.settings, "history",
        datetime.now(UTC),
    )  # fmt: skip
    pairs = pairs_of(opened, cutoffs)
    moments = sorted({moment for pair in pairs for moment in pair})
    first = night(opened, moments[0])
    features = {moment: features_at(opened, first, moment) for moment in moments}
    flagged = columns_with_nulls([features[moments[0]].aggregates])
    with writing_folder(out) as aside:
        facts = write_histories(opened, features, aside, max_training_users)
        for moment, found in features.items():
            day = day_of(moment)
            write(aside / f"users_{day}.parquet", users_table(found.population))
            write(
                aside / f"aggregates_{day}.parquet",
                narrow(aggregates_table(found.aggregates, flagged)),
            )
        write_json(aside / "about.json", about(opened, pairs, features) | facts)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    tell(f"{out}: {size / 2**20:.1f} MiB")


def pairs_of(opened: Pipeline, cutoffs: list[datetime]) -> list[Pair]:
    """Return train and test cutoffs, in order.

    Raises:
        PipelineError: if the data do not reach from before a train cutoff through a label window.
    """
    span = events_span(opened.storage)
    horizon = timedelta(days=opened.preset.tasks.horizon_days)
    for cutoff in cutoffs:
        if cutoff + horizon > span.known_through or cutoff - horizon <= span.first_event_at:
            raise PipelineError(
                f"The windows of the cutoff {cutoff:%Y-%m-%d} are not all in the data, which run "
                f"from {span.first_event_at:%Y-%m-%d} to {span.known_through:%Y-%m-%d}.",
                f"Labels take {horizon.days} days after a cutoff, and its probes as many before.",
            )
    return [(cutoff - horizon, cutoff) for cutoff in sorted(cutoffs)]


def night(opened: Pipeline, earliest: datetime) -> EvaluationWindows:
    """Return windows whose train cutoff is the earliest: targets are those of its time."""
    tasks = opened.preset.tasks
    horizon, lookback = (timedelta(days=d) for d in (tasks.horizon_days, tasks.lookback_days))
    return EvaluationWindows(earliest, earliest, earliest, horizon, lookback)


def write_histories(
    opened: Pipeline, features: dict[datetime, Features], aside: Path, max_training_users: int
) -> dict[str, Any]:
    """Write the vocabulary and the histories of judged and of training users; return facts."""
    tell("sequences")
    storage, settings = opened.storage, opened.settings
    earliest, last = min(features), max(features)
    ignored = opened.preset.ignored_event_types
    vocabulary = build_vocabulary(storage, settings, ignored, earliest)
    save_vocabulary(vocabulary, aside / "vocabulary")
    folder = storage.scratch / "histories"
    uncut = settings.model_copy(update={"max_sequence_events": UNCUT})
    write_sequences(storage, uncut, vocabulary, last, folder)
    histories = read_histories(folder)
    bound, training = training_digest(histories, earliest, max_training_users)
    judged = {user for each in features.values() for user in each.population.user_ids.to_pylist()}
    is_kept = [user in judged or digest(user) <= bound for user in ids_of(histories)]
    kept = histories.filter(pa.array(is_kept))
    write(aside / SEQUENCES_FILE, kept)
    return {
        "training_digest": bound,
        "training_users": min(training, max_training_users),
        "users_with_events_before_training_ends": training,
        "users": len(kept),
        "events": pc.sum(kept["num_events"]).as_py(),
        "max_events": MAX_EVENTS,
    }


def read_histories(folder: Path) -> pa.Table:
    """Return all histories, in order of users."""
    chunks = [chunk for file in sequence_files(folder) for chunk in read_bucket(file, CHUNK_USERS)]
    return pa.concat_tables(chunks).sort_by("user_id")


def training_digest(histories: pa.Table, earliest: datetime, most: int) -> tuple[str, int]:
    """Return the MD5 up to which users train, and how many have an event before `earliest`."""
    past = cut(histories, earliest, 1)
    digests = sorted(map(digest, ids_of(past.filter(pc.greater(past["num_events"], 0)))))
    return (digests[most - 1] if len(digests) > most else EVERYONE), len(digests)


def narrow(table: pa.Table) -> pa.Table:
    """Return numbers in single precision: what travels to another machine should be small."""
    return pa.table(
        {name: table[name].cast(pa.float32(), safe=False) for name in table.column_names}
    )


def about(
    opened: Pipeline, pairs: list[Pair], features: dict[datetime, Features]
) -> dict[str, Any]:
    """Return what the figures' lines say of the data."""
    tasks = opened.preset.tasks
    return {
        "source": opened.preset.name,
        "propensity_column": tasks.propensity_column,
        "pairs": [[moment.isoformat() for moment in pair] for pair in pairs],
        "trained_through": min(features).isoformat(),
        "horizon_days": tasks.horizon_days,
        "lookback_days": tasks.lookback_days,
        "judged_users": {day_of(m): len(f.population) for m, f in features.items()},
        "population": {day_of(m): f.population.num_users for m, f in features.items()},
    }


def with_column(opened: Pipeline, column: str | None) -> Pipeline:
    """Return the pipeline with another column whose most frequent values are the targets."""
    if column is None:
        return opened
    preset = opened.preset
    tasks = type(preset.tasks).model_validate(
        preset.tasks.model_dump() | {"propensity_column": column}
    )
    return replace(opened, preset=preset.model_copy(update={"tasks": tasks}))


def prepare_in_home(given: argparse.Namespace, source: str, path: str, cutoffs: str) -> None:
    """Prepare one data set in a home that is removed in the end."""
    home = Path(tempfile.mkdtemp(prefix="quality-"))
    try:
        opened = open_pipeline(
            source=source, path=path, data_root=home, threads=given.threads,
            max_probe_users=given.max_users, num_targets=given.num_targets,
        )  # fmt: skip
        opened = with_column(opened, given.propensity_column)
        out = given.out / source if given.all else given.out
        prepare(
            opened, [parse_cutoff(each) for each in cutoffs.split(",")], out.absolute(),
            given.max_training_users,
        )  # fmt: skip
    finally:
        shutil.rmtree(home, ignore_errors=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="name of a preset, or path of one")
    parser.add_argument("--path", help="raw events")
    parser.add_argument("--cutoffs", help="test cutoffs, YYYY-MM-DD with commas between them")
    parser.add_argument(
        "--all",
        type=Path,
        metavar="FOLDER",
        help="all known data sets, whose files are there; those in --out stay as they are",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that is written")
    parser.add_argument("--propensity-column", help="instead of the preset's")
    parser.add_argument("--num-targets", type=int, default=15)
    parser.add_argument("--max-users", type=int, default=8000, help="judged at a cutoff")
    parser.add_argument("--max-training-users", type=int, default=60_000)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    if not given.all and not (given.source and given.path and given.cutoffs):
        parser.error("give --source, --path and --cutoffs, or --all")
    return given


def main(arguments: list[str] | None = None) -> None:
    """Prepare from the command line."""
    given = parse(arguments)
    try:
        if not given.all:
            prepare_in_home(given, given.source, given.path, given.cutoffs)
        for source, (file, cutoffs) in KNOWN.items() if given.all else ():
            if not (given.out / source).is_dir():  # which is written as a whole or not at all
                prepare_in_home(given, source, str(given.all / file), cutoffs)
    except PipelineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
