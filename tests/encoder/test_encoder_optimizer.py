from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_builders import SIZES

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.muon import (
    MOMENTUM,
    NEWTON_SCHULZ,
    UPDATE_RMS,
    Muon,
    orthogonalise,
)
from behavior_pipeline.encoder.optimizer import Optimizer

CONFIG = EncoderConfig.named("tiny", SIZES)


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig.named("tiny", **{"warmup_share": 0.0, "decay_share": 0.0, **changes})


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.ModuleDict({"encoder": Encoder(CONFIG)})


def give_gradients(module: torch.nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_newton_schulz_keeps_the_singular_vectors_and_levels_the_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    expected = values / values.norm(dim=1, keepdim=True)
    is_large = expected > 0.01  # five steps do not lift what is nearly nothing
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    found = left.mT @ orthogonalise(matrices) @ right.mT
    assert torch.allclose(found, torch.diag_embed(expected), atol=1e-3)
    assert expected[is_large].min() > 0.6
    assert expected.max() < 1.25
    assert is_large.float().mean() > 0.9


def test_newton_schulz_of_a_stack_is_that_of_each_and_ignores_the_scale():
    torch.manual_seed(0)
    matrices = torch.randn(4, 12, 20)
    alone = torch.cat([orthogonalise(each[None]) for each in matrices])
    assert torch.allclose(orthogonalise(matrices), alone, atol=1e-5)
    assert torch.allclose(orthogonalise(1000 * matrices), alone, atol=1e-5)
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))


def test_muon_s_step_by_hand_with_momentum_and_decay():
    torch.manual_seed(0)
    weights, first, second = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 4)
    expected, momentum = weights.clone(), torch.zeros(6, 4)
    ours = weights.clone()
    muon = Muon([ours], [1])
    for gradient in (first, second):
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        nesterov = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
        update = orthogonalise(nesterov[None])[0]
        expected -= 0.1 * (0.5 * expected + UPDATE_RMS * 6**0.5 * update)
        muon.step([gradient], rate=0.1, decay=0.5)
    assert torch.allclose(ours, expected, atol=1e-6)


def test_muon_agrees_with_torch_s_own():
    torch.manual_seed(0)
    gradients = [torch.randn(8, 16) for _ in range(3)]
    ours = torch.randn(8, 16)
    theirs = torch.nn.Parameter(ours.clone())
    before = ours.clone()
    muon = Muon([ours], [1])
    peer = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", momentum=MOMENTUM
    )
    for gradient in gradients:
        muon.step([gradient], rate=0.02, decay=0.1)
        theirs.grad = gradient.clone()
        peer.step()
    # Theirs computes in bfloat16.
    assert (ours - theirs).norm() < 0.02 * (ours - before).norm()


def test_a_fused_projection_is_three_matrices():
    torch.manual_seed(0)
    fused, gradient = torch.randn(12, 4), torch.randn(12, 4)
    apart = [part.clone() for part in fused.chunk(3)]
    Muon([fused], [3]).step([gradient], rate=0.1, decay=0.0)
    Muon(apart, [1, 1, 1]).step(list(gradient.chunk(3)), rate=0.1, decay=0.0)
    assert torch.allclose(fused, torch.cat(apart), atol=1e-6)


def test_muon_has_the_blocks_matrices_and_adamw_the_rest():
    optimizer = Optimizer(model(), config())
    layers = {name.split(".")[-2] for name in optimizer.by_muon}
    assert layers == {"query_key_value", "attention_out", "widen", "narrow"}
    assert len(optimizer.by_muon) == 4 * CONFIG.num_layers
    assert sorted(optimizer.by_muon + optimizer.by_adamw) == sorted(optimizer.parameters)
    assert set(optimizer.muon.groups) == {(48, 48), (96, 48), (48, 96)}
    assert Optimizer(model(), config(optimizer="adamw")).by_muon == []


def test_both_halves_of_a_gated_layer_are_matrices_of_their_own():
    gated = EncoderConfig.named("tiny", SIZES, feedforward="swiglu")
    module = torch.nn.ModuleDict({"encoder": Encoder(gated)})
    assert (64, 48) in Optimizer(module, config()).muon.groups


def test_adamw_alone_is_torch_s_and_spares_tables_norms_and_biases():
    ours, theirs = model(), model()
    optimizer = Optimizer(ours, config(optimizer="adamw", gradient_norm=1e9, weight_decay=0.5))
    linear = {id(m.weight) for m in theirs.modules() if isinstance(m, torch.nn.Linear)}
    groups = [
        {"params": [p for p in theirs.parameters() if id(p) in linear], "weight_decay": 0.5},
        {"params": [p for p in theirs.parameters() if id(p) not in linear], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=config().learning_rate, betas=(0.9, 0.98))
    for step in range(3):
        for module in (ours, theirs):
            give_gradients(module, seed=step)
        optimizer.step(step)
        peer.step()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-6)


def test_gradients_are_clipped_to_the_norm_and_forgotten():
    clipped, by_hand = model(), model()
    give_gradients(clipped)
    give_gradients(by_hand)
    norm = torch.stack([p.grad.square().sum() for p in by_hand.parameters()]).sum().sqrt()
    for parameter in by_hand.parameters():
        parameter.grad *= 0.5 / norm
    found = Optimizer(clipped, config(gradient_norm=0.5)).step(0)
    Optimizer(by_hand, config(gradient_norm=1e9)).step(0)
    assert torch.allclose(found, norm)
    for one, other in zip(clipped.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert one.grad is None


@pytest.mark.parametrize("optimizer_name", ["muon", "adamw"])
def test_bfloat16_matrices_follow_float32_masters(optimizer_name):
    rounded, exact = model(), model()
    settings = {"optimizer": optimizer_name, "learning_rate": 1e-5, "muon_learning_rate": 1e-5}
    low = Optimizer(rounded, config(precision="bfloat16", **settings))
    high = Optimizer(exact, config(precision="float32", **settings))
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    for step in range(20):
        for module in (rounded, exact):
            torch.manual_seed(step)
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
        low.step(step)
        high.step(step)
    for name in low.masters:
        master = low.masters[name]
        assert torch.equal(rounded.get_parameter(name), master.bfloat16())
        # Steps as small as these are lost in bfloat16 and add up in the masters.
        moved = (high.masters[name] - model().get_parameter(name)).norm()
        assert (master - high.masters[name]).norm() < 0.1 * moved


def test_a_state_that_is_taken_back_goes_on_alike():
    first, second = model(), model(seed=5)
    optimizer, other = Optimizer(first, config()), Optimizer(second, config())
    for step in range(2):
        give_gradients(first, seed=step)
        optimizer.step(step)
    other.load({name: tensor.clone() for name, tensor in optimizer.tensors().items()})
    for step in range(2, 4):
        for module, each in ((first, optimizer), (second, other)):
            give_gradients(module, seed=step)
            each.step(step)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
