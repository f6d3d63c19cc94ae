"""Training of the encoder's benchmark in two processes beside one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from encoder_rates import rates
from encoder_setup import Bench, Training

from behavior_pipeline.encoder.parallel import joining

USERS_VARIABLE = "BENCHMARK_USERS"


def rate_of_two(bench: Bench) -> list[float]:
    """Return the events a second of two processes together, round by round."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(Path(__file__).with_name("encoder.py")), *sys.argv[1:],
    ]  # fmt: skip
    environment = {**os.environ, USERS_VARIABLE: str(bench.users)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(bench: Bench) -> None:
    """Train as one of several processes; the first prints the events a second of all of them."""
    with joining(bench.given.device) as processes:
        bench.device = processes.device
        training = Training(bench, processes)
        mine = rates(
            training.step, bench.device, bench.given.seconds, lambda count: _fewest(count, bench)
        )
        found = processes.sum(torch.tensor(mine, dtype=torch.float64, device=bench.device))
        if processes.is_first:
            print(json.dumps(found.tolist()))


def _fewest(count: int, bench: Bench) -> int:
    """Return the smallest of the processes' numbers of steps."""
    shared = torch.tensor(count, device=bench.device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)
