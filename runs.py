"""A run's folder: logs that are never torn, checkpoints that are whole, and the way back to them.

    folder = RunFolder.begin(config, ranks)          # or RunFolder.reopen(config, ranks)
    folder.write({"step": 1, ...})                   # a line of metrics.jsonl
    folder.save(step, model, optimizer, ranks, {...})
    step, notes = folder.restore(model, optimizer, ranks)

    config.json, commands.txt       the settings; what was typed, a line per start
    metrics.jsonl, samples.jsonl    a line per update and evaluation; a line per rollout
    checkpoints/step-00000010/      the model as Hugging Face writes it, optimizer.safetensors,
                                    and state.json: the step, the settings, how long the logs were,
                                    every file's size and sha256, and what the loop asked to keep
                                    (notes)
    best/, checkpoint/              the best by held-out score; the last (train.py)

A checkpoint is written under another name, reaches the disk, and is renamed. What the logs hold
beyond the checkpoint that a run goes on from is cut off. Rank 0 alone writes, and reads all but
config.json, which every node must see. No pickle is read or written: safetensors and JSON only.
"""

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoint import (
    check_weights,
    read_json,
    read_weights,
    sync,
    write_json,
    writing,
    written_whole,
)
from optimizer import gather_state, scatter_state

LOGS = ("metrics.jsonl", "samples.jsonl")
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"


