from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from feature_store_builders import NOVEMBER, OCTOBER, WIDTH, vectors, write_embeddings, write_rfm

from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import LOCATION, definitions_folder, open_store
from behavior_pipeline.storage import Storage

DOCUMENT = Path(__file__).parents[2] / "docs" / "feature_store.md"


def test_the_examples_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LOCATION, "set by an example, restored by this test")
    (tmp_path / "feature_repo").symlink_to(definitions_folder())
    storage = Storage(tmp_path / "data" / "online_retail_ii")
    for cutoff in (OCTOBER, NOVEMBER):
        write_embeddings(storage, cutoff, ["12347", "17841"], vectors(2, seed=0))
        write_rfm(storage, cutoff, ["12347", "17841"])
        for view in ("user_embedding", "user_rfm"):
            publish_view(storage, view, cutoff)

    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        exec(example, names)  # noqa: S102 - our own document
    assert names["features"]["user_rfm__frequency"] == 2
    assert len(names["vector"]) == WIDTH
    training_set = names["training_set"]
    assert training_set["user_rfm__frequency"].to_pylist() == [2, 1, 2]
    assert training_set["user_rfm__cutoff_at"].to_pylist() == [OCTOBER, NOVEMBER, NOVEMBER]


def test_every_view_feature_and_service_is_documented(storage: Storage):
    text = DOCUMENT.read_text()
    store = open_store(storage)
    services = [service.name for service in store.list_feature_services()]
    views = store.list_feature_views()
    features = [field.name for view in views for field in view.features]
    names = {*services, *features, *(view.name for view in views)}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
