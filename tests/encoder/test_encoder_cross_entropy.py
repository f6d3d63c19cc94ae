from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch.utils._python_dispatch import TorchDispatchMode

from behavior_pipeline.encoder import losses as module
from behavior_pipeline.encoder.losses import (
    cross_entropies,
    log_uniform_log_probability,
    sample_log_uniform,
    sampled_cross_entropy,
)


@pytest.fixture
def chunk(monkeypatch):
    """Sets how many logits may exist at once."""
    return lambda numbers: monkeypatch.setattr(module, "CHUNK_LOGITS", numbers)


def problem(rows: int, values: int, width: int = 16, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, width), (values, width), (values,))
    ]
    return parts, torch.randint(values, (rows,), generator=generator)


@pytest.mark.parametrize("max_logits", [1, 50, 333, 10**6])
def test_it_is_cross_entropy_in_value_and_gradient(max_logits, chunk):
    chunk(max_logits)
    parts, targets = problem(37, 50)
    weights = torch.linspace(0, 2, 37, dtype=torch.float64)  # the first row does not count
    found = cross_entropies(*parts, targets)
    logits = F.linear(*parts)
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad((found * weights).sum(), parts)
    theirs = torch.autograd.grad((expected * weights).sum(), parts)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert (ours[0][0] == 0).all()


def test_a_vocabulary_of_200_000_values(chunk):
    chunk(10**6)
    parts, targets = problem(24, 200_000, 8, torch.float32)
    found = cross_entropies(*parts, targets)
    expected = F.cross_entropy(F.linear(*parts), targets, reduction="none")
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.mean(), parts)
    theirs = torch.autograd.grad(expected.mean(), parts)
    for mine, other in zip(ours, theirs, strict=True):
        # Sums of 200,000 terms in float32: torch's own differ from float64's by as much.
        torch.testing.assert_close(mine, other, atol=3e-5, rtol=1e-4)


class _Largest(TorchDispatchMode):
    """Remembers the most numbers that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


def test_the_logits_are_never_held(chunk):
    chunk(50_000)
    parts, targets = problem(400, 5000, 4, torch.float32)
    with _Largest() as seen:
        cross_entropies(*parts, targets).mean().backward()
    assert seen.numbers == 50_000  # ten rows; all logits would be 2,000,000


def test_it_compiles_without_a_break(chunk):
    chunk(500)
    parts, targets = problem(30, 50, dtype=torch.float32)
    compiled = torch.compile(cross_entropies, backend="aot_eager", fullgraph=True)
    found = compiled(*parts, targets)
    expected = F.cross_entropy(F.linear(*parts), targets, reduction="none")
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.mean(), parts)
    theirs = torch.autograd.grad(expected.mean(), parts)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_the_sampled_softmax_comes_to_the_exact_one_as_samples_grow():
    # 3,000 values whose logits fall with their rank, as those of frequent values do.
    torch.manual_seed(0)
    values, rows = 3000, 16
    parts, targets = problem(rows, values, 8, torch.float32)
    table, bias = parts[1].detach() * 0.3, -torch.arange(1.0, values + 1).log()
    exact = cross_entropies(parts[0].detach(), table, bias, targets)
    logits = F.linear(parts[0].detach(), table, bias)
    errors = []
    for num_samples in (64, 4096):
        totals = []
        for _ in range(300):
            samples = sample_log_uniform(num_samples, values)
            log_expected = (
                log_uniform_log_probability(samples, values)
                + torch.tensor(float(num_samples)).log()
            )
            true = logits.gather(1, targets[:, None]).squeeze(1)
            corrected = logits[:, samples] - log_expected
            hits = targets[:, None] == samples
            rest = corrected.masked_fill(hits, -torch.inf).exp().sum(1)
            totals.append((rest + true.exp()).double())
            loss = sampled_cross_entropy(true, logits[:, samples], log_expected, hits)
            direct = ((rest + true.exp()).log() - true).mean()
            torch.testing.assert_close(loss, direct, atol=1e-4, rtol=1e-4)
        total = torch.stack(totals).mean(0)
        expected = logits.double().exp().sum(1)
        # The partition estimate is unbiased whatever the number of samples.
        torch.testing.assert_close(total, expected, atol=0, rtol=0.06)
        sampled = torch.stack(totals).log().mean(0) - true.double()
        errors.append((sampled - exact.double()).abs().max().item())
    # Its logarithm is not: the loss is low by some variance, which more samples take away.
    assert errors[1] < 0.1 * errors[0]
