"""Two processes, one of whose batches has no use for a head; torchrun starts this."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from behavior_pipeline.encoder.parallel import Model, Reducer, joining


class Heads(nn.Module):
    """Two heads, of which a batch asks for one or both."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.seldom = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, encoder: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        hidden = encoder(batch["values"])
        total = self.often(hidden).square().mean()
        if batch["is_rare"]:
            total = total + self.seldom(hidden).square().mean()
        return {"total": total}


def main(out: Path) -> None:
    """Write the gradients of the rare head for steps in which nobody, one or both ask for it."""
    with joining("cpu") as processes:
        torch.manual_seed(0)
        model = Model(nn.Linear(3, 2), Heads(), is_parallel=True)
        reducer = Reducer(model, processes)
        found = []
        for who in ((), (1,), (0, 1), ()):
            model.zero_grad()
            batch = {"values": torch.ones(4, 3), "is_rare": processes.rank in who}
            (share,) = reducer.shares([4])
            with reducer.passes(is_last=True):
                (reducer.replica(batch)["total"] * share).backward()
            gradient = model.objectives.seldom.weight.grad
            found.append(0.0 if gradient is None else float(gradient.abs().sum()))
        if processes.is_first:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
