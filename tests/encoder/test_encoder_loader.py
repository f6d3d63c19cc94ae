from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from encoder_builders import SIZES

from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import BatchMaker, plan_cutoffs
from behavior_pipeline.encoder.loader import made_ahead, map_tensors
from behavior_pipeline.encoder.sequence_files import sequence_files, survey


@dataclass(frozen=True)
class Inner:
    values: dict[str, torch.Tensor]
    name: str


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    count: int


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_the_order_is_that_of_the_source(prefetch):
    with made_ahead(iter(range(20)), prefetch, lambda number: number * 2) as batches:
        assert list(batches) == list(range(0, 40, 2))


def test_a_source_without_end_is_left_and_its_thread_ends():
    before = threading.active_count()
    with made_ahead(itertools.count(), 2, lambda number: number) as batches:
        assert [next(batches) for _ in range(5)] == list(range(5))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_an_error_comes_where_the_batch_would_have_come():
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with made_ahead(broken(), 2, lambda number: number) as batches:
        assert next(batches) == 1
        with pytest.raises(ValueError, match="broken"):
            next(batches)


def test_every_tensor_of_a_dataclass_is_mapped():
    batch = Outer((Inner({"a": torch.ones(2)}, "x"), Inner({"b": torch.zeros(1)}, "y")), 3)
    mapped = map_tensors(batch, lambda tensor: tensor + 1)
    assert mapped.parts[0].values["a"].tolist() == [2.0, 2.0]
    assert mapped.parts[1].values["b"].tolist() == [1.0]
    assert (mapped.count, mapped.parts[0].name) == (3, "x")


def test_real_batches_pass_whole(folders):
    config, files = TrainingConfig.named("tiny"), sequence_files(folders.sequences)
    shape = EncoderConfig.named("tiny", SIZES)
    maker = BatchMaker(files, shape, config, plan_cutoffs(survey(files), config))
    batch = next(maker.training())
    copied = map_tensors(batch, torch.clone)
    assert copied.num_events == batch.num_events
    assert type(copied) is type(batch)
