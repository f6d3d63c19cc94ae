from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from encoder_builders import Folders

from behavior_pipeline.contracts import PAD_ID
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import read_vocabulary_facts
from behavior_pipeline.encoder.configuration import EncoderConfig, ObjectiveWeights, TrainingConfig
from behavior_pipeline.encoder.cutoffs import BatchMaker, TrainingBatch, plan_cutoffs
from behavior_pipeline.encoder.losses import FieldPrediction
from behavior_pipeline.encoder.objectives import Objectives
from behavior_pipeline.encoder.parallel import Processes
from behavior_pipeline.encoder.sequence_files import sequence_files, survey

EVERYTHING = {
    "weights": ObjectiveWeights(future_window=1.0),
    "mask_levels": (0.3, 0.4, 0.3),
    "hardness": 0.5,
    "positive_share": 0.05,
    "robust_share": 0.2,
    "max_full_softmax": 10**6,
}


def batch_of(folders: Folders, **changes: object) -> tuple[TrainingConfig, Encoder, TrainingBatch]:
    config = replace(TrainingConfig.named("tiny"), **changes)
    facts = read_vocabulary_facts(folders.vocabulary)
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.named("tiny", facts.field_sizes))
    files = sequence_files(folders.sequences)
    maker = BatchMaker(files, encoder.config, config, plan_cutoffs(survey(files), config))
    return config, encoder, next(maker.training())


def losses_of(folders: Folders, **changes: object) -> dict[str, torch.Tensor]:
    config, encoder, batch = batch_of(folders, **changes)
    torch.manual_seed(1)
    objectives = Objectives(encoder, config)
    torch.manual_seed(2)
    return objectives(encoder, batch)


def test_every_option_at_once_teaches_every_weight(folders):
    config, encoder, batch = batch_of(folders, **EVERYTHING)
    objectives = Objectives(encoder, config)
    objectives.start_from([batch])
    losses = objectives(encoder, batch)
    assert set(losses) == {
        "masked_event", "next_event", "contrastive", "silence", "future_window", "total",
    }  # fmt: skip
    assert all(loss.isfinite() for loss in losses.values())
    losses["total"].backward()
    idle = [name for name, p in objectives.named_parameters() if p.grad is None]
    assert idle == []


def test_without_them_nothing_is_looked_up_or_added(folders):
    _, _, batch = batch_of(folders)
    assert all(cut.future == {} for cut in batch.cuts)
    assert "future_window" not in losses_of(folders)


def test_a_horizon_as_long_as_the_label_window_holds_what_that_holds(folders):
    changes = {"weights": ObjectiveWeights(future_window=1.0), "future_days": (5.0, 30.0)}
    _, _, batch = batch_of(folders, **changes)
    for cut in batch.cuts:
        for field, window in cut.window.items():
            future = cut.future[field]
            assert torch.equal(future[:, 1], window)
            assert (future[:, 0] <= future[:, 1]).all()
            assert future[:, 0].sum() < future[:, 1].sum()


def test_rare_actions_count_more_in_the_robust_next_event(folders):
    plain = losses_of(folders)
    robust = losses_of(folders, robust_share=0.5)
    assert robust["next_event"] > plain["next_event"]
    for name in ("masked_event", "contrastive", "silence"):
        assert torch.equal(plain[name], robust[name])


def test_masked_levels_reach_the_batch(folders):
    _, encoder, batch = batch_of(folders, mask_levels=(1.0, 0.0, 0.0))
    assert batch.masked is not None
    found = torch.stack([ids != PAD_ID for ids in batch.masked.ids.values()]).sum(0)
    assert found.max() == 1  # one field of each event
    assert set(batch.masked.ids) == set(encoder.config.field_sizes)
    assert (found > 0).sum() == round(0.15 * batch.num_masked_tokens)


@pytest.mark.parametrize("alignment", ["contrast", "cosine"])
def test_both_alignments_train(folders, alignment):
    config, encoder, batch = batch_of(folders, alignment=alignment)
    objectives = Objectives(encoder, config)
    parameters = {id(p): p for part in (encoder, objectives) for p in part.parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3)
    seen = []
    for _ in range(8):
        loss = objectives(encoder, batch)["contrastive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0]


def test_the_exact_softmax_reaches_as_far_as_configured(folders, monkeypatch):
    calls = []
    original = FieldPrediction.losses

    def spy(self, hidden, targets) -> torch.Tensor:
        calls.append((self.table.num_embeddings, self.max_full_softmax))
        return original(self, hidden, targets)

    monkeypatch.setattr(FieldPrediction, "losses", spy)
    first = losses_of(folders, max_full_softmax=3, num_negatives=5)
    assert {limit for _, limit in calls} == {3}
    exact = losses_of(folders)
    assert not torch.equal(first["next_event"], exact["next_event"])
    assert np.isfinite(first["next_event"].item())


def test_a_step_is_one_graph_with_every_option(folders):
    config, encoder, batch = batch_of(folders, **EVERYTHING)
    objectives = Objectives(encoder, config)
    compiled = torch.compile(
        lambda given: objectives(encoder, given)["total"], backend="aot_eager", fullgraph=True
    )
    encoder.eval()
    objectives.eval()
    torch.testing.assert_close(compiled(batch), objectives(encoder, batch)["total"])


def test_statistics_of_one_process_are_no_break_in_the_graph(folders):
    config, encoder, batch = batch_of(folders, **EVERYTHING)
    objectives = Objectives(encoder, config, Processes(0, 1, torch.device("cpu")).sum)
    compiled = torch.compile(
        lambda given: objectives(encoder, given)["total"], backend="aot_eager", fullgraph=True
    )
    assert compiled(batch).isfinite()
    assert objectives.next_event.prediction.robust["action"].counts.sum() > 0
