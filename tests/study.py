"""The study: does AtManRL work, and which reading of the paper is right?

    python -m tests.study                      # goes on where it stopped, for 100 minutes at most
    python -m tests.study --arms core --seeds 0 1 2
    python -m tests.study_report               # docs/study.md again from docs/study/*.json

First the sign experiment (tests/sign.py): what would each candidate reward pay for, before any
training? Then the arms: training runs of train.py from the same start, on the same questions, that
differ in their reward alone, each with several seeds. A run takes one thread; two go side by side.
What is kept of a run is a JSON file in docs/study/, which is committed, so that the study grows
over several sittings; the runs themselves lie in runs/study/, and a run cut short goes on from its
last checkpoint. The report, with every number in it, is made from those files alone.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from config import parse_args
from faithfulness import TOP_SHARES
from report import write_whole
from table1 import WORDS, counts_by_text, load_spacy

ROOT = Path(__file__).parent.parent
KEPT, RUNS = ROOT / "docs/study", ROOT / "runs/study"
COMMON = (  # with all that the micro preset may come to say differently
    "--steps 50 --ratio token --lr 2e-4 --saliency-weight 1 --saliency-reduction mean "
    "--no-gate-saliency --mask-steps 20 --mask-memory path --save-every 5 --keep 1"
)
LENGTH_WEIGHT = 0.38  # of the length penalty: its mean length is attribution mean's
GATED_LENGTH_WEIGHT = 0.8  # its mean length is that of share, gated, 10 steps
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
# Tried on the way to the micro preset, once each, and judged by train.py's own last evaluation.
FIRST = (
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
EVALUATIONS = {  # name: eval.py's flags; the second one's samples are among the first's
    "heldout": "--limit 300 --faithfulness off",
    "faithful": "--limit 100",
    "hard": "--split hard --limit 200 --faithfulness off",
}
SIGN_SHARDS, SIGN_QUESTIONS = 8, 25


def slug(arm: str, seed: int) -> str:
    """The name of an arm's or a pilot's files."""
    kind = "pilot-" if arm in PILOTS else ""
    return f"{kind}{arm.replace(',', '').replace(' ', '-')}-{seed}"


def train_command(arm: str, seed: int) -> list[str]:
    """Of an arm or of a pilot."""
    if arm in PILOTS:
        flags = PILOTS[arm]
    else:
        flags = "" if arm == DEFAULT else f"{COMMON} {ARMS[arm]}"
    return ["train.py", *flags.split(), "--seed", str(seed)]


# ------------------------------------------------------------------------------------ the work


class OutOfTime(Exception):
    pass


@dataclasses.dataclass
class Sitting:
    """What may be done until the deadline, in seconds since the epoch."""

    deadline: float

    def run(self, command: list, log: Path) -> None:
        """A command with one thread; OutOfTime when the sitting ends before it, which stops it."""
        if time.time() > self.deadline:
            raise OutOfTime
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )
            try:
                code = process.wait(max(1.0, self.deadline - time.time()))
            except subprocess.TimeoutExpired:
                process.terminate()  # train.py saves, eval.py has saved
                process.wait()
                raise OutOfTime from None
        if code:
            raise RuntimeError(f"{shlex.join(map(str, command))} ended with {code}; see {log}")

    def do(self, work, name: str, *arguments) -> None:
        """work(...), and a line on how it went."""
        begun = time.time()
        try:
            work(self, *arguments)
            print(f"{time.strftime('%H:%M')}  {name}: {time.time() - begun:.0f} s", flush=True)
        except OutOfTime:
            pass
        except Exception as error:  # the others go on; nobody looks at what a pool's work raises
            print(f"{time.strftime('%H:%M')}  {name}: {type(error).__name__}: {error}", flush=True)


def sign_shard(sitting: Sitting, number: int) -> None:
    out = KEPT / f"sign-{number}.json"
    if not out.exists():
        part = RUNS / f"sign-{number}.json"
        command = ["-m", "tests.sign", "--first", number * SIGN_QUESTIONS]
        command += ["--questions", SIGN_QUESTIONS, "--out", part]
        sitting.run(command, RUNS / f"sign-{number}.log")
        os.replace(part, out)


def train(sitting: Sitting, arm: str, seed: int) -> Path:
    """The finished run's folder. ValueError when what it holds is a run of other settings."""
    folder = RUNS / slug(arm, seed)
    if (folder / "config.json").exists():  # gone on with by its saved settings, so look first
        saved = json.loads((folder / "config.json").read_text())
        wanted = dataclasses.asdict(parse_args(train_command(arm, seed)[1:]))
        if saved | {"out": None} != wanted:
            raise ValueError(f"{folder} is of other settings; remove it")
    if not (folder / "checkpoint").exists():
        command = [*train_command(arm, seed), "--out", folder, "--resume", "auto"]
        sitting.run(command, RUNS / f"{folder.name}.log")
    return folder


