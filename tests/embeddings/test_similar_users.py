from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_builders import NOVEMBER, OCTOBER, write_embeddings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from behavior_pipeline.cli import app
from behavior_pipeline.contracts import COLD_START_USER, SIMILAR_USERS
from behavior_pipeline.embeddings import neighbor_search, neighbor_vectors, similar_users
from behavior_pipeline.embeddings.exact_neighbors import exact_neighbors
from behavior_pipeline.embeddings.neighbor_index import NeighborIndex, read_facts
from behavior_pipeline.embeddings.neighbor_vectors import EmbeddingFolder
from behavior_pipeline.embeddings.similar_to import similar_to
from behavior_pipeline.embeddings.similar_users import find_similar_users
from behavior_pipeline.encoder.live import LIVE, point_to
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

WIDTH = 8


def names_of(number: int) -> list[str]:
    return [f"user-{place:04d}" for place in range(number)]


def grouped(number: int, seed: int = 0) -> np.ndarray:
    """Vectors (number, WIDTH) around a few centres."""
    chance = np.random.default_rng(seed)
    centers = chance.standard_normal((6, WIDTH))
    noise = 0.3 * chance.standard_normal((number, WIDTH))
    return (centers[chance.integers(0, 6, number)] + noise).astype(np.float32)


def brute_force(users: list[str], vectors: np.ndarray, num: int) -> dict[str, list[str]]:
    """Every user's nearest others by a loop; a vector of zeros has no direction."""
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    near = {}
    for row, user in enumerate(users):
        others = [
            (-round(float(exact[row] @ exact[other] / lengths[row] / lengths[other]), 5), name)
            for other, name in enumerate(users)
            if other != row and lengths[other] and lengths[row]
        ]
        near[user] = [name for _, name in sorted(others)[:num]]
    return near


def find(storage: Storage, settings: Settings, **changes: object) -> dict[str, dict[str, object]]:
    find_similar_users(storage, settings.model_copy(update=changes), NOVEMBER, NOVEMBER)
    table = pq.read_table(storage.similar_users(NOVEMBER) / "similar_users.parquet")
    assert table.schema.equals(SIMILAR_USERS.schema)
    return {row["user_id"]: row for row in table.to_pylist()}


@hypothesis_settings(max_examples=30)
@given(
    vectors=st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=1, max_size=24),
    num=st.integers(1, 6),
    block=st.integers(1, 7),
)
def test_it_equals_a_loop_with_ties_by_id(
    tmp_path_factory: pytest.TempPathFactory, vectors: list[list[int]], num: int, block: int
):
    """Small whole numbers: many equal vectors, many equal angles, some vectors of zeros."""
    storage = Storage(tmp_path_factory.mktemp("ties"))
    users = names_of(len(vectors))
    values = np.array(vectors, np.float32)
    write_embeddings(storage, NOVEMBER, users, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbor_vectors, "BLOCK_VECTORS", block)
        patch.setattr(neighbor_search, "CANDIDATE_VECTORS", 2 * block)
        patch.setattr(neighbor_search, "QUERY_VECTORS", 3)
        patch.setattr(neighbor_search, "MARGIN", 0)
        patch.setattr(similar_users, "EXPANDED_USERS", 2)
        rows = find(storage, Settings(threads=1), num_similar_users=num)
    units = values / np.maximum(np.linalg.norm(values, axis=1), 1e-9)[:, None]
    cosines = units @ units.T
    has_neighbors = values.any(axis=1)
    for row, user in enumerate(users):
        found = [users.index(name) for name in rows[user]["similar_user_ids"]]
        stated = rows[user]["similarities"]
        others = [other for other in np.flatnonzero(has_neighbors) if other != row]
        if not has_neighbors[row]:
            assert found == stated == []
            continue
        best = sorted((cosines[row, other] for other in others), reverse=True)[:num]
        assert np.allclose(stated, best, atol=1e-6)
        assert np.allclose(stated, cosines[row, found], atol=1e-6)
        ranked = list(zip([-cosine for cosine in stated], found, strict=True))
        assert ranked == sorted(set(ranked))  # equal cosines are in the order of the ids
        for other in found:  # of equal vectors, those with the smallest ids
            equals = [one for one in others if (values[one] == values[other]).all()]
            assert all(one in found for one in equals if one < other)


