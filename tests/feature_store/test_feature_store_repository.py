from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from feast import FeatureStore
from feature_store_builders import NOVEMBER, write_rfm

from behavior_pipeline.feature_store import repository
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import (
    LOCATION,
    definitions_folder,
    offline_folder,
    open_store,
)
from behavior_pipeline.settings import load_settings
from behavior_pipeline.storage import Storage


def test_definitions_are_applied_with_owner_and_description(storage: Storage):
    store = open_store(storage)
    views = {view.name: view for view in store.list_feature_views()}
    assert sorted(views) == [
        "similar_users", "user_embedding", "user_predictions", "user_rfm", "user_segment"
    ]  # fmt: skip
    services = {service.name for service in store.list_feature_services()}
    names = ("churn_model", "lookalikes", "personalization", "training_set", "user_profile")
    assert services == {*names, *(f"{name}_v1" for name in names)}
    things = [*views.values(), *store.list_feature_services(), *store.list_entities()]
    assert all(thing.description and thing.owner for thing in things if thing.name != "__dummy")


def test_every_view_reads_an_absolute_folder_of_its_home(storage: Storage):
    for view in open_store(storage).list_feature_views():
        expected = offline_folder(storage, view.name, 1).resolve()
        assert view.batch_source.path == str(expected)
        assert view.batch_source.timestamp_field == "observation_cutoff"
        assert view.batch_source.created_timestamp_column == "written_at"


def test_two_homes_in_one_process_stay_apart(tmp_path: Path):
    homes = [Storage(tmp_path / name) for name in ("a home", "b")]
    paths = {open_store(home).get_feature_view("user_rfm").batch_source.path for home in homes}
    assert paths == {str(home.feature_store / "offline" / "user_rfm") for home in homes}


def test_opening_leaves_environment_and_modules_alone(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(LOCATION, "/elsewhere")
    before, modules, path = dict(os.environ), set(sys.modules), list(sys.path)
    open_store(storage)
    assert dict(os.environ) == before
    assert sys.path == path
    assert not {"entities", "sources", "views", "services"} & (set(sys.modules) - modules)


def test_the_variable_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(LOCATION, "/elsewhere")
    load_settings()


def test_opening_again_applies_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    open_store(storage)
    registry = (storage.feature_store / "registry.db").read_bytes()
    monkeypatch.setattr(repository, "_apply", lambda _: pytest.fail("applied again"))
    open_store(storage)
    assert (storage.feature_store / "registry.db").read_bytes() == registry


@pytest.mark.parametrize("lost", ["registry.db", "online.db", "applied.json"])
def test_a_lost_file_is_made_again(storage: Storage, lost: str):
    open_store(storage)
    (storage.feature_store / lost).unlink()
    assert len(open_store(storage).list_feature_views()) == 5
    assert (storage.feature_store / lost).exists()


def test_a_moved_home_reads_its_new_place(storage: Storage, tmp_path: Path):
    open_store(storage)
    moved = Storage(tmp_path / "moved")
    storage.home.rename(moved.home)
    source = open_store(moved).get_feature_view("user_rfm").batch_source
    assert source.path == str(moved.feature_store / "offline" / "user_rfm")


def test_nobody_else_can_read_the_stores(storage: Storage):
    open_store(storage)
    modes = [path.stat().st_mode & 0o077 for path in storage.feature_store.glob("*.db")]
    assert modes == [0, 0]


@pytest.mark.slow
def test_a_stranger_applies_the_definitions_and_reads_with_plain_feast(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    write_rfm(storage, NOVEMBER, ["ada"])
    publish_view(storage, "user_rfm", NOVEMBER)
    monkeypatch.setenv(LOCATION, str(storage.feature_store))
    folder = definitions_folder()
    program = Path(sys.executable).with_name("feast")
    subprocess.run([program, "apply"], cwd=folder, check=True, capture_output=True)
    store = FeatureStore(repo_path=str(folder))
    found = store.get_online_features(["user_rfm:frequency"], [{"user_id": "ada"}]).to_dict()
    assert found == {"user_id": ["ada"], "frequency": [1]}


def test_applying_by_hand_needs_an_absolute_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(LOCATION, "data/shop/feature_store")
    with pytest.raises(ValueError, match=f"Set {LOCATION} to the absolute path"):
        runpy.run_path(str(definitions_folder() / "sources.py"))