def run_arm(sitting: Sitting, arm: str, seed: int) -> None:
    out = KEPT / f"{slug(arm, seed)}.json"
    if not out.exists():
        folder = train(sitting, arm, seed)
        evaluate(sitting, folder / "checkpoint", folder)
        write(out, {"arm": arm, "seed": seed, **read_training(folder), **read_evaluations(folder)})


def run_pilot(sitting: Sitting, pilot: str) -> None:
    out = KEPT / f"{slug(pilot, 0)}.json"
    if not out.exists():
        folder = train(sitting, pilot, 0)
        write(out, {"pilot": pilot, "seed": 0, **read_training(folder)})


def evaluate_start(sitting: Sitting) -> None:
    """The checkpoint that all arms begin with."""
    if not (KEPT / "start.json").exists():
        evaluate(sitting, "data/micro", RUNS / "start")
        write(KEPT / "start.json", {"arm": "start", "seed": 0, **read_evaluations(RUNS / "start")})


def evaluate(sitting: Sitting, model, folder: Path) -> None:
    """All EVALUATIONS of a checkpoint, within the run's folder: who removes it removes them too."""
    for evaluation, flags in EVALUATIONS.items():
        out = folder / f"eval-{evaluation}"
        if not (out / "results.json").exists():
            command = ["eval.py", "--model", model, *flags.split(), "--out", out]
            sitting.run(command, folder / f"eval-{evaluation}.log")


def write(path: Path, content: dict) -> None:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    write_whole(path, f"{text}\n".encode())


# --------------------------------------------------------------------------- what is kept of it

SECONDS = ("seconds_sampling", "seconds_masks", "seconds_policy")
UPDATE = ("step", "outcome", "saliency", "saliency_spread", "no_signal", "length", "clip_fraction")
UPDATE += SECONDS
EVAL = ("problems", "pass@1", "pass@4", "tokens", "numbers", "stop_words")


