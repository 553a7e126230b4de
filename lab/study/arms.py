"""The study's arms: runs of train.py that differ in their reward alone, and how each is measured.

An arm is trained with several seeds. A pilot was tried once, with seed 0, to set a weight; it is
judged by the rollouts of its own training problems, which no table of the arms is about.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMON = (  # with all that the micro preset may come to say differently
    "--steps 30 --lr 2e-4 --ratio token --saliency-weight 1 --no-gate-saliency --mask-steps 20 "
    "--mask-memory path --eval-every 0 --eval-problems 16 --save-every 10 --keep 1"
)
WEIGHT = 1  # of the fixed masks' rewards, all on the scale of a probability
PENALTY = 0.4  # per 100 reasoning tokens
ARMS = {
    "outcome only": "--saliency none",
    "mediation": f"--saliency mediation --saliency-weight {WEIGHT}",
    "paper's mask": "--saliency mask",
    "length penalty": f"--saliency none --length-penalty {PENALTY}",
    "necessity": f"--saliency necessity --saliency-weight {WEIGHT}",
    "sufficiency": f"--saliency sufficiency --saliency-weight {WEIGHT}",
    "CIR": f"--saliency cir --saliency-weight {WEIGHT}",
    "attribution even": "--saliency attribution --saliency-reduction even --gate-saliency "
    "--saliency-weight 2",
    "mediation, shuffled": f"--saliency mediation --saliency-weight {WEIGHT} --shuffle-saliency",
    "mediation, penalty": f"--saliency mediation --saliency-weight {WEIGHT} "
    f"--length-penalty {PENALTY}",
    "blind answers": "--saliency none --blind-answers",
    "mediation x 10": f"--saliency mediation --saliency-weight {10 * WEIGHT}",
}
BASES = ("outcome only", "length penalty", "CIR")  # what the others are compared with
RECOMMENDED = "mediation"
PILOTS = {
    f"{name}, {weight:g}": f"--saliency {name} --saliency-weight {weight:g} --steps 12"
    for name, weight in [("mediation", 1), ("mediation", 4), ("mediation", 16), ("sufficiency", 4)]
}
EVALUATIONS = {  # name -> eval.py's flags; the second one's samples are among the first one's
    "heldout": "--limit 300 --faithfulness off",
    "faithful": "--limit 60 --faithfulness reliance",
    "hard": "--split hard --limit 60 --faithfulness reliance",
}


def slug(name: str, seed: int) -> str:
    """The name of the files of an arm or a pilot."""
    kind = "pilot-" if name in PILOTS else ""
    return f"{kind}{name.replace(',', '').replace(' ', '-')}-{seed}".replace("'", "")


def train_command(name: str, seed: int, task: str = "micro") -> list[str]:
    """The command that trains an arm or a pilot from a task's start, without python."""
    flags = f"{COMMON} {PILOTS.get(name) or ARMS[name]} --model data/{task} --dataset {task}"
    return ["train.py", *flags.split(), "--seed", str(seed)]


def launch(command: list, **options) -> subprocess.Popen:
    """Start a command of this checkout, without python, with one thread."""
    command, environment = [sys.executable, *map(str, command)], {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **options)


def read_lines(path: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl or samples.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
