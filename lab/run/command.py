"""How commands begin and end: train.py's line with its presets; sentences, not tracebacks.

    config, options = parse(Config, PRESETS, "Train a Llama")
    with sentences():
        train(config, options.resume)

Every command runs in `sentences`.
"""

import json
import os
import re
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from data.files import obstacle, read_json
from lab.run import flags
from lab.run.cost import is_out_of_memory
from lab.run.ranks import named_rank, variable


@dataclass(frozen=True)
class Options:
    """What the command line says beside the settings of a run."""

    dry_run: bool
    world_size: int | None  # the number of GPUs to plan for
    resume: bool  # go on with the run in config.out, where there is one
    said: frozenset[str]  # settings that the command line, the preset or the saved run names


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
    if world_size is not None:
        flags.check_number(parser, "--world-size", world_size, {"least": 1})
    if "steps" in given and "epochs" in given:
        parser.error("--steps and --epochs both say how long to train: give one")
    if "steps" in given or "epochs" in given:
        given |= {key: None for key in ("steps", "epochs") if key not in given}
    if variable("TORCHELASTIC_MAX_RESTARTS", 0) and not dry_run:
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
    return config, Options(dry_run, world_size, resume is not None, frozenset(values))


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
    if obstacle(path) is None:
        if resume == "auto":
            return fresh
        parser.error(f"--resume {resume}: holds no run (no config.json)")
    known = {entry.name for entry in fields(kind)}
    if unknown := [key for key in override if key not in known]:
        parser.error(f"--override {unknown[0]}: no such setting")
    try:
        saved = read_json(path, "put it back as it was")
        check_saved(kind, saved)
    except ValueError as error:
        parser.error(f"--resume {resume}: {path} cannot be used ({error})")
    given = given | {"out": str(folder)}
    if differing := changes(saved, given, ("out", *override)):
        advice = f"leave them out, or say --override {' '.join([*override, *differing])}"
        reason = f"the run was started with other settings: {', '.join(differing.values())}"
        parser.error(f"--resume {resume}: {reason}; {advice}")
    return saved | given


def check_saved(kind, saved: dict) -> None:
    """ValueError, naming the setting, where saved ones are not of this version's `kind`."""
    names = [entry.name for entry in fields(kind)]
    for name in [key for key in names if key not in saved]:
        default = json.dumps(getattr(kind, name, None))
        advice = f'another version wrote it; add "{name}": {default}, this version\'s default'
        raise ValueError(f"it lacks the setting {name}: {advice}, or the value that it ran with")
    for name in [key for key in saved if key not in names]:
        advice = "resume it with the version that wrote it, or take the setting out"
        raise ValueError(f"this version has no setting {name}: {advice}")
    for entry in fields(kind):
        kinds = set(get_args(entry.type) or [entry.type])
        if type(saved[entry.name]) not in kinds | ({int} if float in kinds else set()):
            raise ValueError(f"{entry.name} is {json.dumps(saved[entry.name])}")


def changes(saved: dict, now: dict, free=()) -> dict[str, str]:
    """By name, what differs from the saved settings, as a message says it; free: may differ."""
    return {
        key: f"{key} (saved {saved.get(key)}, now {value})"
        for key, value in now.items()
        if key not in free and saved.get(key) != value
    }


class Lasting:
    """A stream that drops what it cannot write: its reader is gone (`| head`), its disk is full."""

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None else stream  # None: it was closed
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def settle(self) -> None:
        """Have the interpreter's own flush at the end of the process succeed too."""
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except ValueError:  # it is closed
            pass


@contextmanager
def sentences(clean=str, interrupted="interrupted"):
    """End the process with one sentence for what a user gave, and for a rank that is gone.

    Work does not end because nobody reads its output any more, nor for a character that the
    output's encoding lacks, which shows as its number (\\u2192).

    clean: makes a sentence safe to show that others wrote a part of.
    interrupted: what Ctrl-C says.
    """
    out, err, rank = Lasting(sys.stdout), Lasting(sys.stderr), named_rank()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    except (ValueError, OSError) as error:  # a chat template may raise what it likes
        where = "error" if rank == "0" else f"error on rank {rank}"
        sys.exit(clean(f"{where}: {error}"))
    except KeyboardInterrupt:  # in training before the loop, which takes it as a request to stop
        print(clean(interrupted), file=err)
        sys.exit(128 + signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if is_out_of_memory(error):
            sys.exit(f"error: not enough memory for this model and these settings ({reason})")
        # This rank waited for one that is gone, whose own message says why it went.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone or not re.search("peer|gloo|nccl|process group", str(error), re.IGNORECASE):
            raise
        sys.exit(f"error on rank {rank}: another rank is gone ({reason})")
    finally:
        out.settle()
        err.settle()
