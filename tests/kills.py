"""Kill a micro run at random moments, resume it, and compare it with one that was never killed.

    python -m tests.kills                     # 20 runs, one thread, about 8 minutes
    python -m tests.kills --kills 3 --seed 1

Each run is killed by SIGKILL (nothing it could notice), in turn
1. by the clock, at any moment of a process's life, from the start of Python to its last line;
2. before a file operation drawn from those on the run's folder (open, mkdir, rename, unlink ...):
   by the clock, hardly a kill would fall in a checkpoint half written or between two renames.
Every fourth run is killed a second time, before a file operation of the process that resumes it.

Then `train.py --resume auto` ends it, and these must be equal to the last byte: checkpoint/, best/,
the last checkpoints' weights and optimiser, samples.jsonl, and metrics.jsonl but for time and
memory. Nothing half written may be left. Prints where each kill hit; exit status 1 if one differs.
"""

import argparse
import atexit
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = (
    "--steps 5 --questions 2 --rollouts 2 --micro-batch 2 --mask-steps 1 --eval-problems 2 "
    "--eval-samples 1 --eval-every 1 --eval-every-problems 1 --save-every 2 --max-new-tokens 64 "
    "--device cpu"
).split()
MEASURED = re.compile(r"seconds_.*|.*_per_second|peak_memory_gib")  # no two runs agree on these
# These hold, or depend on, the times in metrics.jsonl, or what was typed.
UNLIKE = ("state.json", "curves.png", "commands.txt")
OPERATIONS = {  # as Python's audit events name them -> how many of the arguments are paths
    "open": 1,
    "os.mkdir": 1,
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
}


def count_file_operations(folder: str, die_before: int) -> None:
    """Count this process's file operations on the folder; die before that one, 0 for never.

    Runs inside the process that is to die. Python tells of each operation before it happens.
    """
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event not in OPERATIONS:
            return
        paths = [path for path in arguments[: OPERATIONS[event]] if isinstance(path, (str, Path))]
        if not any(str(path).startswith(folder) for path in paths):
            return
        seen += 1
        if seen == die_before:
            names = " ".join(os.path.relpath(path, folder) for path in paths)
            os.write(1, f"\nbefore {event.removeprefix('os.')} {names}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if not die_before:
        atexit.register(lambda: print(f"{seen} file operations"))


def start(folder: Path, log: Path, die_before: int = 0, settings=SETTINGS) -> subprocess.Popen:
    """`python train.py SETTINGS --resume auto --out FOLDER`, with its operations counted."""
    program = (
        f"from tests.kills import count_file_operations as count; count({str(folder)!r}, "
        f"{die_before}); import train; train.main()"
    )
    command = [sys.executable, "-c", program, *settings, "--resume", "auto", "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def last_words(log: Path) -> str:
    """The last line of an output; a progress bar's carriage returns end lines too."""
    lines = re.split(r"[\r\n]", log.read_text(encoding="utf-8", errors="replace"))
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed yet")


def finish(folder: Path, log: Path, settings=SETTINGS) -> tuple[float, int]:
    """Run to the end; the seconds that took, and its file operations."""
    begun = time.time()
    code = start(folder, log, settings=settings).wait()
    if code:
        raise RuntimeError(f"{folder} ended with {code}:\n{log.read_text()}")
    return time.time() - begun, int(last_words(log).split()[0])


def kill_at(folder: Path, log: Path, seconds=None, die_before=0, settings=SETTINGS) -> str:
    """Run and kill, after some seconds or before a file operation; how far it had come."""
    process = start(folder, log, die_before, settings)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and metrics.read_bytes()[-1:] not in (b"", b"\n"):
        raise RuntimeError(f"{metrics}: its last line is torn")
    moment = f"at {seconds:5.2f} s" if seconds is not None else f"operation {die_before:3}"
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{folder} ended with {code}:\n{log.read_text()}")
    return f"{moment}  {last_words(log)[:90] if code else 'had ended by then'}"


def draw_moments(count: int, seconds: float, operations: int, seed: int) -> list[list[dict]]:
    """For each run, the kills before it may end: arguments of kill_at."""
    draw = random.Random(seed)
    runs = []
    for number in range(count):
        operation = {"die_before": draw.randint(1, operations)}
        runs.append([operation if number % 2 else {"seconds": draw.uniform(0, seconds)}])
        if number % 4 == 3:  # a resumed process may come by fewer operations, and then just ends
            runs[-1].append({"die_before": draw.randint(1, operations // 2)})
    return runs


def differences(one: Path, other: Path) -> list[str]:
    """What two runs' folders do not have in common and should; [] when there is nothing."""

    def contents(folder: Path) -> dict:
        found = {}
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            if path.is_file() and path.name not in UNLIKE:
                found[name] = path.read_bytes()
        lines = [json.loads(line) for line in found.pop("metrics.jsonl", b"").splitlines()]
        found |= {f"metrics.jsonl line {n + 1}": timeless(line) for n, line in enumerate(lines)}
        found["config.json"] = json.loads(found.pop("config.json", b"{}")) | {"out": None}
        return found

    a, b = contents(one), contents(other)
    return sorted(name for name in a | b if a.get(name) != b.get(name))


def timeless(line: dict) -> str:
    """A line of metrics.jsonl without time and memory, as text, in which nan equals nan."""
    return json.dumps({key: value for key, value in line.items() if not MEASURED.fullmatch(key)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="runs to kill (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        finish(place / "warm-up", place / "log")  # the files read are in memory from here on
        seconds, operations = finish(place / "unkilled", place / "log")
        print(f"never killed: {seconds:.1f} s, {operations} file operations", flush=True)
        equal = 0
        for number, moments in enumerate(draw_moments(args.kills, seconds, operations, args.seed)):
            folder = place / f"run-{number}"
            hits = [kill_at(folder, place / "log", **moment) for moment in moments]
            finish(folder, place / "log")
            wrong = differences(place / "unkilled", folder)
            equal += not wrong
            verdict = "equal" if not wrong else f"DIFFERS in {', '.join(wrong)}"
            print(f"kill {number + 1:2}: " + "; again ".join(hits) + f"  -> {verdict}", flush=True)
    print(f"{equal} of {args.kills} equal")
    sys.exit(equal != args.kills)


if __name__ == "__main__":
    main()
