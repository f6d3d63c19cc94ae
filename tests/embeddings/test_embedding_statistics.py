from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sequence_builders import CUTOFF

from behavior_pipeline.contracts import COLD_START_USER, embedding_schema
from behavior_pipeline.embeddings import statistics
from behavior_pipeline.embeddings.statistics import summarize_embeddings
from behavior_pipeline.errors import PipelineError


def write(path: Path, vectors: np.ndarray, **columns: object) -> None:
    rows = [
        {
            "user_id": f"{path.stem}-{number}",
            "observation_cutoff": CUTOFF,
            "embedding": vector.astype(np.float32),
            "checkpoint_id": "one",
            "is_cold_start": False,
            **columns,
        }
        for number, vector in enumerate(vectors)
    ]
    schema = embedding_schema(vectors.shape[1])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def test_figures_of_a_small_folder_worked_out_by_hand(tmp_path: Path):
    # Variance in two directions, equally much; the third agrees for all.
    write(tmp_path / "a.parquet", np.array([[3.0, 4, 0], [-3, -4, 0]]))
    write(tmp_path / "b.parquet", np.array([[4.0, -3, 0], [-4, 3, 0]]), is_cold_start=True)
    reserved = {"user_id": COLD_START_USER, "checkpoint_id": "z"}
    write(tmp_path / "prior.parquet", np.full((1, 3), 99.0), **reserved)
    found = summarize_embeddings(tmp_path)
    assert (found.num_users, found.num_cold_start) == (4, 2)
    assert (found.num_not_finite, found.num_zero_vectors) == (0, 0)
    assert found.constant_columns == (2,)
    assert set(found.norm_quantiles.values()) == {5.0}
    assert found.effective_rank == pytest.approx(2)
    assert found.checkpoint_ids == ("one", "z")
    assert found.cutoffs == (CUTOFF,)


def test_faults_are_counted(tmp_path: Path):
    vectors = np.array([[0.0, 0], [np.nan, 1], [1, np.inf], [1, 1]])
    write(tmp_path / "a.parquet", vectors)
    found = summarize_embeddings(tmp_path)
    assert (found.num_users, found.num_not_finite, found.num_zero_vectors) == (4, 2, 1)
    assert found.norm_quantiles[1.0] == pytest.approx(2**0.5)
    assert found.effective_rank == pytest.approx(1)


def test_equal_vectors_have_no_rank(tmp_path: Path):
    write(tmp_path / "a.parquet", np.full((5, 3), 0.1))
    found = summarize_embeddings(tmp_path)
    assert found.effective_rank == 0
    assert found.constant_columns == (0, 1, 2)


def test_chunks_give_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vectors = np.random.default_rng(1).normal(50, [0.1, 1, 2, 3], size=(40, 4))
    write(tmp_path / "a.parquet", vectors[:25])
    write(tmp_path / "b.parquet", vectors[25:])
    monkeypatch.setattr(statistics, "_CHUNK_USERS", 7)
    found = summarize_embeddings(tmp_path)
    spectrum = np.linalg.eigvalsh(np.cov(vectors.astype(np.float32), rowvar=False))
    shares = spectrum / spectrum.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    norms = np.linalg.norm(vectors, axis=1)
    assert found.norm_quantiles[0.5] == pytest.approx(np.median(norms))


def test_an_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(PipelineError, match="no embeddings in"):
        summarize_embeddings(tmp_path)
