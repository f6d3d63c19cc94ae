from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from encoder_builders import SIZES, random_rows, sequences_table, user_row, write_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from behavior_pipeline.encoder import layouts
from behavior_pipeline.encoder.architecture import CausalPass, Encoder
from behavior_pipeline.encoder.batches import EventBatch
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.cutoffs import BatchMaker, plan_cutoffs
from behavior_pipeline.encoder.history import BEFORE, history_at, history_scalars
from behavior_pipeline.encoder.inference import encode_table
from behavior_pipeline.encoder.layouts import PackedLayout, Runs
from behavior_pipeline.encoder.objectives import Objectives
from behavior_pipeline.encoder.packing import FlatRuns, fill, packed_batches, tokens_of
from behavior_pipeline.encoder.sequence_files import SequenceTable, read_table, survey
from behavior_pipeline.encoder.sequence_files import sequence_files as files_in
from behavior_pipeline.encoder.training_batches import TrainingBatch
from behavior_pipeline.errors import PipelineError

SHAPE = EncoderConfig.named("tiny", SIZES)
CONFIG = TrainingConfig.named("tiny")
FIELDS = tuple(SIZES)
LENGTHS = st.lists(st.integers(0, 32), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(SHAPE).eval()
    for parameter in encoder.parameters():  # norms and gains too
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return encoder


@pytest.fixture(scope="module")
def table() -> SequenceTable:
    return read_table(sequences_table(random_rows(40)), "here")


def cut(table: SequenceTable, lengths: list[int], num_tokens: int) -> tuple[FlatRuns, np.ndarray]:
    """Cut runs of the given lengths out of the table, each from a place of its own."""
    starts = np.arange(len(lengths)) * 7 % (len(table.times) - 40)
    return FlatRuns.cut(table, FIELDS, starts, np.array(lengths, np.int64), num_tokens), starts


def alone(table: SequenceTable, start: int, length: int) -> EventBatch:
    """Return one run unpadded."""
    ids = {name: torch.tensor(table.ids[name][start : start + length])[None] for name in FIELDS}
    ids = {name: values.long() for name, values in ids.items()}
    gaps = torch.tensor(table.gap_days[start : start + length])[None]
    return EventBatch.from_tensors(ids, gaps, None, None)


@settings(max_examples=30, deadline=None)
@given(causal=LENGTHS, both_ways=LENGTHS, extra=st.integers(0, 70))
def test_packed_equals_one_by_one_unpadded(encoder, table, causal, both_ways, extra):
    first, first_starts = cut(table, causal, sum(causal) + extra + 1)
    second, second_starts = cut(table, both_ways, sum(both_ways) + extra)
    sizes = len(first.rows), len(second.rows)
    parts = tuple(
        Runs.of(part.lengths, size, 15, 32, is_causal=is_causal)
        for part, size, is_causal in zip((first, second), sizes, (True, False), strict=True)
    )
    with torch.no_grad():
        passed = encoder.transform(tokens_of((first, second), PackedLayout(parts, sizes)))
        assert torch.isfinite(passed.hidden).all()
        for is_causal, lengths, starts, base in (
            (True, causal, first_starts, 0),
            (False, both_ways, second_starts, sizes[0]),
        ):
            begins = base + np.cumsum(lengths) - lengths
            for start, length, begin in zip(starts, lengths, begins, strict=True):
                if length:
                    expected = encoder.hidden_states(
                        alone(table, start, length), is_causal=is_causal
                    )
                    actual = passed.hidden[begin : begin + length]
                    torch.testing.assert_close(actual, expected[0], atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 32), min_size=1, max_size=8))
def test_a_packed_pass_pooled_at_cutoffs_is_each_prefix_alone(encoder, table, data, lengths):
    cuts = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 3))) for n in lengths]
    flat, starts = cut(table, lengths, sum(lengths) + 5)
    before = np.zeros((len(lengths), len(BEFORE)), np.float32)
    before[:, :] = np.arange(len(lengths))[:, None]
    prefixes = flat.prefixes(np.array(cuts, np.int64), before)
    runs = Runs.of(flat.lengths, len(flat.rows), 15, 32, is_causal=True)
    layout = PackedLayout((runs,), (len(flat.rows),))
    with torch.no_grad():
        states = encoder.pool_at(encoder.transform(tokens_of((flat,), layout)), prefixes)
        for row, (start, places) in enumerate(zip(starts, cuts, strict=True)):
            for column, length in enumerate(places):
                if length:
                    batch = replace(alone(table, start, length), before=prefixes.before[row][None])
                    expected = encoder.encode_state(batch)[0]
                    torch.testing.assert_close(states[row, column], expected, atol=2e-5, rtol=1e-5)