def test_equal_vectors_are_ordered_by_id_and_never_name_the_user(
    storage: Storage, settings: Settings
):
    users = names_of(40)
    values = np.repeat(grouped(2), 20, axis=0)  # two vectors, twenty users each
    write_embeddings(storage, NOVEMBER, users, values)
    rows = find(storage, settings, num_similar_users=5)
    assert rows[users[0]]["similar_user_ids"] == users[1:6]
    assert rows[users[3]]["similar_user_ids"] == [*users[:3], *users[4:6]]
    assert rows[users[19]]["similar_user_ids"] == users[:5]
    assert rows[users[30]]["similar_user_ids"] == users[20:25]


def test_cold_users_have_no_neighbours_and_are_nobodys(storage: Storage, settings: Settings):
    users = names_of(12)
    write_embeddings(storage, NOVEMBER, users, grouped(12))
    path = storage.embeddings(NOVEMBER) / "bucket=1.parquet"
    table = pq.read_table(path)
    assert COLD_START_USER not in table["user_id"].to_pylist()
    is_cold = pa.array([True] + [False] * (table.num_rows - 1))
    at = table.column_names.index("is_cold_start")
    pq.write_table(table.set_column(at, "is_cold_start", is_cold), path)
    cold = table["user_id"][0].as_py()
    rows = find(storage, settings)
    assert rows[cold]["similar_user_ids"] == rows[cold]["similarities"] == []
    assert sorted(rows) == users
    named = {name for row in rows.values() for name in row["similar_user_ids"]}
    assert named == set(users) - {cold, COLD_START_USER}
    assert all(len(row["similar_user_ids"]) == 10 for user, row in rows.items() if user != cold)
    assert similar_to(storage, cold, 3).neighbors == []
    assert similar_to(storage, cold, 3, is_exact=True).neighbors == []
    assert similar_to(storage, cold, 99).neighbors == []


def test_one_user_alone_has_a_row_without_neighbours(storage: Storage, settings: Settings):
    write_embeddings(storage, NOVEMBER, ["ada"], grouped(1))
    assert find(storage, settings)["ada"]["similar_user_ids"] == []


@pytest.mark.parametrize("most_exact", [10_000, 1], ids=["exact", "approximate"])
def test_the_same_bytes_again_and_with_more_threads(
    storage: Storage, settings: Settings, most_exact: int
):
    write_embeddings(storage, NOVEMBER, names_of(1_500), grouped(1_500))
    seen = []
    for threads in (1, 1, 2):
        find(storage, settings, max_exact_similar_users=most_exact, threads=threads)
        folder = storage.similar_users(NOVEMBER)
        seen.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert seen[0] == seen[1] == seen[2]
    assert sorted(seen[0]) == [
        "index.faiss",
        "index.json",
        "similar_users.parquet",
        "users.parquet",
    ]


def test_how_users_lie_in_files_changes_nothing(storage: Storage, settings: Settings):
    users, values = names_of(300), grouped(300)
    write_embeddings(storage, NOVEMBER, users, values, num_buckets=3)
    first = find(storage, settings)
    for path in storage.embeddings(NOVEMBER).iterdir():
        path.unlink()
    write_embeddings(storage, NOVEMBER, users, values, num_buckets=7)
    assert find(storage, settings) == first


