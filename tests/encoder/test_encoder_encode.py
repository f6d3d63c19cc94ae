from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoder_builders import (
    ALONE,
    CUTOFF,
    SIZES,
    Folders,
    random_rows,
    sequences_table,
    write_folders,
)

from behavior_pipeline.contracts import COLD_START_USER, embedding_schema, state_schema
from behavior_pipeline.encoder import layouts
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import load_checkpoint, save_checkpoint
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.encode import encode_folder, main
from behavior_pipeline.encoder.inference import (
    _packed_states,
    encode_files,
    encode_table,
    fast_copy,
    read_out,
)
from behavior_pipeline.encoder.packing import packed_batches
from behavior_pipeline.encoder.sequence_files import read_table, sequence_files
from behavior_pipeline.errors import PipelineError

WRITTEN_AT = datetime(2024, 7, 2, tzinfo=UTC)
NUM_FILES = 4


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    rows = random_rows(60)
    folders = write_folders(tmp_path, rows)
    for path in folders.sequences.iterdir():
        path.unlink()
    for number in range(NUM_FILES):
        path = folders.sequences / f"bucket={number:03d}.parquet"
        pq.write_table(sequences_table(rows[number::NUM_FILES]), path)
    return folders


@pytest.fixture
def checkpoint(folders: Folders) -> Path:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.named("tiny", SIZES))
    encoder.set_prior(torch.rand(encoder.embedding_width))
    return save_checkpoint(encoder, folders.vocabulary, folders.checkpoints, CUTOFF, {})


def read(out: Path, kind: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((out / kind).iterdir())])


def vectors(table: pa.Table, column: str) -> np.ndarray:
    return np.array(table[column].to_pylist(), np.float32)


def test_every_user_has_a_state_and_an_embedding_under_the_contracts(folders, checkpoint):
    out = folders.sequences.parent / "out"
    reports = []
    summary = encode_folder(
        folders.sequences, checkpoint, out, written_at=WRITTEN_AT,
        report=lambda *step: reports.append(step),
    )  # fmt: skip
    assert (summary.num_users, summary.num_encoded, summary.num_skipped_files) == (60, 60, 0)
    assert reports[-1][:2] == (60, 60)
    encoder = load_checkpoint(checkpoint).encoder
    states, embeddings = read(out, "states"), read(out, "embeddings")
    assert states.schema.equals(state_schema(encoder.state_width))
    assert embeddings.schema.equals(embedding_schema(encoder.embedding_width))
    parts = list(encode_files(encoder, sequence_files(folders.sequences)))
    expected = np.concatenate([part.states for part in parts])
    np.testing.assert_array_equal(vectors(states, "state"), expected)
    silence = np.concatenate([part.silence_days for part in parts])
    read_now = read_out(encoder, expected, silence)
    np.testing.assert_allclose(vectors(embeddings, "embedding"), read_now, atol=1e-6)
    cold = embeddings.filter(embeddings["is_cold_start"])
    assert cold["user_id"].to_pylist() == ["user0059"]
    np.testing.assert_array_equal(vectors(cold, "embedding")[0], encoder.prior().numpy())


def test_bfloat16_comes_close_on_a_cpu(folders, checkpoint, tmp_path):
    for precision in ("float32", "bfloat16"):
        encode_folder(folders.sequences, checkpoint, tmp_path / precision, precision=precision)
    left, right = (
        vectors(read(tmp_path / precision, "embeddings"), "embedding")
        for precision in ("float32", "bfloat16")
    )
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    assert ((left * right).sum(1) / norms).min() > 0.999
    assert not np.array_equal(left, right)


def test_a_killed_run_goes_on_where_it_was(folders, checkpoint, tmp_path):
    out = tmp_path / "out"
    program = """
import os, signal
from behavior_pipeline.encoder import encode
calls = 0
whole = encode.encode_table
def killed(*arguments, **named):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments, **named)
encode.encode_table = killed
encode.main()
"""
    done = run(program, folders, checkpoint, out)
    assert done.returncode == -signal.SIGKILL
    finished = sorted(path.name for path in (out / "embeddings").glob("*.parquet"))
    assert finished == ["bucket=000.parquet", "bucket=001.parquet"]
    kept = {name: (out / "embeddings" / name).read_bytes() for name in finished}
    summary = encode_folder(folders.sequences, checkpoint, out)
    assert (summary.num_encoded, summary.num_skipped_files) == (30, 2)
    assert all((out / "embeddings" / name).read_bytes() == kept[name] for name in finished)
    fresh = tmp_path / "fresh"
    encode_folder(folders.sequences, checkpoint, fresh)
    for kind, column in (("states", "state"), ("embeddings", "embedding")):
        left, right = read(out, kind), read(fresh, kind)
        assert left["user_id"].equals(right["user_id"])
        assert left[column].equals(right[column])
        assert len(list((out / kind).iterdir())) == NUM_FILES  # no file under construction