def test_histories_at_cutoffs_equal_padded_ones(table):
    flat, starts = cut(table, [20, 0, 9], 40)
    prefixes = flat.prefixes(
        np.array([[3, 20], [0, 0], [9, 9]]), np.ones((3, len(BEFORE)), np.float32)
    )
    scalars = history_at(prefixes)
    for row, column, length in ((0, 0, 3), (0, 1, 20), (2, 1, 9)):
        gaps = torch.from_numpy(table.gap_days[starts[row] : starts[row] + length])[None]
        expected = history_scalars(gaps, torch.tensor([length]), torch.ones(1, len(BEFORE)))
        torch.testing.assert_close(scalars[row, column], expected[0])


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_by_mask_equals_attention_in_groups(is_causal):
    torch.manual_seed(0)
    lengths = np.array([3, 0, 170, 130, 1, 20, 90])
    runs = Runs.of(lengths, 460, 8, 256, is_causal=is_causal)
    parts = [torch.randn(460, 2, 16) for _ in range(3)]
    expected = runs.attend(*parts)
    masked = replace(runs, groups=(), mask=runs.block_mask())
    torch.testing.assert_close(masked.attend(*parts)[:414], expected[:414])
    pairs = masked.mask.to_dense()[0, 0]
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    if not is_causal:
        wanted = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert pairs.tolist() == wanted


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("has_window", [True, False])
def test_both_calls_of_flash_attention_say_who_attends(monkeypatch, is_causal, has_window):
    def varlen_attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        offsets: torch.Tensor, _key_offsets: torch.Tensor, longest: int, longest_key: int,
        **how: Any,
    ) -> torch.Tensor:  # fmt: skip
        known = {"window_size": (-1, 0)} if has_window else {"is_causal": True}
        other = {"window_size": (-1, -1)} if has_window else {"is_causal": False}
        assert how == (known if is_causal else other)
        assert offsets.dtype == torch.int32
        mixed = torch.zeros_like(query)
        for begin, end in pairwise(offsets.tolist()):
            if end > begin:
                assert end - begin <= longest == longest_key
                parts = [part[begin:end].transpose(0, 1) for part in (query, key, value)]
                one = F.scaled_dot_product_attention(*parts, is_causal=is_causal)
                mixed[begin:end] = one.transpose(0, 1)
        return mixed

    monkeypatch.setattr(layouts, "varlen_attn", varlen_attn)
    monkeypatch.setattr(layouts, "_HAS_WINDOW", has_window)
    torch.manual_seed(0)
    runs = Runs.of(np.array([3, 0, 17, 30, 1]), 90, 6, 32, is_causal=is_causal)
    parts = [torch.randn(90, 2, 16) for _ in range(3)]
    expected = runs.attend(*parts)
    torch.testing.assert_close(runs.attend_by_lengths(*parts)[:51], expected[:51])


def test_a_step_in_bfloat16_weights_comes_close_to_float32(skewed):
    made = maker(skewed)
    batch = next(made.training())
    torch.manual_seed(0)
    encoder = Encoder(SHAPE)
    objectives = Objectives(encoder, made.config)
    encoder.eval()
    objectives.eval()
    exact = objectives(encoder, batch)
    encoder.to(torch.bfloat16)
    objectives.to(torch.bfloat16)
    short = objectives(encoder, batch)
    for name, loss in exact.items():
        assert short[name].dtype == torch.float32
        assert short[name].item() == pytest.approx(loss.item(), rel=0.02)
    short["total"].backward()
    parameters = [*encoder.named_parameters(), *objectives.named_parameters()]
    assert {name for name, value in parameters if value.grad is None} == set()
    assert all(torch.isfinite(value.grad).all() for _, value in parameters)


def test_offsets_have_one_size_and_filler_is_cut_into_short_runs():
    runs = Runs.of(np.array([3, 5]), 100, 4, 32, is_causal=True)
    assert runs.offsets.dtype == torch.int32
    assert runs.offsets.tolist() == [0, 3, 8, 40, 72, 100, 100, 100, 100]
    full = Runs.of(np.array([32, 32, 32, 4]), 100, 4, 32, is_causal=True)
    assert full.offsets.tolist() == [0, 32, 64, 96, 100, 100, 100, 100, 100]
    with pytest.raises(ValueError, match="do not fit"):
        Runs.of(np.array([99, 2]), 100, 4, 99, is_causal=True)


