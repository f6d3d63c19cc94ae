from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from encoder_builders import SIZES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from behavior_pipeline.contracts import MASK_ID, PAD_ID
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.batches import EventBatch
from behavior_pipeline.encoder.configuration import FEEDFORWARDS, EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import window_sizes
from behavior_pipeline.encoder.embedder import (
    CodeEmbedding,
    EventEmbedder,
    NumberEmbedding,
    hide,
)
from behavior_pipeline.encoder.objectives import EventPrediction

# (action, property, gap) and (weekday, time slot, location, event).
BEAT = EncoderConfig.named("tiny", {"action": 12, "property": 60})
BEHAVEGPT = EncoderConfig.named(
    "tiny",
    {"weekday": 11, "time_slot": 52, "location": 40, "event": 34},
    event_field="event",
    has_gap=False,
)
EVERYTHING = EncoderConfig.named(
    "tiny",
    {"action": 12},
    number_edges={"price": (1.0, 10.0, 100.0)},
    code_sizes={"image": (20, 20, 12)},
)


def events(config: EncoderConfig, rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = {
        name: torch.randint(4, size, (rows, columns), generator=generator)
        for name, size in config.field_sizes.items()
    }
    for name in config.number_edges:
        ids[name] = torch.rand(rows, columns, generator=generator) * 200
    for name, sizes in config.code_sizes.items():
        codes = [torch.randint(4, s, (rows, columns), generator=generator) for s in sizes]
        ids[name] = torch.stack(codes, dim=-1)
    return ids


@pytest.mark.parametrize("config", [BEAT, BEHAVEGPT, EVERYTHING], ids=["beat", "behavegpt", "all"])
def test_any_set_of_fields_is_a_configuration(config):
    torch.manual_seed(0)
    encoder = Encoder(config).eval()
    ids, gaps = events(config, 3, 9), torch.rand(3, 9) * 4
    with torch.no_grad():
        plain = encoder.encode(ids, gaps, silence_days=torch.ones(3))["embedding"]
        assert plain.shape == (3, config.width)
        for name, values in ids.items():  # every field counts
            other = {**ids, name: values.flip(1)}
            assert not torch.allclose(encoder.encode(other, gaps)["embedding"], plain)
    again = EncoderConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    Encoder(again).load_state_dict(encoder.state_dict())


def test_without_a_gap_encoding_the_embedder_does_not_see_gaps():
    embedder = Encoder(BEHAVEGPT).embedder.eval()
    ids = {name: values[0] for name, values in events(BEHAVEGPT, 1, 5).items()}
    assert torch.equal(embedder(ids, torch.zeros(5)), embedder(ids, torch.ones(5)))


def test_what_is_predicted_are_the_wanted_fields_or_the_event():
    config = TrainingConfig.named("tiny")
    assert EventPrediction(Encoder(BEAT), config).weights == {"action": 1.0}
    assert EventPrediction(Encoder(BEHAVEGPT), config).weights == {"event": 1.0}
    assert window_sizes(BEHAVEGPT, config) == {}
    wanted = replace(config, predicted_fields={"event": 1.0, "location": 0.5})
    assert set(EventPrediction(Encoder(BEHAVEGPT), wanted).heads) == {"event", "location"}


def test_a_field_that_is_not_declared_is_refused():
    encoder = Encoder(BEAT)
    ids = events(BEAT, 1, 3)
    with pytest.raises(ValueError, match="no field colour"):
        encoder.encode({**ids, "colour": ids["action"]}, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="action_ids"):
        encoder.encode({"property": ids["property"]}, torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"event_field": "event"}, "lacks event"),
        ({"code_sizes": {"image": (20, 2)}}, "image"),
        ({"number_edges": {"price": (2.0, 1.0)}}, "price do not rise"),
        ({"number_edges": {"action": (1.0,)}}, "two fields"),
        ({"norm": "batch"}, "norm"),
        ({"feedforward": "relu"}, "feedforward"),
    ],
)
def test_declarations_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(EVERYTHING, **changes)


def test_numbers_fall_into_buckets_and_a_missing_one_adds_nothing():
    torch.manual_seed(0)
    embedding = NumberEmbedding((1.0, 10.0), 4, 4)
    rows = embedding(torch.tensor([0.5, 1.0, 9.0, 10.0, float("nan")]))
    assert torch.equal(rows[1], rows[2])
    assert len({tuple(row.tolist()) for row in rows}) == 4
    assert not rows[4].any()
    assert embedding.to(torch.bfloat16)(torch.tensor([9.99]))[0].equal(
        embedding(torch.tensor([1.0]))[0]
    )