def test_another_checkpoint_or_a_changed_file_is_encoded_again(folders, checkpoint, tmp_path):
    out = tmp_path / "out"
    encode_folder(folders.sequences, checkpoint, out)
    assert encode_folder(folders.sequences, checkpoint, out).num_encoded == 0
    path = folders.sequences / "bucket=000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    summary = encode_folder(folders.sequences, checkpoint, out)
    assert (summary.num_encoded, summary.num_users) == (14, 59)
    other = Encoder(EncoderConfig.named("tiny", SIZES))
    newer = save_checkpoint(other, folders.vocabulary, folders.checkpoints, CUTOFF, {})
    assert encode_folder(folders.sequences, newer, out).num_encoded == 59


def test_what_would_leak_or_is_of_another_vocabulary_is_refused(folders, checkpoint, tmp_path):
    path = folders.sequences / "bucket=000.parquet"
    table = pq.read_table(path)

    def refused(column: str, value: object, message: str) -> None:
        place = table.schema.get_field_index(column)
        values = pa.array([value] * len(table), table.schema.field(column).type)
        pq.write_table(table.set_column(place, table.schema.field(column), values), path)
        with pytest.raises(PipelineError, match=message):
            encode_folder(folders.sequences, checkpoint, tmp_path / "out")

    refused("vocabulary_id", "other", "another vocabulary")
    refused("observation_cutoff", CUTOFF - timedelta(days=1), "would leak")
    refused("user_id", COLD_START_USER, "reserved")


def test_the_command_says_what_it_did(folders, checkpoint, tmp_path, capsys):
    arguments = ["--sequences", folders.sequences, "--checkpoint", checkpoint]
    main([*map(str, arguments), "--out", str(tmp_path / "out"), "--device", "cpu"])
    printed = capsys.readouterr()
    assert "60 users, 60 encoded now" in printed.out
    assert "60 of 60 users" in printed.err
    with pytest.raises(SystemExit, match="no sequence file"):
        main(["--sequences", str(tmp_path), "--checkpoint", str(checkpoint), "--out", "x"])


def test_it_encodes_alone_without_the_pipeline_s_other_libraries(folders, checkpoint, tmp_path):
    program = f"{ALONE}from behavior_pipeline.encoder.encode import main\nmain()\n"
    done = run(program, folders, checkpoint, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "embeddings").iterdir())) == NUM_FILES


def run(
    program: str, folders: Folders, checkpoint: Path, out: Path
) -> subprocess.CompletedProcess[str]:
    arguments = ["--sequences", folders.sequences, "--checkpoint", checkpoint, "--out", out]
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("is_short", [True, False])
def test_packed_float32_weights_compute_in_bfloat16_only_where_that_is_wanted(is_short):
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.named("tiny", SIZES)).eval()
    table = read_table(sequences_table(random_rows(20)), "here")
    expected = encode_table(encoder, table).states
    found = np.zeros_like(expected)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        for users, states in _packed_states(encoder, table, 256, cpu, is_short=is_short):
            found[users] = states.float().numpy()
    error = np.abs(found - expected).max()
    assert 1e-3 < error < 0.2 if is_short else error < 2e-5


def test_a_fast_copy_is_short_but_for_the_readout_and_leaves_the_encoder_alone():
    encoder = Encoder(EncoderConfig.named("tiny", SIZES))
    copied = fast_copy(encoder, is_compiled=False)
    assert {p.dtype for p in copied.blocks.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in copied.readout_layer.parameters()} == {torch.float32}
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_a_packed_pass_is_compiled_once_for_all_batches(monkeypatch):
    # On a GPU attention is one call of one shape; on a CPU its groups differ between batches.
    monkeypatch.setattr(
        layouts.Runs, "attend", lambda _self, query, key, value: query + key + value
    )
    torch.manual_seed(0)
    encoder = fast_copy(Encoder(EncoderConfig.named("tiny", SIZES)), is_compiled=False)
    table = read_table(sequences_table(random_rows(60)), "here")
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(encoder.packed_states, backend=count, fullgraph=True, dynamic=False)
    batches = list(packed_batches(table, encoder.config, 256, "blocks"))
    with torch.inference_mode():
        for batch in batches:
            expected = encoder.packed_states(batch)
            for runs in batch.tokens.layout.parts:
                object.__setattr__(runs, "groups", ())
            torch.testing.assert_close(compiled(batch), expected)
    assert len(batches) > 2
    assert len(graphs) == 1