@given(
    st.lists(st.integers(1, 60), max_size=300),
    st.integers(60, 400),
    st.integers(1, 30),
)
def test_a_filling_takes_everyone_once_within_the_budget(costs, budget, max_items):
    costs = np.array(costs, np.int64)
    batches, left = fill(costs, budget, max_items)
    taken = np.concatenate([*batches, left])
    assert sorted(taken.tolist()) == list(range(len(costs)))
    for batch in (*batches, left):
        assert costs[batch].sum() <= budget
        assert len(batch) <= max_items


def skewed_rows(num_users: int) -> list[dict]:
    """Users whose numbers of events have the heavy tail of real logs: median 9, mean about 17."""
    random = np.random.default_rng(3)
    counts = np.minimum(np.exp(random.normal(2.2, 1.1, num_users)) + 1, 200).astype(int)
    rows = []
    for number, count in enumerate(counts):
        days = np.sort(random.uniform(0, 180, count)).tolist()
        rows.append(user_row(f"user{number:05d}", days, seed=number))
    return rows


@pytest.fixture(scope="module")
def skewed(tmp_path_factory) -> list:
    return files_in(write_folders(tmp_path_factory.mktemp("skewed"), skewed_rows(600)).sequences)


def maker(files: list, **changes: Any) -> BatchMaker:
    config = replace(TrainingConfig.named("tiny", batch_tokens=2048), **changes)
    return BatchMaker(files, SHAPE, config, plan_cutoffs(survey(files), config))


def test_batches_are_full(skewed):
    rates = [batch.fill_rate for batch in islice(maker(skewed).training(), 24)]
    assert np.mean(rates) > 0.97
    assert min(rates) > 0.9


def shapes(batch: TrainingBatch) -> list[tuple]:
    """List the shapes of all tensors that a GPU sees of a batch."""
    tokens, layout = batch.tokens, batch.tokens.layout
    assert isinstance(layout, PackedLayout)
    tensors = [*tokens.ids.values(), tokens.gap_days, tokens.places, tokens.elapsed_days]
    tensors += [runs.offsets for runs in layout.parts]
    if layout.stretches is not None:
        tensors += vars(layout.stretches).values()
    tensors += [getattr(batch.prefixes, name) for name in vars(batch.prefixes)]
    tensors += [batch.has_next, batch.is_pair, batch.masked.places, *batch.masked.ids.values()]
    for one in batch.cuts:
        tensors += [one.lengths, one.silence_days, one.next_time, *one.window.values()]
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] + [layout.sizes]


@pytest.mark.parametrize("attention", ["auto", "blocks"])
def test_every_batch_has_the_same_shapes(skewed, attention):
    made = maker(skewed, attention=attention)
    batches = [*islice(made.training(), 12), *made.validation()]
    assert all(shapes(batch) == shapes(batches[0]) for batch in batches)


