from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from feature_store_builders import NOVEMBER, vectors, write_embeddings, write_rfm
from place_builders import free_port

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.serving import serve_features
from behavior_pipeline.storage import Storage

CLIENT = Path(__file__).parents[2] / "examples" / "read_features.py"
USERS = ["ada", "bob", "日本"]


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urlopen(f"{url}/health", timeout=5):  # noqa: S310 - of this test
                return
        except URLError:
            time.sleep(0.1)
    pytest.fail("the server does not answer")


@pytest.mark.slow
def test_the_example_reads_what_was_published_over_http(tmp_path: Path):
    storage = Storage(tmp_path / "data" / "online_retail_ii")
    values = vectors(len(USERS), seed=0)
    values[0, :8] = 0.5  # plain numbers
    write_embeddings(storage, NOVEMBER, USERS, values)
    write_rfm(storage, NOVEMBER, USERS[:2])
    for view in ("user_embedding", "user_rfm"):
        publish_view(storage, view, NOVEMBER)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).with_name("behavior-pipeline")
    options = ["--source", "online_retail_ii", "--data-root", "data", "--port", str(port)]
    server = subprocess.Popen([program, "serve", *options], cwd=tmp_path)
    try:
        wait_for(url, server)
        command = [sys.executable, CLIENT, *USERS, "nobody", "--url", url]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    finally:
        server.terminate()
        server.wait()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["user_id"] for row in rows] == [*USERS, "nobody"]
    served = np.array([row["embedding"] for row in rows], np.float32)
    assert (served[:3].view(np.uint32) == values.view(np.uint32)).all()
    assert (served[3] == 0).all()
    assert [row["frequency"] for row in rows] == [1, 2, None, None]
    assert [row["is_cold_start"] for row in rows] == [False, False, False, True]


def test_an_empty_home_is_not_served(storage: Storage):
    with pytest.raises(PipelineError, match="Nothing was published yet"):
        serve_features(storage, "127.0.0.1", free_port())
