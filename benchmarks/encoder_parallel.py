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
from encoder_setup import Bench
from torch import nn

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
    on_gpu = bench.device.type == "cuda"
    rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        bench.device = torch.device("cuda", rank)
        torch.cuda.set_device(bench.device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel = nn.parallel.DistributedDataParallel(
        bench.model(), device_ids=[rank] if on_gpu else None, gradient_as_bucket_view=True
    )
    batches = bench.batches(rank, dist.get_world_size())
    step = bench.our_step(parallel, batches)
    mine = rates(step, bench.device, bench.given.seconds, lambda count: _fewest(count, bench))
    found = torch.tensor(mine, dtype=torch.float64, device=bench.device)
    dist.all_reduce(found)
    if rank == 0:
        print(json.dumps(found.tolist()))
    dist.destroy_process_group()


def _fewest(count: int, bench: Bench) -> int:
    """Return the smallest of the processes' numbers of steps."""
    shared = torch.tensor(count, device=bench.device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)
