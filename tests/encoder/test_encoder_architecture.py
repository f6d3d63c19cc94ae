from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoder_builders import SIZES

from behavior_pipeline.contracts import MASK_ID, PAD_ID
from behavior_pipeline.encoder.architecture import NUM_SCALARS, CausalPass, Encoder
from behavior_pipeline.encoder.batches import EventBatch
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.embedder import EventEmbedder, hide
from behavior_pipeline.encoder.history import (
    HISTORY_SCALARS,
    SILENCE_SCALARS,
    history_scalars,
    silence_scalars,
)
from behavior_pipeline.encoder.time_encoding import TimeEncoding, log_bucket_edges

ACTIONS = torch.tensor([[1, 2, 3, 5, 1, 6, 2, 5]])
PROPERTIES = torch.tensor([[12, 45, 45, 45, 8, 3, 22, 22]])
GAPS = torch.tensor([[0.0, 0.1, 0.5, 1.2, 3.0, 3.1, 7.0, 7.5]])


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig.named("tiny", {**SIZES, "category": 50})).eval()


def random_batch(lengths: list[int], columns: int, seed: int = 0) -> EventBatch:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(columns) < torch.tensor(lengths)[:, None]
    ids = {
        field: torch.randint(4, size, valid.shape, generator=generator) * valid
        for field, size in SIZES.items()
        if size > 4
    }
    gaps = torch.rand(valid.shape, generator=generator) * 5 * valid
    return EventBatch.from_tensors(ids, gaps, torch.rand(len(lengths)) * 30, None)


def padded(batch: EventBatch, extra: int) -> EventBatch:
    def widen(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, extra))

    ids = {field: widen(values) for field, values in batch.ids.items()}
    return replace(batch, ids=ids, gap_days=widen(batch.gap_days))


def test_the_call_of_the_model_card_works(encoder):
    outputs = encoder(ACTIONS, PROPERTIES, GAPS)
    assert outputs["embedding"].shape == (1, encoder.embedding_width)
    assert outputs["state"].shape == (1, encoder.state_width)
    assert outputs["hidden"].shape == (1, 8, encoder.config.width)
    assert torch.isfinite(outputs["embedding"]).all()


