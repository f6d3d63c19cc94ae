"""Sequence Parquet files as flat numpy arrays, straight from Arrow's buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behavior_pipeline.contracts import SEQUENCES, TOKEN_FIELDS
from behavior_pipeline.encoder.history import BEFORE, DECAY_DAYS, VISIT_GAP_DAYS
from behavior_pipeline.errors import PipelineError

MICROSECONDS_A_DAY: Final = 86_400_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LIST_COLUMNS: Final = (*(f"{field}_ids" for field in TOKEN_FIELDS), "gap_seconds", "occurred_at")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SequenceTable:
    """Some users' sequences; user i's events are `[offsets[i], offsets[i + 1])` of the flat arrays.

    Attributes:
        user_ids: Arrow strings, N.
        offsets: N + 1.
        ids: token ids per field, flat int32.
        gap_days: days since the event before, flat float32.
        times: microseconds since 1970 in UTC, flat int64.
        num_events: length of the whole history, also where the list is cut, N.
        first_times: microseconds of the very first event, N; 0 for an empty history.
        cutoffs: microseconds of the observation cutoff, N.
        visits: visits begun before each flat place and since the start of its list, flat int64.
    """

    user_ids: pa.Array
    offsets: Ints
    ids: dict[str, NDArray[np.int32]]
    gap_days: NDArray[np.float32]
    times: Ints
    num_events: Ints
    first_times: Ints
    cutoffs: Ints
    visits: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Events in each list, N."""
        return np.diff(self.offsets)

    def before(self, users: Ints, starts: Ints) -> NDArray[np.float32]:
        """Return what came before the flat places `starts` of `users`, (n, len(BEFORE)).

        A list that was cut says nothing of the visits before it; they count as one, of unknown
        time.
        """
        first, end = self.offsets[users], self.offsets[users + 1]
        if not len(self.times):
            return np.zeros((len(users), len(BEFORE)), np.float32)
        safe = np.minimum(starts, len(self.times) - 1)
        num_events = self.num_events[users] - (end - starts)
        is_cut = self.num_events[users] > end - first
        days = (self.times[safe] - self.first_times[users]) / MICROSECONDS_A_DAY
        counts = np.stack((num_events, days, self.visits[safe] + is_cut), 1)
        rows, places = places_between(first, safe)
        gaps = self._gaps_at(rows, places, len(users))
        columns = np.hstack((counts, gaps, self._decayed(rows, places, safe)))
        return np.where((starts < end)[:, None], columns, 0).astype(np.float32)

    def _gaps_at(self, rows: Ints, places: Ints, num_rows: int) -> NDArray[np.float64]:
        """Return number, sum and sum of squares of log(1 + gap), and longest, of visits' gaps."""
        is_gap = self.gap_days[places] >= VISIT_GAP_DAYS
        rows, gaps = rows[is_gap], self.gap_days[places[is_gap]].astype(np.float64)
        logs, longest = np.log1p(gaps), np.zeros(num_rows)
        np.maximum.at(longest, rows, gaps)
        sums = [np.bincount(rows, each, num_rows) for each in (np.ones(len(logs)), logs, logs**2)]
        return np.stack((*sums, longest), 1)

    def _decayed(self, rows: Ints, places: Ints, starts: Ints) -> NDArray[np.float64]:
        """Return the visits at places of rows, decayed as of the place where each row starts."""
        is_visit = self.visits[places + 1] > self.visits[places]
        rows, places = rows[is_visit], places[is_visit]
        ago = (self.times[starts][rows] - self.times[places]) / MICROSECONDS_A_DAY
        return np.stack(
            [np.bincount(rows, np.exp(-ago / days), len(starts)) for days in DECAY_DAYS], 1
        )

    def silence_days(self, users: Ints) -> NDArray[np.float32]:
        """Return the days from users' last events to their cutoffs, (n,); 0 without an event."""
        if not len(self.times):
            return np.zeros(len(users), np.float32)
        last = self.times[np.maximum(self.offsets[users + 1] - 1, 0)]
        days = (self.cutoffs[users] - last) / MICROSECONDS_A_DAY
        return np.where(self.lengths[users] > 0, days, 0).astype(np.float32)

    def take(self, users: Ints) -> SequenceTable:
        """Return some of the users, in the order given."""
        offsets = np.concatenate(([0], np.cumsum(self.lengths[users])))
        _, source = places_between(self.offsets[users], self.offsets[users + 1])
        return SequenceTable(
            user_ids=self.user_ids.take(pa.array(users)),
            offsets=offsets,
            ids={name: values[source] for name, values in self.ids.items()},
            gap_days=self.gap_days[source],
            times=self.times[source],
            num_events=self.num_events[users],
            first_times=self.first_times[users],
            cutoffs=self.cutoffs[users],
            visits=self.visits[source],
        )

    def followed_by(self, other: SequenceTable) -> SequenceTable:
        """Return the users of both tables."""

        def join(name: str) -> Any:
            return np.concatenate((getattr(self, name), getattr(other, name)))

        names = ("gap_days", "times", "num_events", "first_times", "cutoffs", "visits")
        return SequenceTable(
            user_ids=pa.concat_arrays([self.user_ids, other.user_ids]),
            offsets=np.concatenate((self.offsets, self.offsets[-1] + other.offsets[1:])),
            ids={name: np.concatenate((self.ids[name], other.ids[name])) for name in self.ids},
            **{name: join(name) for name in names},
        )