def test_the_likeliest_lists_hold_most_and_the_recall_is_measured(
    storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    users, values = names_of(1_200), grouped(1_200)
    write_embeddings(storage, NOVEMBER, users, values)
    truth = find(storage, settings)
    monkeypatch.setattr(similar_users, "NUM_PROBES", 6)
    rows = find(storage, settings, max_exact_similar_users=1_000)
    facts = read_facts(storage.similar_users(NOVEMBER))
    held = [
        len(set(rows[user]["similar_user_ids"]) & set(truth[user]["similar_user_ids"])) / 20
        for user in users
    ]
    assert not facts.is_exact
    assert 0.5 < facts.recall < 1
    assert abs(facts.recall - np.mean(held)) < 0.05


@pytest.mark.parametrize("most_exact", [10_000, 1], ids=["exact", "approximate"])
def test_the_index_answers_for_more_than_is_published(
    storage: Storage, settings: Settings, most_exact: int
):
    users = names_of(500)
    write_embeddings(storage, NOVEMBER, users, grouped(500))
    find(storage, settings, max_exact_similar_users=most_exact)
    index = NeighborIndex(storage.similar_users(NOVEMBER))
    folder = EmbeddingFolder.open(storage.embeddings(NOVEMBER))
    for user in users[::50]:
        found, exact = index.search(user, 40), exact_neighbors(folder, user, 40)
        assert found is not None
        assert exact is not None
        shared = {name for name, _ in found} & {name for name, _ in exact}
        assert len(shared) >= (40 if most_exact > 1 else 36)
        assert user not in shared
        close = [cosine for _, cosine in exact]
        assert np.allclose([cosine for _, cosine in found], close, atol=0.02)
    assert index.search("nobody", 3) is None


def test_the_number_of_threads_is_put_back(storage: Storage, settings: Settings):
    write_embeddings(storage, NOVEMBER, names_of(5), grouped(5))
    before = faiss.omp_get_max_threads()
    find(storage, settings, threads=before + 1)
    assert faiss.omp_get_max_threads() == before


def test_mixed_checkpoints_and_missing_embeddings_are_refused(storage: Storage, settings: Settings):
    with pytest.raises(PipelineError, match="There are no embeddings"):
        find(storage, settings)
    with pytest.raises(PipelineError, match="No similar users were found yet"):
        similar_to(storage, "ada", 3)
    write_embeddings(storage, NOVEMBER, names_of(9), grouped(9), checkpoints=["a", "b"])
    with pytest.raises(PipelineError, match="come from 2 checkpoints"):
        find(storage, settings)
    assert not storage.similar_users(NOVEMBER).exists()


def test_the_newest_cutoff_answers(storage: Storage, settings: Settings):
    for cutoff, seed in ((OCTOBER, 1), (NOVEMBER, 2)):
        write_embeddings(storage, cutoff, names_of(30), grouped(30, seed))
        find_similar_users(storage, settings, cutoff, cutoff)
    for num, is_exact in ((5, False), (5, True), (25, False)):
        found = similar_to(storage, "user-0007", num, is_exact=is_exact)
        assert found.facts.cutoff == "2011-11-09"
        truth = brute_force(names_of(30), grouped(30, 2), num)["user-0007"]
        assert [name for name, _ in found.neighbors] == truth
    with pytest.raises(PipelineError, match="The user 'nobody' has no embedding at 2011-11-09"):
        similar_to(storage, "nobody", 5)


def test_feast_serves_the_neighbours(storage: Storage, settings: Settings):
    write_embeddings(storage, NOVEMBER, names_of(30), grouped(30))
    rows = find(storage, settings)
    for view in ("user_embedding", "similar_users"):
        publish_view(storage, view, NOVEMBER)
    served = lookup(storage, "user-0003")
    expected = rows["user-0003"]
    assert served["similar_users__similar_user_ids"] == expected["similar_user_ids"]
    assert served["similar_users__similarities"] == expected["similarities"]
    assert served["similar_users__checkpoint_id"] == "checkpoint-a"
    assert lookup(storage, "nobody")["similar_users__similar_user_ids"] is None


def test_the_command_shows_them(settings: Settings, tmp_path: Path):
    home = Storage(tmp_path / "data" / "simulated")
    write_embeddings(home, NOVEMBER, names_of(30), grouped(30))
    find_similar_users(home, settings, NOVEMBER, NOVEMBER)
    place = ["--source", "simulated", "--data-root", str(tmp_path / "data")]
    for more in ([], ["--exact"], ["-k", "25"]):
        outcome = CliRunner().invoke(app, ["similar", "user-0001", *more, *place])
        assert outcome.exit_code == 0, outcome.output
    outcome = CliRunner().invoke(app, ["similar", "nobody", *place])
    assert outcome.exit_code == 2
    assert "has no embedding" in outcome.output


def test_after_a_promotion_the_lane_of_the_live_checkpoint_answers(
    storage: Storage, settings: Settings
):
    lane = storage.of_candidate("b")
    for place, checkpoint, seed in ((storage, "a", 1), (lane, "b", 2)):
        write_embeddings(place, NOVEMBER, names_of(30), grouped(30, seed), [checkpoint])
        find_similar_users(place, settings, NOVEMBER, NOVEMBER)
    for live, seed in (("a", 1), ("b", 2)):
        point_to(storage.checkpoints, LIVE, live)
        for is_exact in (False, True):
            found = similar_to(storage, "user-0007", 5, is_exact=is_exact)
            assert found.facts.checkpoint_id == live
            truth = brute_force(names_of(30), grouped(30, seed), 5)["user-0007"]
            assert [name for name, _ in found.neighbors] == truth
    point_to(storage.checkpoints, LIVE, "c")
    with pytest.raises(PipelineError, match="No similar users were found yet"):
        similar_to(storage, "user-0007", 5)
