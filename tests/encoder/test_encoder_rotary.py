from __future__ import annotations

from collections.abc import Callable

import torch
from encoder_builders import SIZES
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.batches import EventBatch
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.time_encoding import RotaryClock, from_bits, rotate

TEN_YEARS = 3652.5


def test_angles_are_exact_after_ten_years_and_a_table_in_bfloat16_would_not_be():
    clock = RotaryClock(64).to(torch.bfloat16)  # as a model in bfloat16 moves it
    days = torch.linspace(0, TEN_YEARS, 1000, dtype=torch.float64)
    places = torch.arange(1000) % 256
    cosines, sines = clock(places, days)
    assert cosines.shape == sines.shape == (1000, 1, 32)
    assert cosines.dtype == torch.float32
    exact = days[:, None] * from_bits(clock.day_frequencies)
    by_day = cosines[:, 0, 16:].double(), sines[:, 0, 16:].double()
    assert (by_day[0] - exact.cos()).abs().max() < 4e-7
    assert (by_day[1] - exact.sin()).abs().max() < 4e-7
    assert 1e-3 < (by_day[0].bfloat16() - exact.cos()).abs().max() < 4e-3


def test_turning_keeps_lengths_and_only_distances_matter():
    clock = RotaryClock(16)
    vectors = torch.randn(2, 1, 16).expand(2, 3, 16).reshape(2, 3, 16)
    places, days = torch.tensor([3, 10]), torch.tensor([1.5, 20.0], dtype=torch.float64)
    products = []
    for shift in (0, 100):
        turned = rotate(vectors, *clock(places + shift, days + 7 * shift))
        torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))
        products.append((turned[0] * turned[1]).sum(-1))
    torch.testing.assert_close(products[0], products[1], atol=1e-4, rtol=1e-5)


def test_a_compiled_pass_computes_the_angles_once_and_keeps_them():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.named("tiny", SIZES))
    ids = {"action": torch.randint(4, 8, (3, 9))}
    batch = EventBatch.from_tensors(ids, torch.rand(3, 9), None, None)
    graphs: dict[str, list[str]] = {"forward": [], "backward": []}

    def record(name: str) -> Callable:
        def compiler(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
            graphs[name] += [str(node.target) for node in graph.graph.nodes]
            return graph.forward

        return compiler

    backend = aot_autograd(
        fw_compiler=record("forward"),
        bw_compiler=record("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    compiled = torch.compile(encoder.hidden_states, backend=backend, fullgraph=True)
    compiled(batch).sum().backward()
    assert sum("turn_of" in name for name in graphs["forward"]) == 1
    assert graphs["backward"]
    assert not any("turn_of" in name or "remainder" in name for name in graphs["backward"])
