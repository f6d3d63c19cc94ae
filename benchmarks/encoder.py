"""How fast the encoder trains and embeds, beside BERT and a plain compiled transformer.

Runs where only torch, numpy, pyarrow, safetensors and transformers are installed:

    python benchmarks/encoder.py --sequences DIR --vocabulary DIR

All contenders see the same real users in the same run, with batches that lie on the device, and
take the same optimizer. Events are counted once, padding and masked copies not at all. Model FLOPs
are those of the passes done over real tokens, attention included, three times a forward pass.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from encoder_data import keep_users, newest_actions, read_users
from encoder_parallel import USERS_VARIABLE, rate_of_two, work
from encoder_rates import rates
from encoder_setup import Bench
from figures import figure, measured, publish
from torch import nn

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import (
    ATTENTIONS,
    PRECISIONS,
    PRESETS,
    EncoderConfig,
)
from behavior_pipeline.encoder.inference import encode_table, fast_copy, read_out
from behavior_pipeline.encoder.sequence_files import SequenceTable

PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200
TWO = 2

Line = dict[str, object]


def train_mfu(bench: Bench) -> Line:
    """Model FLOPs of our training over the chip's peak."""
    events, flops = bench.ours()
    shares = [rate / (bench.given.peak_tflops * 1e12) for rate in flops]
    return measured(
        "train_mfu",
        statistics.median(shares),
        f"of {bench.given.peak_tflops:g} TFLOP/s",
        spread=[round(min(shares), 4), round(max(shares), 4)],
        events_per_second=round(statistics.median(events)),
    )


def train_over(name: str, module: str, number_format: str, peer: str, bench: Bench) -> Line:
    """Our events a second in training beside those of a peer."""
    theirs = bench.peer(module, number_format)
    return figure(name, bench.ours()[0], f"{peer}, {number_format}", theirs, "events/s")


def infer_over_hf_bf16(bench: Bench) -> Line:
    """Users embedded a second, from events in memory to vectors in memory, beside BERT's."""
    import encoder_peers  # noqa: PLC0415 - needs transformers

    table = read_users(bench.users, bench.given.infer_users)
    torch.manual_seed(0)
    encoder = Encoder(bench.shape).to(bench.device).eval()
    if bench.device.type == "cuda":
        encoder = fast_copy(encoder, is_compiled=bench.given.compile)
    ours = rates(partial(embed, encoder, table), bench.device, bench.given.seconds, warm_up=1)
    bert = encoder_peers.BertInference(bench.shape).to(bench.device, torch.bfloat16).eval()
    work_of_bert = partial(embed_by_bert, bert, table, bench)
    theirs = rates(work_of_bert, bench.device, bench.given.seconds, warm_up=1)
    peer = f"Hugging Face BERT, padded to {bench.shape.max_events}, bf16"
    line = figure("infer_over_hf_bf16", ours, peer, theirs, "users/s")
    return {**line, "embedded_users": len(table)}


