from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from encoder_builders import Folders

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "encoder.py"
PROGRAM = f"""
import runpy, sys
sys.path.insert(0, {str(BENCHMARK.parent)!r})
sys.argv[0] = {str(BENCHMARK)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
# What a bare GPU machine lacks; what it has may load pandas or scikit-learn where they exist.
found = {{"duckdb", "polars", "dagster", "feast", "dbt"}} & sys.modules.keys()
sys.exit(f"loaded {{found}}" if found else 0)
"""


def run_for(folders: Folders, figures: str, *more: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-c", PROGRAM,
        "--sequences", str(folders.sequences), "--vocabulary", str(folders.vocabulary),
        "--device", "cpu", "--preset", "tiny", "--cpu-preset", "tiny", "--precision", "float32",
        "--seconds", "0.01", "--peer-users", "8", "--infer-users", "20", "--cpu-users", "40",
        "--only", figures, *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def run(folders: Folders, figures: str) -> dict[str, dict]:
    done = run_for(folders, figures)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["figure"]: line for line in lines}


@pytest.mark.slow
def test_every_figure_is_printed_on_a_machine_with_little_installed(folders):
    names = [
        "train_mfu", "train_over_hf_bf16", "train_over_hf_fp32", "train_over_compiled",
        "infer_over_hf_bf16", "infer_cpu_over_padded",
    ]  # fmt: skip
    kept = BENCHMARK.parent / "results" / "encoder.jsonl"
    before = kept.read_bytes() if kept.exists() else None
    lines = run(folders, ",".join(names))
    assert list(lines) == names
    for line in lines.values():
        assert {"value", "unit", "spread", "machine", "date", "command", "users"} <= line.keys()
        assert line["users"] < 60  # those with fewer than five events are left out
    for name in names[1:]:
        line = lines[name]
        assert line["ratio"] == pytest.approx(line["value"] / line["peer_value"], rel=0.02)
        assert line["spread"][0] <= line["value"] <= line["spread"][1]
    assert lines["train_mfu"]["events_per_second"] > 0
    assert 0.3 < lines["train_mfu"]["fill_rate"] <= 1
    assert (kept.read_bytes() if kept.exists() else None) == before  # a part is not kept


@pytest.mark.slow
def test_two_processes_are_measured_beside_one(folders):
    line = run(folders, "two_gpu_efficiency")["two_gpu_efficiency"]
    assert line["value"] > 0
    assert line["peer"] == "twice one"


@pytest.mark.slow
def test_a_profile_tells_where_a_step_s_time_goes(folders):
    errors = run_for(folders, "train_mfu", "--profile").stderr
    lines = errors[errors.index("ms/step") :].splitlines()
    assert "aten::" in lines[1]
    assert lines[1].split()[0] > "0"
    shares = [float(line.split()[1].rstrip("%")) for line in lines[1:27]]
    assert shares[:25] == sorted(shares[:25], reverse=True)
    assert shares[25] == 100
    assert lines[26].endswith("all")
