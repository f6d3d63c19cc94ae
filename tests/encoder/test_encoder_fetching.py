from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_builders import SIZES, random_rows, sequences_table
from numpy.typing import NDArray

from behavior_pipeline.encoder import fetching, inference
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.fetching import Fetching, padded_to
from behavior_pipeline.encoder.inference import encode_table, read_out
from behavior_pipeline.encoder.sequence_files import read_table

CPU = torch.device("cpu")


class Late:
    """A copy as a GPU makes it: nothing to be read before it was waited for."""

    begun = 0
    finished = 0

    def __init__(self, rows: torch.Tensor) -> None:
        Late.begun += 1
        self.number = Late.begun
        self.rows = rows.float().clone()

    def finish(self) -> NDArray[np.float32]:
        Late.finished += 1
        assert self.number == Late.finished  # in order, each once
        return self.rows.numpy()


@pytest.fixture
def late(monkeypatch) -> type[Late]:
    Late.begun = Late.finished = 0
    monkeypatch.setattr(fetching, "begin_copy", Late)
    return Late


def test_rows_are_written_when_the_next_are_at_work(late):
    target = np.zeros((5, 2), np.float32)
    fetched = Fetching(target)
    fetched.add(np.array([3, 0]), torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16))
    assert (late.begun, late.finished) == (1, 0)
    fetched.add(slice(1, 3), torch.tensor([[5.0, 6], [7, 8]]))
    assert (late.begun, late.finished) == (2, 1)
    assert target.tolist() == [[3, 4], [0, 0], [0, 0], [1, 2], [0, 0]]
    fetched.finish()
    fetched.finish()
    assert target.tolist() == [[3, 4], [5, 6], [7, 8], [1, 2], [0, 0]]


def test_nothing_to_fetch_is_no_error():
    Fetching(np.zeros((0, 2), np.float32)).finish()


def test_late_copies_change_no_user_s_numbers(monkeypatch):
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.named("tiny", SIZES)).eval()
    table = read_table(sequences_table(random_rows(50)), "here")
    expected = encode_table(encoder, table, 128)
    embeddings = read_out(encoder, expected.states, expected.silence_days)
    monkeypatch.setattr(fetching, "begin_copy", Late)
    monkeypatch.setattr(inference, "READOUT_USERS", 16)
    Late.begun = Late.finished = 0
    found = encode_table(encoder, table, 128)
    assert np.array_equal(found.states, expected.states)
    again = read_out(encoder, found.states, found.silence_days)
    np.testing.assert_allclose(again, embeddings, atol=1e-6)
    assert Late.begun == Late.finished > 4


def test_rows_are_padded_with_zeros_and_may_be_read_only():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    values.flags.writeable = False
    assert padded_to(values[1:], 3, CPU).tolist() == [[2, 3], [4, 5], [0, 0]]
    assert padded_to(values[:, 0], 4, CPU).tolist() == [0, 2, 4, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_come_from_a_gpu_whatever_it_is_asked_for_meanwhile():
    target = np.zeros((4096, 64), np.float32)
    fetched = Fetching(target)
    for begin in range(0, 4096, 512):
        rows = torch.full((512, 64), float(begin), device="cuda")
        for _ in range(64):
            rows = rows + 1
        fetched.add(slice(begin, begin + 512), rows)
        del rows
    fetched.finish()
    assert np.array_equal(target[:, 0], np.arange(4096) // 512 * 512 + 64)
