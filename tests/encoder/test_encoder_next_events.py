from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_builders import SIZES, STARTED, sequences_table, user_row

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.losses import FieldPrediction
from behavior_pipeline.encoder.sequence_files import SequenceTable, read_table, to_microseconds

DAY = 86_400_000_000
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def next_events(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import next_events  # noqa: PLC0415 - benchmarks are no package

    yield next_events
    sys.modules.pop("next_events")


def histories(*days: list[float]) -> SequenceTable:
    rows = [user_row(f"user{n}", user, seed=n) for n, user in enumerate(days)]
    return read_table(sequences_table(rows), "test")


def at(day: float) -> int:
    return to_microseconds(STARTED) + int(day * DAY)


def test_each_event_of_the_period_that_has_one_before_is_predicted_once(next_events):
    table = histories([1, 2, 5, 6], [7, 8], [], [1, 2], list(range(10)))
    found = next_events.windows_from(table, at(5), length=4)
    assert found.places.tolist() == [2, 3, 5, 13, 14, 15, 16, 17]
    assert found.users.tolist() == [0, 1, 4, 4, 4]
    # Nothing that is predicted is read, nor more than four events, nor another user's.
    assert found.lengths.max() == 4
    assert (found.starts >= table.offsets[found.users]).all()
    # At least two events are read before each that is predicted, where there are two.
    read = np.minimum(found.firsts - table.offsets[found.users], 2)
    assert (found.firsts - found.starts >= read).all()


def test_nothing_is_predicted_where_nothing_happened(next_events):
    found = next_events.windows_from(histories([1, 2], []), at(5), length=4)
    assert found.places.tolist() == []


@pytest.mark.parametrize("length", [40, 6])
def test_predictions_are_those_of_each_prefix_read_alone(next_events, length):
    table = histories(list(range(30)), [3, 25, 26], list(range(18)), [21])
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.named("tiny", SIZES, max_events=length)).eval()
    head = FieldPrediction(encoder.embedder.fields["action"], encoder.config.width, 4, 100)
    with torch.no_grad():  # an untrained head says nearly the same everywhere
        head.transform.weight.normal_()
    windows = next_events.windows_from(table, at(15), length)
    predicted = next_events.predicted_actions(encoder, head, table, windows)
    assert len(set(predicted)) > 1
    expected = []
    for user, start, first, end in zip(
        windows.users, windows.starts, windows.firsts, windows.ends, strict=True
    ):
        assert table.offsets[user] <= start
        for place in range(first, end):
            ids = {
                name: torch.from_numpy(values[start:place].astype(np.int64))[None]
                for name, values in table.ids.items()
            }
            gaps = torch.from_numpy(table.gap_days[start:place])[None]
            hidden = encoder.encode(ids, gaps)["hidden"][0, -1]
            logits = head.table.weight @ head.transform(hidden) + head.bias
            expected.append(int(logits[4:].argmax()) + 4)
    assert predicted.tolist() == expected


def test_naive_predictors_and_recalls_by_hand(next_events):
    actions = np.array([5, 5, 6, 5, 7, 7, 1, 1, 1, 1])
    assert next_events.most_frequent(actions) == 5  # 1 stands for what is not known
    assert next_events.most_recent(actions, np.array([1, 2, 5])).tolist() == [5, 5, 7]
    found = next_events.recalls(np.array([5, 5, 6, 5]), np.array([5, 5, 6, 7]))
    assert found["weighted_recall"] == 0.75
    assert found["macro_recall"] == pytest.approx(2 / 3)