def test_the_seed_decides_the_batches_and_ranks_share_them(skewed):
    whole = list(islice(maker(skewed).training(), 6))
    again = list(islice(maker(skewed).training(), 6))
    other = next(maker(skewed, seed=1).training())
    ranks = [list(islice(maker(skewed).training(rank, 2), 3)) for rank in (0, 1)]
    resumed = next(maker(skewed).training(1, 2, skip=2))
    for left, right in zip(whole, again, strict=True):
        assert same(left, right)
    for number, batch in enumerate(whole):
        assert same(batch, ranks[number % 2][number // 2])
    assert same(resumed, whole[5])
    assert not same(other, whole[0])


def same(left: TrainingBatch, right: TrainingBatch) -> bool:
    return torch.equal(left.tokens.ids["item"], right.tokens.ids["item"]) and torch.equal(
        left.tokens.elapsed_days, right.tokens.elapsed_days
    )


def test_no_user_is_twice_in_a_batch_though_some_wait_for_the_next_epoch(skewed):
    parts = list(islice(maker(skewed)._parts(), 60))
    users = [part.table.user_ids.take(part.users).to_pylist() for part in parts]
    assert all(len(set(batch)) == len(batch) for batch in users)
    seen = np.unique(np.concatenate(users), return_counts=True)[1]
    assert seen.max() - seen.min() <= 2  # nobody is left out for long
    assert any(set(left) != set(right) for left, right in pairwise(users))


def test_a_batch_too_small_for_a_user_is_refused(skewed):
    with pytest.raises(PipelineError, match="too small"):
        maker(skewed, batch_tokens=64)


def test_what_attends_changes_no_loss(skewed):
    losses = []
    # On a CPU they differ in how runs are arranged alone.
    for attention in ("varlen", "flex", "blocks"):
        made = maker(skewed, attention=attention)
        torch.manual_seed(0)
        encoder = Encoder(SHAPE)
        objectives = Objectives(encoder, made.config)
        batch = next(made.training())
        encoder.eval()
        objectives.eval()
        losses.append(objectives(encoder, batch))
    for name in ("next_event", "contrastive", "silence"):
        for other in losses[1:]:
            torch.testing.assert_close(losses[0][name], other[name], atol=1e-5, rtol=1e-5)


def test_masked_copies_are_runs_of_the_batch_and_hidden_events_are_told(skewed):
    batch = next(maker(skewed).training())
    causal, both_ways = batch.run_lengths()
    assert causal.sum() == batch.num_events
    assert both_ways.sum() == batch.num_masked_tokens > 0
    hidden = batch.masked.ids["action"] > 0
    places = batch.masked.places[hidden]
    assert (places >= batch.num_causal).all()
    assert hidden.sum() == round(0.15 * batch.num_masked_tokens)
    actions = batch.tokens.ids["action"].clone()
    actions[places] = batch.masked.ids["action"][hidden]
    copies = actions[batch.num_causal :][: batch.num_masked_tokens].numpy()
    originals = actions[: batch.num_events].numpy()
    runs = {bytes(run) for run in np.split(originals, np.cumsum(causal)[:-1])}
    assert {bytes(run) for run in np.split(copies, np.cumsum(both_ways)[:-1])} <= runs


def test_the_successor_of_an_event_is_its_user_s_next(skewed):
    batch = next(maker(skewed).training())
    rows = batch.prefixes.rows
    has_next = torch.zeros_like(batch.has_next)
    has_next[:-1] = (rows[1:] == rows[:-1]) & (rows[:-1] < batch.prefixes.num_rows)
    assert torch.equal(batch.has_next, has_next)
    assert batch.has_next.sum() == batch.num_events - (batch.run_lengths()[0] > 0).sum()


def test_masking_switched_off_leaves_all_tokens_to_the_causal_part(skewed):
    weights = replace(CONFIG.weights, masked_event=0.0)
    made = maker(skewed, weights=weights)
    batch = next(made.training())
    assert batch.num_causal == 2048
    assert batch.masked is None
    encoder = Encoder(SHAPE)
    assert Objectives(encoder, made.config)(encoder, batch)["masked_event"] == 0


def test_a_step_is_one_graph_and_is_compiled_once(skewed, monkeypatch):
    # On a GPU attention is one call of one shape; on a CPU its groups differ between batches.
    monkeypatch.setattr(
        layouts.Runs, "attend", lambda _self, query, key, value: query + key + value
    )
    made = maker(skewed)
    torch.manual_seed(0)
    encoder = Encoder(SHAPE)
    objectives = Objectives(encoder, made.config)
    encoder.eval()
    objectives.eval()
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(objectives, backend=count, fullgraph=True, dynamic=False)
    for batch in islice(made.training(), 3):
        for runs in batch.tokens.layout.parts:
            object.__setattr__(runs, "groups", ())
        plain = objectives(encoder, batch)["total"]
        torch.testing.assert_close(compiled(encoder, batch)["total"], plain)
    assert len(graphs) == 1


@pytest.mark.parametrize("kernel", ["varlen", "blocks"])
def test_packed_inference_batches_hold_everyone_once_and_agree_with_padded(encoder, table, kernel):
    expected = encode_table(encoder, table).states
    seen = []
    with torch.no_grad():
        batches = list(packed_batches(table, SHAPE, 256, kernel))
        for batch in batches:
            states = encoder.pool_at(encoder.transform(batch.tokens), batch.prefixes)[:, 0]
            np.testing.assert_allclose(
                states[: len(batch.users)].numpy(), expected[batch.users], atol=2e-5
            )
            assert batch.silence_days[: len(batch.users)].numpy() == pytest.approx(
                table.silence_days(batch.users)
            )
            seen += batch.users.tolist()
    assert sorted(seen) == list(range(len(table)))
    assert len({batch.tokens.gap_days.shape for batch in batches}) == 1
    assert len(batches) <= -(-np.minimum(table.lengths, 32).sum() // 256) + 1


def test_pooling_of_a_padded_pass_reads_flat_tokens(encoder, table):
    batch = alone(table, 0, 12)
    with torch.no_grad():
        passed = encoder.transform(batch.tokens(is_causal=True))
        state = encoder.pool_at(CausalPass(passed.events, passed.hidden), batch.prefixes())[:, 0]
        torch.testing.assert_close(state, encoder.encode_state(batch))
