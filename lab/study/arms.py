"""The study's arms: runs of train.py that differ in their reward alone, and how each is measured.

An arm is trained with several seeds. A pilot was tried once on the way to the micro preset and was
judged by train.py's own last evaluation.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMON = (  # with all that the micro preset may come to say differently
    "--steps 50 --ratio token --lr 2e-4 --saliency-weight 1 --saliency-reduction mean "
    "--no-gate-saliency --mask-steps 20 --mask-memory path --save-every 5 --keep 1"
)
LENGTH_WEIGHT = 0.38  # at which the length penalty ends with attribution mean's mean length
GATED_LENGTH_WEIGHT = 0.8  # at which it ends with the mean length of share, gated, 10 steps
CORE = {
    "outcome only": "--saliency none",
    "mask restored": "--saliency mask",
    "attribution even": "--saliency attribution --saliency-reduction even",
    "attribution mean": "--saliency attribution --saliency-reduction mean",
    "length penalty": f"--saliency length --saliency-weight {LENGTH_WEIGHT}",
    "shuffled": "--saliency attribution --saliency-reduction mean --shuffle-saliency",
}
DEFAULT = "micro preset"  # what the study recommends: train.py as it is
ARMS = CORE | {
    DEFAULT: "",
    "share, gated": "--saliency attribution --saliency-reduction share --gate-saliency",
    "share, gated, 10 steps": "--saliency attribution --saliency-reduction share --gate-saliency "
    "--mask-steps 10",
    "mask literal": "--saliency mask --saliency-sign literal",
    "mask sparse": "--saliency mask --mask-sparsity 1e-3",
    "attribution share": "--saliency attribution --saliency-reduction share",
    "length, gated": f"--saliency length --saliency-weight {GATED_LENGTH_WEIGHT} --gate-saliency",
}
FIRST = (  # the common flags of the first pilots
    "--steps 40 --ratio sequence --lr 2e-4 --saliency-weight 1 --saliency-reduction mean "
    "--no-gate-saliency --mask-steps 5 --mask-memory steps"
)
THEN = f"{COMMON} --mask-steps 10 --saliency attribution --gate-saliency --saliency-reduction"
PILOTS = {
    "outcome only, 1e-4": f"{FIRST} --saliency none --lr 1e-4",
    "outcome only, per token": f"{FIRST} --saliency none --ratio token",
    "mean, gated": f"{FIRST} --gate-saliency",
    "mean, gated, 1e-4": f"{FIRST} --gate-saliency --lr 1e-4 --saliency-weight 2 --steps 60",
    "share, gated, per sequence": f"{FIRST} --saliency-reduction share --gate-saliency",
    "share, gated, 1e-4": f"{FIRST} --saliency-reduction share --gate-saliency --lr 1e-4 "
    "--steps 60",
    "share, gated, weight 2": f"{THEN} share --saliency-weight 2",
    "share, gated, weight 4": f"{THEN} share --saliency-weight 4",
}
EVALUATIONS = {  # name -> eval.py's flags; the second one's samples are among the first one's
    "heldout": "--limit 300 --faithfulness off",
    "faithful": "--limit 100",
    "hard": "--split hard --limit 200 --faithfulness off",
}


def slug(name: str, seed: int) -> str:
    """The name of the files of an arm or a pilot."""
    kind = "pilot-" if name in PILOTS else ""
    return f"{kind}{name.replace(',', '').replace(' ', '-')}-{seed}"


def train_command(name: str, seed: int) -> list[str]:
    """The command that trains an arm or a pilot, without python."""
    flags = PILOTS.get(name) or ("" if name == DEFAULT else f"{COMMON} {ARMS[name]}")
    return ["train.py", *flags.split(), "--seed", str(seed)]


def launch(command: list, **options) -> subprocess.Popen:
    """Start a command of this checkout, without python, with one thread."""
    command, environment = [sys.executable, *map(str, command)], {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **options)


def read_lines(path: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl or samples.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
