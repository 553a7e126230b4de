"""Does this checkout compute what another one does, bit for bit? For rebuilding without changing.

    git worktree add ../before 9db5804
    python -m tests.same_as ../before                  # all checks, some 15 minutes on 2 cores
    python -m tests.same_as ../before --only train     # one of them

Each check runs the same command in both checkouts, one thread a process, and compares what the two
wrote: weights byte by byte, samples line by line, metrics.jsonl without its timings, results.json
without the command and the paths, docs/study.md byte by byte. The exit status is the number of
checks that failed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.study.arms import read_lines
from tests.kills import timeless

HERE = Path(__file__).resolve().parents[1]
SMALL = (
    "--questions 4 --rollouts 4 --micro-batch 4 --mask-steps 4 --eval-problems 8 --eval-samples 2 "
    "--eval-every 2 --eval-every-problems 4 --save-every 2 --max-new-tokens 120 --device cpu"
).split()
TRAINED = {  # name: the settings of a run of one process
    "default": [],
    "mask": "--saliency mask --no-gate-saliency --ratio sequence --mask-sparsity 0.001".split(),
    "literal": "--saliency mask --saliency-sign literal --shuffle-saliency".split(),
    "share": "--saliency attribution --saliency-reduction share --precision bfloat16 --zero "
    "--recompute".split(),
    "outcome": "--saliency none --logit-chunk 16".split(),
}
EVALUATION = "--limit 6 --samples 2 --mask-steps 6 --mask-sparsity 0.001 --bootstrap 200".split()


def launch(checkout: Path, *command, processes: int = 1) -> subprocess.Popen:
    """Start a command of a checkout there; with several processes, under torchrun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), *map(str, command)],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, status: int = 0) -> None:
    """Wait for the command. ValueError with the end of its error output for another exit status."""
    _, errors = process.communicate()
    if process.returncode != status:
        raise ValueError(f"exit status {process.returncode}: {errors[-600:]}")


def train(checkout: Path, folder: Path) -> None:
    for name, settings in TRAINED.items():
        finish(
            launch(checkout, "train.py", *SMALL, "--steps", 3, *settings, "--out", folder / name)
        )


def two(checkout: Path, folder: Path) -> None:
    command = ["train.py", *SMALL, "--steps", 3, "--out", folder / "two"]
    finish(launch(checkout, *command, processes=2))


def resume(checkout: Path, folder: Path) -> None:
    """Two runs of six updates: one killed after three, one asked to stop; both resumed."""
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM)):
        run = folder / name
        process = launch(checkout, "train.py", *SMALL, "--steps", 6, "--out", run)
        while process.poll() is None and updates_in(run) < 3:
            time.sleep(0.05)
        process.send_signal(number)
        finish(process, -number if number == signal.SIGKILL else 128 + number)
        finish(launch(checkout, "train.py", "--resume", run))


def updates_in(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"outcome"') if path.exists() else 0


def evaluate(checkout: Path, folder: Path) -> None:
    """data/micro against a copy of it whose weights were shaken."""
    from safetensors.torch import load_file, save_file

    shaken = folder.parents[1] / "shaken"
    if not shaken.exists():
        shutil.copytree(HERE / "data/micro", shaken)
        weights = load_file(shaken / "model.safetensors")
        weights = {name: weight * 1.01 for name, weight in weights.items()}
        save_file(weights, shaken / "model.safetensors", {"format": "pt"})
    command = ["eval.py", "--model", "data/micro", "--compare", shaken, *EVALUATION]
    finish(launch(checkout, *command, "--out", folder / "evaluation"))


def study(checkout: Path, folder: Path) -> None:
    """docs/study.md from the other checkout's docs: its kept runs, and its template's words."""
    if checkout != HERE:
        module = "lab.study.report" if (checkout / "lab/study").is_dir() else "tests.study_report"
        finish(launch(checkout, "-m", module))
        shutil.copy(checkout / "docs/study.md", folder / "study.md")
        return
    docs = folder / "docs"
    shutil.copytree(OTHER[0] / "docs", docs)
    program = f"import pathlib, lab.study.report as r; r.report(pathlib.Path({str(docs)!r}))"
    finish(launch(checkout, "-c", program))
    (docs / "study.md").rename(folder / "study.md")


OTHER = []  # the checkout to compare with
CHECKS = {"train": train, "two": two, "resume": resume, "evaluate": evaluate, "study": study}


def content(path: Path):
    """What of a file is compared: bytes, or JSON without what must differ."""
    if path.name == "metrics.jsonl":
        return [timeless(line) for line in read_lines(path)]
    if path.name == "results.json":
        results = json.loads(path.read_text())
        del results["command"], results["arguments"]["out"]
        for entry in results["models"].values():
            del entry["checkpoint"]
        return results
    return path.read_bytes()


def differences(mine: Path, theirs: Path) -> list[str]:
    """Names of the files that are not equal, or in one of the folders alone."""
    kept = ("*.safetensors", "metrics.jsonl", "samples.jsonl", "results.json", "study.md")
    names = sorted(
        {
            path.relative_to(folder)
            for folder in (mine, theirs)
            for pattern in kept
            for path in folder.rglob(pattern)
        }
    )
    if not names:
        return ["nothing was written"]
    return [
        str(name)
        for name in names
        if not ((mine / name).exists() and (theirs / name).exists())
        or content(mine / name) != content(theirs / name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--only", choices=CHECKS, nargs="+", default=list(CHECKS))
    args = parser.parse_args()
    failed = 0
    OTHER.append(args.checkout.resolve())
    with tempfile.TemporaryDirectory() as place:
        for name in args.only:
            folders = []
            for side, checkout in (("mine", HERE), ("theirs", args.checkout.resolve())):
                folders.append(Path(place) / side / name)
                folders[-1].mkdir(parents=True)
                CHECKS[name](checkout, folders[-1])
            files = sum(path.is_file() for path in folders[0].rglob("*"))
            unequal = differences(*folders)
            failed += bool(unequal)
            verdict = f"DIFFERENT: {', '.join(unequal)}" if unequal else "equal"
            print(f"{name}: {verdict} ({files} files)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
