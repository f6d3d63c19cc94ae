"""Similar users: time, memory, recall and queries a second, on real and on made-up embeddings.

python benchmarks/similar_users.py [--users 1000000] [--width 256] [--home data/online_retail_ii]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from figures import measured, publish

from behavior_pipeline.contracts import embedding_schema
from behavior_pipeline.embeddings.exact_neighbors import exact_neighbors
from behavior_pipeline.embeddings.neighbor_index import NeighborIndex
from behavior_pipeline.embeddings.neighbor_vectors import EmbeddingFolder
from behavior_pipeline.embeddings.similar_users import find_similar_users
from behavior_pipeline.settings import load_settings
from behavior_pipeline.storage import Storage

CUTOFF = datetime(2011, 11, 9, tzinfo=UTC)
BUCKETS = 8
GROUPS = 300  # made-up users lie around so many centres,
DIRECTIONS = 48  # in so many directions, and a little beside them
QUERIES = 50
EXACT_QUERIES = 10  # of these, held against everyone
NUM = 10


def main() -> None:
    """Measure what was asked for, or be the child whose memory is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--home", type=Path, help="a home with embeddings, which is only read")
    parser.add_argument("--scratch", type=Path, help="where made-up embeddings go")
    parser.add_argument("--keep", action="store_true", help="keep the lines in results/")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        print(json.dumps(build(options.build, options.threads)))
        return
    lines = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        if options.home:
            storage = Storage(Path(folder) / "real")
            source = max((options.home / "embeddings").glob("cutoff=*"))
            storage.embeddings(CUTOFF).parent.mkdir(parents=True)
            storage.embeddings(CUTOFF).symlink_to(source.resolve(), target_is_directory=True)
            lines += figures("real", storage, options.threads)
        if options.users:
            storage = Storage(Path(folder) / "made")
            make_embeddings(storage.embeddings(CUTOFF), options.users, options.width)
            lines += figures(f"{options.users}x{options.width}", storage, options.threads)
    publish("similar_users", lines, is_kept=options.keep)


def make_embeddings(folder: Path, num_users: int, width: int) -> None:
    """Write made-up embeddings: groups of users, each in a few directions, with noise."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    basis = chance.standard_normal((DIRECTIONS, width)).astype(np.float32)
    centers = chance.standard_normal((GROUPS, DIRECTIONS)).astype(np.float32)
    schema = embedding_schema(width)
    for bucket in range(BUCKETS):
        with pq.ParquetWriter(folder / f"bucket={bucket:03d}.parquet", schema) as writer:
            for start in range(bucket, num_users, BUCKETS * 8192):
                numbers = np.arange(start, min(start + BUCKETS * 8192, num_users), BUCKETS)
                writer.write_table(_made(numbers, basis, centers, chance, schema))


def _made(
    numbers: np.ndarray,
    basis: np.ndarray,
    centers: np.ndarray,
    chance: np.random.Generator,
    schema: pa.Schema,
) -> pa.Table:
    """Return the embeddings of some users."""
    places = centers[chance.integers(0, GROUPS, len(numbers))]
    places = places + chance.standard_normal(places.shape, np.float32)
    vectors = places @ basis + 0.5 * chance.standard_normal(
        (len(numbers), basis.shape[1]), np.float32
    )
    columns = {
        "user_id": pa.array([f"u{number:09d}" for number in numbers]),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), basis.shape[1]),
        "num_events": pa.array(numbers + 1),
    }
    constant = {
        "observation_cutoff": CUTOFF,
        "checkpoint_id": "made-up",
        "last_event_at": CUTOFF,
        "is_cold_start": False,
        "written_at": CUTOFF,
    }
    columns |= {
        name: pa.repeat(pa.scalar(value, schema.field(name).type), len(numbers))
        for name, value in constant.items()
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def build(home: Path, threads: int) -> dict[str, float]:
    """Find everybody's neighbours; return seconds, peak memory and the measured recall."""
    settings = load_settings(threads=threads)
    started, cpu_started = time.perf_counter(), time.process_time()
    summary = find_similar_users(Storage(home), settings, CUTOFF, CUTOFF)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "recall": summary.facts.recall,
        "users": summary.num_users,
    }


def figures(name: str, storage: Storage, threads: int) -> list[dict[str, object]]:
    """Measure the build in a process of its own, then some queries."""
    command = [sys.executable, __file__, "--build", str(storage.home), "--threads", str(threads)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    built = json.loads(run.stdout.splitlines()[-1])
    more = {"users": built["users"], "threads": threads}
    return [
        measured(f"similar_users_seconds_{name}", built["seconds"], "s", **more),
        measured(f"similar_users_cpu_seconds_{name}", built["cpu_seconds"], "s", **more),
        measured(f"similar_users_peak_gb_{name}", built["peak_gb"], "GB", **more),
        measured(f"similar_users_recall_at_20_{name}", built["recall"], "share", **more),
        *query_figures(name, storage, more),
    ]


def query_figures(name: str, storage: Storage, more: dict[str, object]) -> list[dict[str, object]]:
    """Measure the index and the published rows against comparing with everyone."""
    folder = storage.similar_users(CUTOFF)
    rows = pq.read_table(folder / "similar_users.parquet").slice(0, QUERIES * 100)
    step = max(len(rows) // QUERIES, 1)
    chosen = rows.take(list(range(0, len(rows), step))[:QUERIES]).to_pylist()
    index, embeddings = NeighborIndex(folder), EmbeddingFolder.open(storage.embeddings(CUTOFF))
    started = time.perf_counter()
    answers = [index.search(row["user_id"], NUM) or [] for row in chosen]
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    truth = [
        exact_neighbors(embeddings, row["user_id"], NUM) or [] for row in chosen[:EXACT_QUERIES]
    ]
    exact_seconds = time.perf_counter() - started
    true = [{user for user, _ in found} for found in truth]
    by_index = [{user for user, _ in found} for found in answers]
    published = [set(row["similar_user_ids"][:NUM]) for row in chosen]
    shares = [
        float(np.mean([len(a & b) / len(b) for a, b in zip(held, true, strict=False)]))
        for held in (published, by_index)
    ]
    return [
        measured(f"similar_users_recall_at_10_{name}", shares[0], "share", **more),
        measured(f"similar_users_index_recall_at_10_{name}", shares[1], "share", **more),
        measured(f"similar_users_index_queries_{name}", len(chosen) / seconds, "1/s", **more),
        measured(
            f"similar_users_exact_queries_{name}", EXACT_QUERIES / exact_seconds, "1/s", **more
        ),
    ]


if __name__ == "__main__":
    main()