def places_between(begins: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Return of every flat place in the runs [begin, end) which run it is in, and the place."""
    counts = np.maximum(ends - begins, 0)
    rows = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return rows, np.arange(len(rows)) + (begins - before)[rows]


def first_at_or_after(times: Ints, offsets: Ints, users: Ints, moments: Ints) -> Ints:
    """Return the flat place (N,) of each user's first event at or after a moment (N,).

    Binary search in all lists at once: as many passes as the longest list has binary digits.
    """
    low, high = offsets[users].copy(), offsets[users + 1].copy()
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_before = is_open & (times[np.minimum(middle, len(times) - 1)] < moments)
        low = np.where(is_before, middle + 1, low)
        high = np.where(is_open & ~is_before, middle, high)
    return low


def read_table(table: pa.Table, origin: str) -> SequenceTable:
    """Read an Arrow table of the SEQUENCES contract; `origin` names it in messages.

    Raises:
        PipelineError: if a column is missing, or the lists of a row differ in length.
    """
    missing = [name for name in SEQUENCES.schema.names if name not in table.column_names]
    if missing:
        raise PipelineError(f"{origin} is no sequence file: it lacks {', '.join(missing)}.")
    lists = {name: _flat_list(table, name) for name in _LIST_COLUMNS}
    lengths = lists["action_ids"][0]
    for name, (other, _) in lists.items():
        if not np.array_equal(other, lengths):
            raise PipelineError(f"{origin}: the lists of {name} and action_ids differ in length.")
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    gap_days = (lists["gap_seconds"][1] / 86_400).astype(np.float32)
    num_events = _integers(table, "num_events")
    return SequenceTable(
        user_ids=table["user_id"].combine_chunks(),
        offsets=offsets,
        ids={field: lists[f"{field}_ids"][1] for field in TOKEN_FIELDS},
        gap_days=gap_days,
        times=lists["occurred_at"][1],
        num_events=num_events,
        first_times=_integers(table, "first_event_at"),
        cutoffs=_integers(table, "observation_cutoff"),
        visits=_visits_before(gap_days, offsets, num_events),
    )


def _flat_list(table: pa.Table, name: str) -> tuple[Ints, NDArray[Any]]:
    """Return a list column's lengths and flat values; null lists are empty."""
    column = table[name].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    values = column.flatten()
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    return lengths.astype(np.int64), values.to_numpy(zero_copy_only=False)


def _integers(table: pa.Table, name: str) -> Ints:
    """Return a numeric or timestamp column as int64 (microseconds for a time), nulls as 0."""
    column = table[name].combine_chunks()
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz="UTC"))
    values: Ints = pc.fill_null(column.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
    return values


def _visits_before(gap_days: NDArray[np.float32], offsets: Ints, num_events: Ints) -> Ints:
    """Count, for each flat place, the visits begun in its list before it."""
    begins = gap_days >= VISIT_GAP_DAYS
    lengths = np.diff(offsets)
    is_whole = (lengths > 0) & (lengths == num_events)
    begins[offsets[:-1][is_whole]] = True
    running = np.concatenate(([0], np.cumsum(begins)))
    visits: Ints = running[:-1] - np.repeat(running[offsets[:-1]], lengths)
    return visits


def sequence_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a folder in order of name.

    Raises:
        PipelineError: if there is none.
    """
    files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    if not files:
        raise PipelineError(f"There is no sequence file (*.parquet) in {folder}.")
    return files


def read_in_order(files: Sequence[Path], chunk_users: int) -> Iterator[SequenceTable]:
    """Yield the users of files in order, at most `chunk_users` at a time."""
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=chunk_users):
                yield read_table(pa.Table.from_batches([batch]), str(path))


def read_shuffled(
    files: Sequence[Path], chunk_users: int, random: np.random.Generator
) -> Iterator[SequenceTable]:
    """Yield all users once, row groups in random order, about `chunk_users` or more at a time.

    Users inside a chunk keep the order of the files; whoever makes batches shuffles them.
    """
    groups = [(path, group) for path in files for group in range(_num_row_groups(path))]
    waiting: list[pa.Table] = []
    for index in random.permutation(len(groups)):
        path, group = groups[index]
        with pq.ParquetFile(path) as file:
            waiting.append(file.read_row_group(group))
        if sum(map(len, waiting)) >= chunk_users:
            yield read_table(pa.concat_tables(waiting), str(path.parent))
            waiting = []
    if waiting:
        yield read_table(pa.concat_tables(waiting), str(files[0].parent))


def _num_row_groups(path: Path) -> int:
    """Return the number of row groups of a Parquet file."""
    return int(pq.read_metadata(path).num_row_groups)


@dataclass(frozen=True)
class Survey:
    """What a folder of training sequences holds.

    Attributes:
        num_users: users with at least one event.
        num_events: events in their lists.
        started_at: time of the first event.
        trained_through: the cutoff of all sequences: every event is before it.
        vocabulary_id: the vocabulary of all sequences.
    """

    num_users: int
    num_events: int
    started_at: datetime
    trained_through: datetime
    vocabulary_id: str


def survey(files: Sequence[Path]) -> Survey:
    """Look at the scalar columns of sequence files without reading a list.

    Raises:
        PipelineError: if no user has an event, the files mix cutoffs or vocabularies, or an event
            is not before its cutoff.
    """
    columns = [
        "num_events", "first_event_at", "last_event_at", "observation_cutoff", "vocabulary_id",
    ]  # fmt: skip
    table = pa.concat_tables(pq.read_table(path, columns=columns) for path in files)
    table = table.filter(pc.greater(table["num_events"], 0))
    if not len(table):
        raise PipelineError(f"No user in {files[0].parent} has an event.")
    for name in ("observation_cutoff", "vocabulary_id"):
        if (found := pc.count_distinct(table[name]).as_py()) != 1:
            raise PipelineError(
                f"The sequences in {files[0].parent} have {found} values of {name}.",
                "Write them all for one cutoff, with one vocabulary.",
            )
    if pc.any(pc.greater_equal(table["last_event_at"], table["observation_cutoff"])).as_py():
        raise PipelineError(
            f"A sequence in {files[0].parent} has an event at or after its observation cutoff.",
            "Write the sequences again.",
        )
    return Survey(
        num_users=len(table),
        num_events=pc.sum(table["num_events"]).as_py(),
        started_at=to_datetime(pc.min(table["first_event_at"]).cast(pa.int64()).as_py()),
        trained_through=to_datetime(table["observation_cutoff"][0].cast(pa.int64()).as_py()),
        vocabulary_id=table["vocabulary_id"][0].as_py(),
    )


def to_datetime(microseconds: int) -> datetime:
    """Return microseconds since 1970 as a time in UTC, exactly."""
    return _EPOCH + timedelta(microseconds=microseconds)


def to_microseconds(moment: datetime) -> int:
    """Return a time as microseconds since 1970, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)
