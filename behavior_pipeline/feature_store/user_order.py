"""Users of several sorted files as one stream in the order of their ids.

An index that is written in its own order grows at its end. In any other order, most of its pages
are read, changed and written again with every batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc


def in_user_order(sources: Sequence[Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of all sources in the order of `user_id`.

    Args:
        sources: batches with the column `user_id`, each source in its order. One that is not in
            order loses no row, but the order.

    Yields:
        Batches that hold no more rows than the sources' batches together.
    """
    heads = {number: head for number, source in enumerate(sources) if (head := _next(source))}
    while heads:
        bound = min(head.column("user_id")[-1].as_py() for head in heads.values())
        parts = []
        for number, head in list(heads.items()):
            taken = pc.sum(pc.less_equal(head.column("user_id"), bound)).as_py()
            parts.append(head.slice(0, taken))
            rest = head.slice(taken) if taken < head.num_rows else _next(sources[number])
            heads[number] = rest
            if rest is None:
                del heads[number]
        parts = [part for part in parts if part.num_rows]
        yield parts[0] if len(parts) == 1 else _sorted(pa.Table.from_batches(parts))


def _next(source: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    """Return the next batch that has rows, in order; None after the last."""
    for batch in source:
        if batch.num_rows:
            users = batch.column("user_id")
            is_in_order = pc.all(pc.less_equal(users[:-1], users[1:])).as_py()
            return batch if is_in_order else _sorted(pa.Table.from_batches([batch]))
    return None


def _sorted(rows: pa.Table) -> pa.RecordBatch:
    """Return rows in the order of users, as one batch."""
    batch = rows.combine_chunks().to_batches()[0]  # taking vectors out of chunks is slow
    return batch.take(pc.sort_indices(batch.column("user_id")))