class RunFolder:
    """path; history: the lines of metrics.jsonl, on every rank; saved: the last checkpoint's step.

    Everything but `save` and `restore` may be called on any rank, and does nothing but on rank 0.
    """

    def __init__(self, path: Path, config, ranks):
        self.path, self.config, self.rank = path, config, ranks.rank
        self.history, self.saved = [], None

    @classmethod
    def begin(cls, config, ranks) -> "RunFolder":
        """A new folder, at config.out or by the date. ValueError when it holds something."""
        path = Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
        folder = cls(path, config, ranks)
        if ranks.rank == 0:
            make_folder(path)
            # A hidden file may be a config.json that a kill left half written.
            if any(not entry.name.startswith(".") for entry in path.iterdir()):
                raise ValueError(
                    f"--out {path}: is not empty; name another folder, or --resume {path}"
                )
            folder.write_config()
        return folder

    @classmethod
    def reopen(cls, config, ranks) -> "RunFolder":
        """The folder of an earlier run, at config.out; one without a run is begun."""
        path = Path(config.out)
        there = ranks.gather([(path / "config.json").is_file()] if ranks.rank == 0 else [])
        if not there[0]:
            return cls.begin(config, ranks)
        folder = cls(path, config, ranks)
        if ranks.rank == 0:
            make_folder(path)
        return folder

    def settings(self) -> dict:
        return dataclasses.asdict(self.config) | {"out": str(self.path)}

    def write_config(self) -> None:
        part, path = self.path / ".config.json", self.path / "config.json"
        with writing(path):
            write_json(part, self.settings())
            sync(part)
            os.replace(part, path)

    # ------------------------------------------------------------------------------------- logs

    def write(self, line: dict) -> None:
        self.history.append(line)
        self.append("metrics.jsonl", [line])

    def append(self, name: str, lines: list[dict]) -> None:
        """Add lines whole or not at all: OSError, the file as it was, when the disk is full."""
        if self.rank > 0:
            return
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with open(self.path / name, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(content) != len(content):
                    raise OSError("the disk is full")
            except OSError as error:
                file.truncate(size)
                raise OSError(f"{self.path / name}: cannot be written ({error})") from None

    # ------------------------------------------------------------------------------ checkpoints

    def save(self, step: int, model, optimizer, ranks, notes: dict) -> None:
        """Write the checkpoint of `step` updates, and drop the oldest beyond config.keep.

        notes: what `restore` gives back (JSON). Called on all ranks together. ValueError for
        weights that are not finite, OSError where it cannot be written: the others stay.
        """
        tensors = gather_state(optimizer, model, ranks)
        random = ranks.gather([torch.get_rng_state().tolist()])  # the loop itself draws by seed
        if ranks.rank == 0:
            self.refuse_broken(model)
            tensors["random states"] = torch.tensor(random, dtype=torch.uint8)  # a row per rank
            with written_whole(self.checkpoint(step)) as part:
                model.save_pretrained(part)
                save_file(tensors, part / OPTIMIZER)
                logs = [self.path / name for name in LOGS if (self.path / name).exists()]
                for log in logs:
                    sync(log)
                state = {
                    "step": step,
                    "notes": notes,
                    "config": self.settings(),
                    "logs": {log.name: log.stat().st_size for log in logs},
                    "environment": environment(ranks),
                    "files": {path.name: fingerprint(path) for path in sorted(part.iterdir())},
                }
                write_json(part / STATE, state | {"sha256": digest(state)})
            kept = [f for f in self.checkpoints() if f.name <= self.checkpoint(step).name]
            # What else is there is older, was passed over as damaged, or was left by a kill.
            for old in self.checkpoint(step).parent.glob("*step-*"):
                if old not in kept[: self.config.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        self.saved = step

    def save_best(self, model, score: dict) -> None:
        """The model alone, in best/, with its score. Raises as `save` does."""
        if self.rank == 0:
            self.refuse_broken(model)
            with written_whole(self.path / "best") as part:
                model.save_pretrained(part)
                write_json(part / "score.json", score)

    def refuse_broken(self, model) -> None:
        """ValueError for weights that are not finite."""
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError(
                f"{self.path}: the weights are no longer finite and are not saved; the last "
                f"checkpoint is of update {self.saved or 0}"
            )

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted((self.path / "checkpoints").glob("step-*"), reverse=True)

    def restore(self, model, optimizer, ranks) -> tuple[int, dict]:
        """Load the newest whole checkpoint: its step and notes; 0 and {} where there is none.

        The logs are cut to what they were then. Called on all ranks together, before the model is
        wrapped in DDP, which hands rank 0's weights on. Raises ValueError when there are
        checkpoints and none of them is whole.
        """
        found, tensors = self.read_newest(model, ranks) if ranks.rank == 0 else (None, {})
        if ranks.rank == 0:
            self.write_config()  # only now: a run that cannot go on keeps the settings it had
            path = self.path / "commands.txt"
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(shlex.join(["python", *sys.argv]).replace("\n", " ") + "\n")
        (found,) = ranks.gather([found] if ranks.rank == 0 else [])
        self.history, self.saved = found["history"], found["step"] or None
        if self.saved is None:
            return 0, {}
        now = environment(ranks)
        changed = [f"{k} was {v}" for k, v in found["environment"].items() if now.get(k) != v]
        if changed:
            ranks.say(
                f"note: {', '.join(changed)} when this run was saved: it goes on, but not bit for "
                "bit as it would have"
            )
        random = tensors.pop("random states", torch.zeros(0))
        (states,) = ranks.gather([random.tolist()] if ranks.rank == 0 else [])
        if len(states) == ranks.world_size:
            torch.set_rng_state(torch.tensor(states[ranks.rank], dtype=torch.uint8))
        scatter_state(optimizer, model, ranks, tensors)
        return found["step"], found["notes"]

    def read_newest(self, model, ranks) -> tuple[dict, dict]:
        """Weights into the model; what state.json and the logs say; the optimiser's tensors."""
        damaged = []
        for folder in self.checkpoints():
            reason = damage(folder)
            if reason:
                ranks.say(f"{folder}: {reason}; trying the one before")
                damaged.append(folder)
                continue
            state = read_json(folder / STATE)
            shapes = {key: tuple(w.shape) for key, w in model.file_weights().items()}
            check_weights(folder, shapes)
            tensors = load_file(folder / OPTIMIZER)
            self.cut_logs(state["logs"])
            read_weights(folder, model.file_weights())
            history = (self.path / LOGS[0]).read_text(encoding="utf-8").splitlines()
            state["history"] = [json.loads(line) for line in history]
            return state, tensors
        if damaged:
            raise ValueError(
                f"--resume {self.path}: none of its {len(damaged)} checkpoints is whole; start a "
                "new run, with --model one of them if its model.safetensors is"
            )
        self.cut_logs({})
        return {"step": 0, "history": []}, {}

    def cut_logs(self, sizes: dict[str, int]) -> None:
        logs = {self.path / name: sizes.get(name, 0) for name in LOGS}
        there = {path: path.stat().st_size if path.exists() else 0 for path in logs}
        for path, size in logs.items():
            if there[path] < size:
                raise ValueError(f"{path}: is shorter than the checkpoint says; put it back")
        for path, size in logs.items():
            if there[path] > size:
                os.truncate(path, size)


def environment(ranks) -> dict:
    """What a run must have in common with its continuation to go on bit for bit."""
    return {
        "world size": ranks.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": ranks.device.type,
    }


def fingerprint(path: Path) -> list:
    """Size in bytes and sha256 of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def digest(state: dict) -> str:
    """sha256 of state.json's content, which holds that of every other file."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file is as it was written."""
    try:
        state = read_json(folder / STATE)
        if state.pop("sha256", None) != digest(state):
            return f"{STATE} is not as it was written"
        for name, expected in state["files"].items():
            if fingerprint(folder / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError) as error:
        return f"cannot be read ({error})"
    return None


def make_folder(folder: Path) -> None:
    """Create a folder to write to. ValueError naming --out when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--out {folder}: cannot be made ({reason}); name another") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {folder}: may not be written to; name another")