def read_training(folder: Path) -> dict:
    """config; updates: UPDATE of each; evals: step and EVAL of each."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "outcome" in line]
    evals = [(line["step"], line["eval"]) for line in lines if "eval" in line]
    return {
        "config": json.loads((folder / "config.json").read_text()) | {"out": None},
        "updates": [[round_off(line[key]) for key in UPDATE] for line in updates],
        "evals": [[step, *(round_off(found[key]) for key in EVAL)] for step, found in evals],
    }


def read_evaluations(folder: Path) -> dict:
    """heldout, hard: problem -> a row a sample, see `record_row`; reliance: problem -> sample ->
    same answer at each fraction (0, 1 or null), necessity, direct, corruption; map: problem ->
    sample, length, ranking -> AOPC comprehensiveness, AOPC sufficiency, AUROC on all tokens and
    without punctuation.
    """
    results = {
        evaluation: json.loads((folder / f"eval-{evaluation}/results.json").read_text())
        for evaluation in EVALUATIONS
    }
    models = {key: next(iter(found["models"].values())) for key, found in results.items()}
    kept: dict = {"versions": results["heldout"]["versions"]}
    for evaluation in ("heldout", "hard"):
        records = models[evaluation]["records"]
        words = counts_by_text([record["text"] for record in records], load_spacy(None))
        problems = kept.setdefault(evaluation, {})
        for record, counts in zip(records, words, strict=True):
            problems.setdefault(record["id"], []).append(record_row(record, counts))
    kept["reliance"], kept["map"] = {}, {}
    for row in models["faithful"]["reliance"]:
        same = row["same"] and [int(one) for one in row["same"]]
        values = [round_off(row[key]) for key in ("necessity", "direct", "corruption")]
        kept["reliance"].setdefault(row["id"], {})[row["sample"]] = [same, *values]
    for row in models["faithful"]["map"]:
        areas = row.get("auroc", {"all tokens": {}, "no punctuation": {}})
        kept["map"][row["id"]] = [row["sample"], row["length"], {
            ranking: [
                round_off(sum(row[test][ranking]) / len(TOP_SHARES))
                for test in ("comprehensiveness", "sufficiency")
            ] + [round_off(areas[which].get(ranking)) for which in ("all tokens", "no punctuation")]
            for ranking in row["comprehensiveness"]
        }]  # fmt: skip
    return kept


def record_row(record: dict, counts: dict) -> list[int]:
    """correct, valid, truncated, no delimiter, reasoning tokens, then table1.WORDS."""
    flags = [int(record[key]) for key in ("correct", "valid", "truncated", "no_delimiter")]
    return [*flags, len(record["reasoning"]), *(counts[kind] for kind in WORDS)]


def round_off(value):
    """Five significant digits are more than any interval can use."""
    if isinstance(value, bool) or value is None:
        return value if value is None else int(value)
    return float(f"{value:.5g}") if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of every arm")
    parser.add_argument(
        "--arms", nargs="*", default=["all"], metavar="ARM",
        help=f"all, core (the first {len(CORE)}), pilots (which take seed 0 alone), or some of: "
        f"{', '.join(map(repr, ARMS))}; {', '.join(map(repr, PILOTS))}",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=100, help="stop after that; what ran goes on next time"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--no-sign", action="store_true", help="leave the sign experiment out")
    args = parser.parse_args()
    groups = {"all": [*ARMS, *PILOTS], "core": list(CORE), "pilots": list(PILOTS)}
    arms = [arm for name in args.arms for arm in groups.get(name, [name])]
    for arm in arms:
        if arm not in groups["all"]:
            parser.error(
                f"--arms {arm}: choose {', '.join(groups)}, or of "
                f"{', '.join(map(repr, groups['all']))}"
            )
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    sitting = Sitting(time.time() + 60 * args.minutes)
    jobs = []
    if not args.no_sign:
        jobs += [(sign_shard, f"sign, part {shard}", shard) for shard in range(SIGN_SHARDS)]
    jobs.append((evaluate_start, "start"))
    # The core arms of all seeds before the others: what is missing is missing for all.
    first = [*CORE, DEFAULT]
    for group in (
        [a for a in first if a in arms],
        [a for a in ARMS if a in arms and a not in first],
    ):
        jobs += [(run_arm, f"{a}, seed {seed}", a, seed) for seed in args.seeds for a in group]
    jobs += [(run_pilot, f"pilot: {a}", a) for a in PILOTS if a in arms]
    pool = ThreadPoolExecutor(args.workers)
    try:
        for job in jobs:
            pool.submit(sitting.do, *job)
        pool.shutdown()
    except KeyboardInterrupt:  # which the running commands have got as well
        pool.shutdown(cancel_futures=True)
    from tests import study_report  # which imports this module

    study_report.report()


if __name__ == "__main__":
    main()