def infer_cpu_over_padded(bench: Bench) -> Line:
    """Users embedded a second on the CPU beside the same model on padded batches."""
    table = read_users(bench.users, bench.given.cpu_users)
    shape = EncoderConfig.named(bench.given.cpu_preset, bench.shape.field_sizes)
    torch.manual_seed(0)
    encoder, cpu = Encoder(shape).eval(), torch.device("cpu")
    ours = rates(partial(embed, encoder, table), cpu, bench.given.seconds, warm_up=1)
    # Padded, every user costs the same: some are enough.
    some = read_users(bench.users, bench.given.cpu_users // 8)
    theirs = rates(partial(embed_padded, encoder, some), cpu, bench.given.seconds, warm_up=1)
    peer = f"the same model, padded to {shape.max_events}, fp32"
    line = figure("infer_cpu_over_padded", ours, peer, theirs, "users/s")
    about = {"preset": bench.given.cpu_preset, "device": "CPU", "threads": torch.get_num_threads()}
    return {**line, **about}


def embed(encoder: Encoder, table: SequenceTable) -> int:
    """Embed a table's users as the nightly run does."""
    found = encode_table(encoder, table)
    read_out(encoder, found.states, found.silence_days)
    return len(table)


@torch.inference_mode()
def embed_by_bert(bert: nn.Module, table: SequenceTable, bench: Bench) -> int:
    """Embed a table's users in padded batches, in the order in which they come."""
    size = bench.given.peer_users
    for begin in range(0, len(table), size):
        users = np.arange(begin, min(begin + size, len(table)))
        ids = torch.from_numpy(newest_actions(table, users, bench.shape.max_events))
        ids = ids.to(bench.device)
        bert(ids, (ids != 0).long()).float().cpu()
    return len(table)


@torch.inference_mode()
def embed_padded(encoder: Encoder, table: SequenceTable, size: int = 64) -> int:
    """Embed a table's users with our model as one would without packing: all padded alike."""
    length = encoder.config.max_events
    for begin in range(0, len(table), size):
        users = np.arange(begin, min(begin + size, len(table)))
        ends = table.offsets[users + 1]
        kept = np.minimum(ends - table.offsets[users], length)
        is_event = np.arange(length) < kept[:, None]
        source = np.where(is_event, (ends - kept)[:, None] + np.arange(length), 0)
        ids = {
            name: torch.from_numpy(np.where(is_event, table.ids[name][source], 0).astype(np.int64))
            for name in encoder.config.field_sizes
        }
        gaps = torch.from_numpy(np.where(is_event, table.gap_days[source], 0).astype(np.float32))
        encoder.encode(ids, gaps)["embedding"].numpy()
    return len(table)


def two_gpu_efficiency(bench: Bench) -> Line:
    """Events a second of two processes over twice those of one."""
    both = rate_of_two(bench)
    twice = [TWO * rate for rate in bench.ours()[0]]
    return figure("two_gpu_efficiency", both, "twice one", twice, "events/s")


BERT = "Hugging Face BERT, padded"
FIGURES: dict[str, Callable[[Bench], Line]] = {
    "train_mfu": train_mfu,
    "train_over_hf_bf16": partial(train_over, "train_over_hf_bf16", "BertTraining", "bf16", BERT),
    "train_over_hf_fp32": partial(train_over, "train_over_hf_fp32", "BertTraining", "fp32", BERT),
    "train_over_compiled": partial(
        train_over, "train_over_compiled", "PlainTransformer", "bf16", "compiled torch, padded"
    ),
    "infer_over_hf_bf16": infer_over_hf_bf16,
    "infer_cpu_over_padded": infer_cpu_over_padded,
    "two_gpu_efficiency": two_gpu_efficiency,
}


def chosen(given: argparse.Namespace) -> list[str]:
    """Return the figures to measure: those asked for, or all that the device has a place for."""
    if given.only:
        return [name for name in FIGURES if name in given.only.split(",")]
    if given.device == "cpu":
        return ["infer_cpu_over_padded"]
    has_two = torch.cuda.device_count() >= TWO
    left_out = {"infer_cpu_over_padded"} | (set() if has_two else {"two_gpu_efficiency"})
    return [name for name in FIGURES if name not in left_out]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=Path, required=True, help="folder of sequence files")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the vocabulary")
    parser.add_argument("--only", help=f"some of {','.join(FIGURES)}")
    parser.add_argument("--preset", choices=PRESETS, default="base", help="of GPU figures")
    parser.add_argument("--cpu-preset", choices=PRESETS, default="small", help="of CPU figures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--precision", choices=PRECISIONS, help="of ours; default the preset's")
    parser.add_argument("--attention", choices=ATTENTIONS, help="of ours; default auto")
    parser.add_argument(
        "--profile", action="store_true", help="tell where the time of a training step of ours goes"
    )
    parser.add_argument("--batch-tokens", type=int, help="of ours; default the preset's")
    parser.add_argument("--peer-users", type=int, default=128, help="in a padded batch")
    parser.add_argument("--infer-users", type=int, default=16_384, help="embedded on the GPU")
    parser.add_argument("--cpu-users", type=int, default=8192, help="embedded on the CPU")
    parser.add_argument("--min-events", type=int, default=5, help="users with fewer are left out")
    parser.add_argument("--max-users", type=int, default=200_000, help="users at the most")
    parser.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available()
    )
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    given = parse()
    if users := os.environ.get(USERS_VARIABLE):
        work(Bench(given, Path(users)))
        return
    with tempfile.TemporaryDirectory() as folder:
        kept = keep_users(
            given.sequences, Path(folder) / "users", given.min_events, given.max_users
        )
        bench = Bench(given, kept)
        lines = [measure(name, bench) for name in chosen(given)]
        publish("encoder", lines, is_kept=not given.only)


def measure(name: str, bench: Bench) -> Line:
    """Measure one figure and give back the memory that it took."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    line = FIGURES[name](bench)
    print(f"{name} {line['value']}", file=sys.stderr, flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    return line | {key: value for key, value in bench.about.items() if key not in line}


if __name__ == "__main__":
    main()