def test_base_has_the_parameters_of_beat():
    sizes = {**SIZES, "action": 20, "item": 5004, "category": 200, "location": 60}
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig.named("base", sizes))
    parts = (encoder.embedder, encoder.blocks, encoder.final_norm)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert count == pytest.approx(86e6, rel=0.02)


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_changes_nothing(encoder, is_causal):
    batch = random_batch([3, 7, 12], 12)
    with torch.no_grad():
        plain = encoder.hidden_states(batch, is_causal=is_causal)
        wide = encoder.hidden_states(padded(batch, 9), is_causal=is_causal)
        states = encoder.encode_state(batch), encoder.encode_state(padded(batch, 9))
    for row, length in enumerate((3, 7, 12)):
        torch.testing.assert_close(plain[row, :length], wide[row, :length], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


def test_the_causal_pass_sees_no_future_and_the_other_does(encoder):
    batch = random_batch([12], 12)
    ids = {field: values.clone() for field, values in batch.ids.items()}
    for values in ids.values():
        values[:, 8:] = 4 + (values[:, 8:] - 3) % 3
    gaps = batch.gap_days.clone()
    gaps[:, 8:] += 11
    changed = replace(batch, ids=ids, gap_days=gaps)
    with torch.no_grad():
        before, after = encoder.hidden_states(batch), encoder.hidden_states(changed)
        torch.testing.assert_close(before[:, :8], after[:, :8], atol=1e-6, rtol=1e-6)
        assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-2
        both_ways = [encoder.hidden_states(b, is_causal=False)[:, :8] for b in (batch, changed)]
    assert (both_ways[0] - both_ways[1]).abs().max() > 1e-2


def test_a_pass_pooled_at_an_earlier_event_is_the_state_of_that_moment(encoder):
    batch = random_batch([5, 9, 12], 12)
    lengths = torch.tensor([0, 4, 12])
    valid = torch.arange(12) < lengths[:, None]
    short = replace(
        batch,
        ids={field: values * valid for field, values in batch.ids.items()},
        gap_days=batch.gap_days * valid,
        lengths=lengths,
    )
    with torch.no_grad():
        pooled = encoder.pool(encoder.causal_pass(batch), replace(batch, lengths=lengths))
        alone = encoder.encode_state(short)
    torch.testing.assert_close(pooled, alone, atol=1e-5, rtol=1e-5)


def test_a_summary_reads_the_events_as_well_as_the_hidden_states(encoder):
    batch = random_batch([6], 6)
    with torch.no_grad():
        passed = encoder.causal_pass(batch)
        whole = encoder.pool(passed, batch)
        other_events = encoder.pool(CausalPass(passed.events.flip(2), passed.hidden), batch)
        other_hidden = encoder.pool(CausalPass(passed.events, passed.hidden.flip(2)), batch)
    width = encoder.config.width
    assert (whole - other_events)[:, :width].abs().max() > 0.1
    assert (whole - other_hidden)[:, :width].abs().max() > 0.1


def test_silence_changes_the_embedding_and_not_the_state(encoder):
    one, sixty = (
        encoder(ACTIONS, PROPERTIES, GAPS, silence_days=torch.tensor([days]))
        for days in (1.0, 60.0)
    )
    torch.testing.assert_close(one["state"], sixty["state"], atol=0, rtol=0)
    learned = (one["embedding"] - sixty["embedding"])[:, NUM_SCALARS:]
    assert learned.abs().max() > 0.1


def test_silence_is_readable_from_its_own_dimension(encoder):
    place = len(HISTORY_SCALARS) + SILENCE_SCALARS.index("silence")
    embedding = encoder(ACTIONS, PROPERTIES, GAPS, silence_days=torch.tensor([29.0]))["embedding"]
    assert embedding[0, place].item() == pytest.approx(math.log(30) / 3, abs=1e-6)


def test_no_and_one_event_work_and_no_event_gives_the_prior(encoder):
    prior = torch.arange(encoder.embedding_width).float()
    encoder.set_prior(prior)
    batch = random_batch([0, 1], 6)
    with torch.no_grad():
        embedding = encoder.readout(encoder.encode_state(batch), batch.silence_days)
    assert torch.equal(embedding[0], prior)
    assert torch.equal(encoder.prior(), prior)
    assert torch.isfinite(embedding).all()
    assert not torch.equal(embedding[1], prior)


def test_a_field_of_padding_contributes_nothing():
    torch.manual_seed(0)
    embedder = EventEmbedder(EncoderConfig.named("tiny", SIZES)).eval()
    actions, gaps = torch.tensor([[4, 5]]), torch.tensor([[0.0, 2.0]])
    nothing = {field: torch.full((1, 2), PAD_ID) for field in SIZES if field != "action"}
    with torch.no_grad():
        alone = embedder({"action": actions}, gaps)
        with_nothing = embedder({"action": actions, **nothing}, gaps)
    assert torch.equal(alone, with_nothing)


def test_an_id_beyond_the_table_counts_as_unknown(encoder):
    far = encoder(torch.tensor([[500]]), torch.tensor([[500]]), torch.zeros(1, 1))
    unknown = encoder(torch.tensor([[1]]), torch.tensor([[1]]), torch.zeros(1, 1))
    assert torch.equal(far["embedding"], unknown["embedding"])


def test_hiding_masks_every_field_an_event_has():
    ids = {"action": torch.tensor([[4, 5]]), "item": torch.tensor([[0, 9]])}
    hidden = hide(ids, torch.tensor([[True, True]]))
    assert hidden["action"].tolist() == [[MASK_ID, MASK_ID]]
    assert hidden["item"].tolist() == [[PAD_ID, MASK_ID]]


def test_shapes_that_do_not_agree_are_refused(encoder):
    with pytest.raises(ValueError, match="time_gaps"):
        encoder(ACTIONS, PROPERTIES, GAPS[:, :3])
    with pytest.raises(ValueError, match="at least 1"):
        encoder(ACTIONS[:, :0], PROPERTIES[:, :0], GAPS[:, :0])


def test_history_scalars_by_hand():
    # Visits on days 0, 2 and 42, two events on the second, after gaps of 1, 2 and 40 days. Before:
    # 3 events in 10 days, 2 visits with a gap of 5 days, the visits decayed to .5, 1, 1.5 and 2.
    gaps = torch.tensor([[1.0, 2.0, 0.25, 40.0, 0.0]])
    before = [3.0, 10.0, 2.0, 1.0, math.log(6), math.log(6) ** 2, 5.0, 0.5, 1.0, 1.5, 2.0]
    columns = history_scalars(gaps, torch.tensor([4]), torch.tensor([before]))[0]
    values = dict(zip(HISTORY_SCALARS, columns.tolist(), strict=True))
    logs = np.log([2, 3, 41, 6])
    assert values.pop("typical_visit_gap") == pytest.approx(logs.mean() / 3, rel=1e-5)
    assert values.pop("visit_gap_spread") == pytest.approx(logs.std(), rel=1e-5)
    assert {name: math.expm1(3 * value) for name, value in values.items()} == pytest.approx(
        {
            "num_events": 7,
            "tenure": 10 + 42.25,
            "num_visits": 2 + 3,
            "visit_interval": 52.25 / 4,
            "events_a_visit": 7 / 5,
            "last_visit_gap": 40,
            "longest_visit_gap": 40,
            "visits_7": 1 + math.exp(-40.25 / 7) + 1.5 * math.exp(-42.25 / 7),
            "visits_30": 1 + math.exp(-40.25 / 30) + 2 * math.exp(-42.25 / 30),
            "visits_90": 1 + math.exp(-40.25 / 90) + 2.5 * math.exp(-42.25 / 90),
            "visits_365": 1 + math.exp(-40.25 / 365) + 3 * math.exp(-42.25 / 365),
        },
        rel=1e-4,
    )


def test_silence_scalars_by_hand():
    history = torch.zeros(1, len(HISTORY_SCALARS))
    days = {"visit_interval": 9.0, "typical_visit_gap": 4.0, "longest_visit_gap": 61.0}
    visits = {"visits_7": 1.0, "visits_30": 2.0, "visits_90": 3.0, "visits_365": 4.0}
    for name, value in (days | visits).items():
        history[0, HISTORY_SCALARS.index(name)] = math.log1p(value) / 3
    values = silence_scalars(history, torch.tensor([30.0]))[0].tolist()
    expected = [
        math.log(31) / 3,
        math.log(3.1) / 3,
        math.log(31 / 5) / 3,
        math.log(0.5) / 3,
        math.exp(-30 / 7),
        math.exp(-1),
        math.exp(-1 / 3),
        math.log1p(math.exp(-30 / 7)) / 3,
        math.log1p(2 * math.exp(-1)) / 3,
        math.log1p(3 * math.exp(-1 / 3)) / 3,
        math.log1p(4 * math.exp(-30 / 365)) / 3,
    ]
    assert values == pytest.approx(expected, rel=1e-5)


def test_time_buckets_are_log_spaced_from_a_minute():
    edges = log_bucket_edges(4, 1000 / 1440)
    assert edges.tolist() == pytest.approx([1 / 1440, 1000**0.5 / 1440, 1000 / 1440], rel=1e-5)
    encoding = TimeEncoding(8, 4, 2, 1000 / 1440 / 4)
    days = torch.tensor([0.0, 2 / 1440, 100 / 1440, 5.0])
    assert encoding.bucket_of(days).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 50}, "multiple of 4"),
        ({"field_sizes": {"item": 8}}, "lacks action"),
        ({"field_sizes": {**SIZES, "item": 2}}, "item"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(changes, message):
    config = EncoderConfig.named("tiny", SIZES)
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_configuration_survives_json():
    config = EncoderConfig.named("small", SIZES)
    assert EncoderConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="colour"):
        EncoderConfig.from_json({**config.to_json(), "colour": 1})