def test_codes_add_up_one_table_per_place():
    torch.manual_seed(0)
    embedding = CodeEmbedding((6, 8), 4, 4)
    with torch.no_grad():
        both = embedding(torch.tensor([[5, 7]]))[0]
        apart = [embedding(torch.tensor([codes]))[0] for codes in ([5, 0], [0, 7])]
        swapped = embedding(torch.tensor([[7, 5]]))[0]
        assert torch.equal(embedding(torch.tensor([[6, 0]])), embedding(torch.tensor([[1, 0]])))
    torch.testing.assert_close(both, apart[0] + apart[1])
    assert not torch.allclose(both, swapped)


def test_hiding_reaches_codes_and_numbers():
    there = torch.tensor([True, False])
    ids = {"image": torch.tensor([[5, 0], [6, 7]]), "price": torch.tensor([3.0, 4.0])}
    hidden = hide(ids, there)
    assert hidden["image"].tolist() == [[MASK_ID, PAD_ID], [6, 7]]
    assert hidden["price"].isnan().tolist() == [True, False]


def test_the_embedder_holds_about_two_percent_of_the_parameters_of_base():
    # A vocabulary of usual size: 10,000 items, 500 categories.
    sizes = {**SIZES, "action": 24, "item": 10_004, "category": 504, "location": 204}
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig.named("base", sizes))
    share = count(encoder.embedder) / count(encoder)
    assert 0.015 < share < 0.025


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_one_product_over_all_tables_is_the_sum_of_the_fields():
    torch.manual_seed(0)
    embedder = EventEmbedder(EVERYTHING)
    ids = {name: values[0] for name, values in events(EVERYTHING, 1, 6).items()}
    gaps = torch.rand(6)
    with torch.no_grad():
        total = embedder.gap(gaps)
        for name, values in ids.items():
            total = total + embedder.fields[name](values)
        torch.testing.assert_close(embedder(ids, gaps), embedder.norm(total))


@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
@pytest.mark.parametrize("config", [BEAT, BEHAVEGPT, EVERYTHING], ids=["beat", "behavegpt", "all"])
def test_flops_are_those_that_are_counted(config, feedforward):
    config = replace(config, feedforward=feedforward)
    encoder = Encoder(config).eval()
    batch = EventBatch.from_tensors(
        events(config, 2, 7), torch.rand(2, 7), None, None, config.event_field
    )
    counter = FlopCounterMode(display=False)
    # The counter knows attention by its products, not by the CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        encoder.hidden_states(batch, is_causal=False)
    assert encoder.flops_per_pass([7, 7], causal=False) == counter.get_total_flops()
    attention = 4 * config.num_layers * config.width * (7 * 7 + 3 * 3)
    both = encoder.flops_per_pass([7, 3], causal=False)
    assert encoder.flops_per_pass([7, 3], causal=True) == both - attention // 2


def test_the_kinds_of_feedforward_cost_about_the_same():
    config = EncoderConfig.named("base", SIZES)
    kinds = [replace(config, feedforward=kind) for kind in FEEDFORWARDS]
    with torch.device("meta"):
        flops = [Encoder(kind).flops_per_pass([256], causal=True) for kind in kinds]
    assert max(flops) / min(flops) < 1.001


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer"},
        {"has_query_key_norm": False},
        {"has_biases": True},
        {"feedforward": "gelu"},
        {"feedforward": "swiglu"},
    ],
)
def test_every_choice_of_architecture_works(changes):
    config = replace(BEAT, **changes)
    encoder = Encoder(config)
    outputs = encoder.encode(events(config, 2, 5), torch.rand(2, 5))
    outputs["embedding"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.blocks.parameters())


def test_bfloat16_weights_come_close_to_float32():
    torch.manual_seed(0)
    encoder = Encoder(BEAT).eval()
    ids, gaps = events(BEAT, 4, 20), torch.rand(4, 20) * 100
    with torch.no_grad():
        exact = encoder.encode(ids, gaps)["embedding"]
        short = encoder.to(torch.bfloat16).encode(ids, gaps)
    assert short["hidden"].dtype == torch.bfloat16
    assert short["embedding"].dtype == torch.float32
    cosines = torch.nn.functional.cosine_similarity(exact, short["embedding"])
    assert cosines.min() > 0.999
