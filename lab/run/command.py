"""train.py's command line: a preset, the flags on top of it, and what goes on or is only planned.

    config, options = parse(Config, PRESETS, "Train a Llama")
    with sentences():
        train(config, options.resume)

`sentences` ends the process with one sentence, and no traceback, where what a user gave is wrong.
"""

import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from lab.run import flags


@dataclass(frozen=True)
class Options:
    """What the command line says beside the settings of a run."""

    dry_run: bool
    world_size: int | None  # the number of GPUs to plan for
    resume: bool  # go on with the run in config.out, where there is one


def parse(kind, presets: dict[str, dict], description: str, arguments=None):
    """The settings (a `kind`) and Options of a command line; exits with a sentence for a bad one.

    presets: by name, the values that differ from kind's defaults.
    """
    parser = parser_of(kind, presets, description)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    dry_run, world_size = given.pop("dry_run"), given.pop("world_size", None)
    resume, override = given.pop("resume", None), given.pop("override")
    if world_size is not None and not dry_run:
        parser.error("--world-size plans, with --dry-run; torchrun's --nproc-per-node runs")
    if world_size is not None and world_size < 1:
        parser.error(f"--world-size {world_size}: must be at least 1")
    if "steps" in given and "epochs" in given:
        parser.error("--steps and --epochs both say how long to train: give one")
    if "steps" in given or "epochs" in given:
        given |= {key: None for key in ("steps", "epochs") if key not in given}
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not dry_run:
        if "out" not in given and resume in (None, "auto"):
            parser.error("torchrun --max-restarts needs --out: a restarted run looks there")
        # From the first start on, because torchrun does not count restarts alike on all nodes.
        resume = resume or "auto"
    if resume == "auto" and "out" not in given:
        parser.error("--resume auto looks for a run in --out: name a folder there")
    values = presets[given.get("preset", "micro")] | given
    if resume is not None:
        values = resumed(parser, kind, resume, given, override, values)
    elif override:
        parser.error("--override is for a run that --resume goes on with")
    config = flags.settings(parser, kind, values)
    return config, Options(dry_run, world_size, resume is not None)


def parser_of(kind, presets, description: str):
    parser = flags.parser_of(kind, description, presets["paper"])
    text = "print what would run, its memory and its time"
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "GPUs to plan for with --dry-run (default: torchrun's, else 8 for paper, 1 for micro)"
    parser.add_argument("--world-size", type=int, help=text)
    text = "go on with the run in this folder, with its settings, from its last whole checkpoint; "
    text += "auto: with the one in --out if there is one, else begin it"
    parser.add_argument("--resume", metavar="DIR", help=text)
    text = "settings in which a resumed run may differ from the saved ones, such as steps"
    parser.add_argument("--override", metavar="KEY", nargs="+", default=[], help=text)
    return parser


def resumed(parser, kind, resume: str, given: dict, override: list[str], fresh: dict) -> dict:
    """The saved settings of the run to go on with, changed where --override allows it.

    given: the flags typed; fresh: the settings where --resume auto finds no run.
    """
    folder = Path(given["out"] if resume == "auto" else resume)
    if resume != "auto" and given.setdefault("out", resume) != resume:
        parser.error(f"--out {given['out']} is not the run that --resume {resume} goes on with")
    path = folder / "config.json"
    if not path.is_file():
        if resume == "auto":
            return fresh
        parser.error(f"--resume {resume}: holds no run (no config.json)")
    known = {entry.name for entry in fields(kind)}
    if unknown := [key for key in override if key not in known]:
        parser.error(f"--override {unknown[0]}: no such setting")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or set(saved) != known:
            raise ValueError("not the settings of this version of train.py")
        for entry in fields(kind):
            if not isinstance(saved[entry.name], entry.type | int):  # 1 may stand for 1.0
                raise ValueError(f"{entry.name} is {json.dumps(saved[entry.name])}")
    except (OSError, ValueError) as error:
        parser.error(f"--resume {resume}: {path} cannot be used ({error})")
    given = given | {"out": str(folder)}
    differing = [k for k in given if given[k] != saved[k] and k not in ("out", *override)]
    if differing:
        changes = ", ".join(f"{key} (saved {saved[key]}, now {given[key]})" for key in differing)
        advice = f"leave them out, or say --override {' '.join([*override, *differing])}"
        reason = f"the run was started with other settings: {changes}; {advice}"
        parser.error(f"--resume {resume}: {reason}")
    return saved | given


@contextmanager
def sentences():
    """End the process with one sentence for what a user gave, and for a rank that is gone."""
    rank = os.environ.get("RANK", "0")
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}")
    except KeyboardInterrupt:  # before the loop, which takes it as a request to stop
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        # This rank waited for one that is gone, whose own message says why it went.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone or not re.search("peer|gloo|nccl|process group", str(error), re.IGNORECASE):
            raise
        sys.exit(f"error on rank {rank}: another rank is gone ({str(error).splitlines()[0]})")
