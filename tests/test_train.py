"""End to end on the shipped checkpoint: commands as a user types them, each its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SMALL = (
    "--steps 2 --questions 2 --rollouts 4 --micro-batch 2 --mask-steps 2 --eval-problems 4 "
    "--eval-samples 2 --eval-every 1 --eval-every-problems 2 --max-new-tokens 96 --device cpu"
).split()


def run(*command, ok=True):
    """Run a command in the repository with one thread; returns its output, checks its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    return output


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    return out, run("train.py", *SMALL, "--out", out)


def test_a_run_leaves_metrics_samples_a_checkpoint_and_the_table(one_process):
    out, printed = one_process
    assert "before" in printed and "after" in printed and "tokens per trace" in printed
    lines = read_lines(out / "metrics.jsonl")
    updates = [line for line in lines if "outcome" in line]
    assert [line["step"] for line in updates] == [1, 2]
    assert [line["step"] for line in lines if "eval" in line] == [0, 1, 2]
    for line in updates:
        assert line["reward"] == pytest.approx(line["outcome"] + 0.3 * line["saliency"], abs=1e-6)
        assert line["loss"] == pytest.approx(0, abs=1e-5)  # on-policy: advantages sum to 0
    samples = read_lines(out / "samples.jsonl")
    assert len(samples) == 2 * 2 * 4
    assert {sample["outcome"] for sample in samples} <= {0.0, -1.0}
    for group in (samples[n : n + 4] for n in range(0, len(samples), 4)):
        assert len({sample["id"] for sample in group}) == 1
        assert sum(sample["advantage"] for sample in group) == pytest.approx(0, abs=1e-5)
    assert json.loads((out / "config.json").read_text())["mask_steps"] == 2
    assert (out / "curves.png").stat().st_size > 1000
    trained, start = (
        load_file(d / "model.safetensors") for d in (out / "checkpoint", ROOT / "data/micro")
    )
    assert any(not torch.equal(trained[key], start[key]) for key in start)


def test_the_checkpoint_of_a_run_is_evaluated_like_any_other(one_process):
    out, _ = one_process
    printed = run(
        "eval.py", "--model", out / "checkpoint", "--compare", "data/micro", "--limit", "3",
        "--samples", "2", "--auroc-traces", "0", "--out", out / "eval", "--device", "cpu",
    )  # fmt: skip
    assert "accuracy (pass@1)" in printed and "blank English" in printed
    results = json.loads((out / "eval/results.json").read_text())["models"]
    assert all(len(entry["records"]) == 6 for entry in results.values()) and len(results) == 2


def test_the_same_seed_gives_the_same_run(one_process, tmp_path):
    out, _ = one_process
    run("train.py", *SMALL, "--out", tmp_path / "again")
    assert read_lines(tmp_path / "again/samples.jsonl") == read_lines(out / "samples.jsonl")


def test_two_processes_equal_one(one_process, tmp_path):
    out, _ = one_process
    run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py", *SMALL,
        "--out", tmp_path / "two",
    )  # fmt: skip
    one, two = read_lines(out / "samples.jsonl"), read_lines(tmp_path / "two/samples.jsonl")
    assert [s["text"] for s in one] == [s["text"] for s in two]
    for a, b in zip(one, two, strict=True):
        assert a["advantage"] == pytest.approx(b["advantage"], abs=1e-4)
    weights = [load_file(d / "checkpoint/model.safetensors") for d in (out, tmp_path / "two")]
    start = load_file(ROOT / "data/micro/model.safetensors")
    moved = torch.cat([(weights[0][key] - start[key]).flatten() for key in start]).norm()
    apart = torch.cat([(weights[0][key] - weights[1][key]).flatten() for key in start]).norm()
    assert apart < 0.02 * moved  # float noise, which Adam's first steps enlarge


def test_three_processes_share_rollouts_that_do_not_divide(one_process, tmp_path):
    out, _ = one_process
    run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "train.py", *SMALL,
        "--out", tmp_path / "three",
    )  # fmt: skip
    one, three = read_lines(out / "samples.jsonl"), read_lines(tmp_path / "three/samples.jsonl")
    assert [s["text"] for s in one] == [s["text"] for s in three]


def test_outcome_only_learns_no_mask(tmp_path):
    run("train.py", *SMALL, "--saliency", "none", "--steps", "1", "--out", tmp_path / "run")
    (update,) = (line for line in read_lines(tmp_path / "run/metrics.jsonl") if "outcome" in line)
    assert update["saliency"] == 0 and update["reward"] == update["outcome"]


def test_gsm8k_files_train_too(tmp_path):
    lines = [
        {"question": f"Ann has {n} pens and buys {n}. How many?", "answer": f"Sum.\n#### {2 * n:,}"}
        for n in range(3, 903, 100)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = run(
        "train.py", *SMALL, "--dataset", "gsm8k", "--data-dir", tmp_path, "--steps", "1",
        "--saliency", "mask", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "tokens per trace" in printed
    samples = read_lines(tmp_path / "run/samples.jsonl")
    assert {sample["id"].split("/")[0] for sample in samples} == {"gsm8k"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--no-such-flag 1", "--no-such-flag"),
        ("--model nowhere", "--model nowhere"),
        ("--dataset gsm8k --data-dir nowhere", "nowhere"),
        ("--rollouts 1", "--rollouts"),
        ("--micro-batch 3", "--micro-batch 3"),
        ("--temperature 0", "--temperature"),
        ("--questions 20000 --micro-batch 1", "--questions 20000"),
        ("--spacy-model no_such_pipeline", "--spacy-model no_such_pipeline"),
        ("--saliency loud", "--saliency"),
    ],
)
def test_bad_input_gets_a_sentence_and_leaves_nothing(arguments, named, tmp_path):
    printed = run("train.py", *SMALL, *arguments.split(), "--out", tmp_path / "run", ok=False)
    assert named in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    for file in (ROOT / "data/micro").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    printed = run("train.py", *SMALL, "--model", tmp_path, "--out", tmp_path / "run", ok=False)
    assert str(weights) in printed and "Traceback" not in printed


def test_a_folder_with_a_run_is_not_overwritten(one_process):
    out, _ = one_process
    before = (out / "metrics.jsonl").read_bytes()
    printed = run("train.py", *SMALL, "--out", out, ok=False)
    assert f"--out {out}" in printed and (out / "metrics.jsonl").read_bytes() == before
