"""Every setting of a run: its default, its bounds, its help, and the presets.

    config, options = parse_command()      # sys.argv: the preset, then the flags given
    config = parse_args(["--steps", "2"])

A setting is one line of Config; the command line and its help come from there. A resumed run takes
its saved settings: a flag that says otherwise is refused unless --override names it.
"""

import argparse
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from atman import MaskConfig
from data import DATASETS

LARGEST = 1e30  # of any number: its products are still within float32


def option(default, help, choices=None, least=None, above=None):  # noqa: A002
    """A setting with its help; least and above bound it."""
    metadata = {"help": help, "choices": choices, "least": least, "above": above}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every setting: defaults (the micro preset), the command line and its help."""

    preset: str = option("micro", "which defaults to start from", ("micro", "paper"))
    model: str = option("data/micro", "checkpoint directory or hub name")
    dataset: str = option("micro", "which problems", tuple(DATASETS))
    data_dir: str | None = option(None, "folder with the dataset's files")
    train_split: str = option(
        "train", "which split to train on; mmlu: its auxiliary one, or say dev or val"
    )
    out: str | None = option(None, "the run's folder; default: runs/ and the date and time")
    seed: int = option(0, "of the order of questions and of sampling", least=0)
    device: str | None = option(None, "cpu or cuda; default: cuda where there is one")
    # the reward
    saliency: str = option(
        "attribution",
        "saliency reward; length is a control, minus the reasoning's tokens / 100",
        ("mask", "attribution", "length", "none"),
    )
    saliency_weight: float = option(2.0, "weight of the saliency reward", least=0)
    saliency_sign: str = option("restored", "sign of the mask saliency", ("restored", "literal"))
    saliency_reduction: str = option(
        "even", "attribution of a trace as one number", ("even", "mean", "share", "sum")
    )
    gate_saliency: bool = option(True, "pay saliency to correct rollouts only")
    shuffle_saliency: bool = option(
        False, "a control: deal each group's saliencies out among its rollouts by chance"
    )
    # the mask
    mask_steps: int = option(20, "optimisation steps per mask", least=1)
    mask_lr: float | None = option(None, "rate of those steps; default: 0.2 / steps", above=0)
    mask_memory: str = option(
        "path",
        "AdamW's betas in those steps: the paper's (steps), or raised to the power 200 / steps, so "
        "that fewer steps remember as long a part of the path (path)",
        ("steps", "path"),
    )
    mask_init: float = option(-0.4, "c, where the mask starts; below 0")
    mask_scale: float = option(10.0, "factor on the mask in the attention scores", above=0)
    mask_sparsity: float = option(0.0, "lambda, what re-enabling an entry costs", least=0)
    mask_batch: int = option(16, "rollouts per mask optimisation, sorted by length", least=1)
    # the policy update
    questions: int = option(16, "questions per update, over all ranks", least=1)
    rollouts: int = option(8, "rollouts per question", least=2)
    passes: int = option(2, "optimiser steps per batch of rollouts", least=1)
    micro_batch: int = option(16, "rollouts per forward of the policy update", least=1)
    lr: float = option(2e-4, "rate of the policy update, constant", above=0)
    clip_eps: float = option(0.2, "clipping range of the ratio", above=0)
    ratio: str = option("token", "ratio over the sequence or per token", ("sequence", "token"))
    temperature: float = option(1.0, "of the rollouts; the policy is scored at the same", above=0)
    max_new_tokens: int = option(200, "longest rollout; longer ones are cut and wrong", least=1)
    precision: str | None = option(
        None,
        "of the forward passes; weights, gradients, masks and their optimisers are float32 always "
        "(default: bfloat16 on cuda, float32 on cpu)",
        ("float32", "bfloat16"),
    )
    zero: bool = option(False, "shard the optimiser's state over the ranks (ZeRO-1)")
    recompute: bool = option(False, "keep layer inputs alone for the backward pass: less memory")
    logit_chunk: int = option(
        0, "positions of a policy pass whose logits are in memory at a time, 0 for all", least=0
    )
    steps: int | None = option(50, "number of updates", least=0)
    epochs: int | None = option(None, "passes over the questions, in place of --steps", least=1)
    # evaluation
    eval_problems: int = option(300, "held-out problems before and after training", least=1)
    eval_samples: int = option(4, "samples per held-out problem", least=1)
    eval_batch: int = option(256, "samples decoded together, per rank", least=1)
    eval_every: int = option(10, "updates between evaluations in between, 0 for none", least=0)
    eval_every_problems: int = option(64, "held-out problems of those evaluations", least=1)
    # checkpoints
    save_every: int = option(10, "updates between checkpoints to resume from", least=1)
    keep: int = option(2, "how many of those to keep", least=1)
    spacy_model: str | None = option(None, "trained spaCy pipeline; default: blank English")

    @property
    def learns_masks(self) -> bool:
        return self.saliency in ("mask", "attribution")

    def mask(self) -> MaskConfig:
        """The mask optimisation's part. paper silent: fewer steps go as far, at a larger rate."""
        rate = {"lr": self.mask_lr} if self.mask_lr else {}
        return MaskConfig.in_steps(
            self.mask_steps,
            path_memory=self.mask_memory == "path",
            init=self.mask_init,
            scale=self.mask_scale,
            sparsity=self.mask_sparsity,
            **rate,
        )


PRESETS = {
    "micro": {},  # the defaults above
    "paper": {  # every number of section 3.4, whatever the defaults above become
        "model": "meta-llama/Llama-3.2-3B-Instruct",
        "dataset": "gsm8k",
        "saliency": "mask",
        "saliency_weight": 1.0,
        "saliency_sign": "restored",
        "gate_saliency": False,
        "shuffle_saliency": False,
        "mask_steps": 200,
        "mask_lr": None,  # 0.2 / 200 steps is the paper's 1e-3
        "mask_memory": "steps",
        "mask_init": -0.4,
        "mask_scale": 10.0,
        "mask_sparsity": 0.0,
        "mask_batch": 4,  # paper silent; at the longest rollouts as large as the policy pass
        "questions": 8,
        "rollouts": 8,
        "passes": 2,
        "micro_batch": 2,
        "lr": 8e-7,
        "clip_eps": 0.2,
        "ratio": "sequence",
        "temperature": 1.0,
        "max_new_tokens": 1024,
        "zero": True,
        "logit_chunk": 128,
        "steps": None,
        "epochs": 5,
        "eval_problems": 500,
        "eval_batch": 32,
        "eval_every": 100,
        "eval_every_problems": 100,
        "save_every": 50,  # some 36 GiB each; the default is for models that are written at once
    },
}


def parse_args(arguments=None) -> Config:
    """Config from the command line: the preset's values, then the flags."""
    return parse_command(arguments)[0]


@dataclass(frozen=True)
class Options:
    """What the command line says beside the settings of a run."""

    dry_run: bool
    world_size: int | None  # to plan for
    resume: bool  # go on in config.out where that holds a run


def parse_command(arguments=None) -> tuple[Config, Options]:
    """Settings and options. Exits with a sentence for what does not fit, as argparse does."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    entries = dataclasses.fields(Config)
    for entry in entries:
        flag = "--" + entry.name.replace("_", "-")
        text = entry.metadata["help"]
        if entry.default is not None:
            text += f" (default: {entry.default})"
        if PRESETS["paper"].get(entry.name) not in (None, entry.default):
            text += f" (paper: {PRESETS['paper'][entry.name]})"
        if entry.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        kind = {int: int, int | None: int, float: float, float | None: float}.get(entry.type, str)
        parser.add_argument(flag, type=kind, choices=entry.metadata["choices"], help=text)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, its memory and its time"
    )
    text = "GPUs to plan for with --dry-run (default: torchrun's, else 8 for paper, 1 for micro)"
    parser.add_argument("--world-size", type=int, help=text)
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run in this folder, with its settings, from its last whole "
        "checkpoint; auto: with the one in --out if there is one, else begin it",
    )
    parser.add_argument(
        "--override",
        metavar="KEY",
        nargs="+",
        default=[],
        help="settings in which a resumed run may differ from the saved ones, such as steps",
    )
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    dry_run, world_size = given.pop("dry_run"), given.pop("world_size", None)
    resume, override = given.pop("resume", None), given.pop("override")
    if world_size is not None and not dry_run:
        parser.error("--world-size plans, with --dry-run; torchrun's --nproc-per-node runs")
    if world_size is not None and world_size < 1:
        parser.error(f"--world-size {world_size}: must be at least 1")
    if "steps" in given and "epochs" in given:
        parser.error("--steps and --epochs both say how long to train: give one")
    if "steps" in given:
        given["epochs"] = None
    elif "epochs" in given:
        given["steps"] = None
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not dry_run:
        if "out" not in given and resume in (None, "auto"):
            parser.error("torchrun --max-restarts needs --out: a restarted run looks there")
        # From the first start on: torchrun does not count restarts alike on all nodes.
        resume = resume or "auto"
    if resume == "auto" and "out" not in given:
        parser.error("--resume auto looks for a run in --out: name a folder there")
    settings = PRESETS[given.get("preset", "micro")] | given
    if resume is not None:
        settings = resumed_settings(parser, resume, given, override, settings)
    elif override:
        parser.error("--override is for a run that --resume goes on with")
    config = Config(**settings)
    for entry in entries:
        value, flag = getattr(config, entry.name), "--" + entry.name.replace("_", "-")
        least, above = entry.metadata["least"], entry.metadata["above"]
        if isinstance(value, float) and not abs(value) < LARGEST:
            parser.error(f"{flag} {value}: must be a number below {LARGEST:g}")
        choices = entry.metadata["choices"]
        if value is not None and choices and value not in choices:  # read from config.json
            parser.error(f"{flag} {value}: choose {', '.join(choices)}")
        if value is not None and least is not None and value < least:
            parser.error(f"{flag} {value}: must be at least {least}")
        if value is not None and above is not None and value <= above:
            parser.error(f"{flag} {value}: must be above {above}")
    if config.mask_init >= 0:
        parser.error(f"--mask-init {config.mask_init}: must be below 0, or nothing is suppressed")
    splits = DATASETS[config.dataset].splits
    if config.train_split not in splits:
        parser.error(f"--train-split {config.train_split}: {config.dataset} has "
                     f"{', '.join(splits)}")  # fmt: skip
    if splits[config.train_split] == splits["heldout"]:
        parser.error(f"--train-split {config.train_split}: these are the problems held out for "
                     "evaluation; train on others")  # fmt: skip
    everyone = config.questions * config.rollouts
    if everyone % config.micro_batch:
        parser.error(
            f"--micro-batch {config.micro_batch} does not divide the {everyone} rollouts of an "
            f"update (--questions {config.questions} x --rollouts {config.rollouts}); "
            "give a divisor"
        )
    return config, Options(dry_run, world_size, resume is not None)


def resumed_settings(parser, resume: str, given: dict, override: list[str], fresh: dict) -> dict:
    """The saved settings of the run to go on with, changed where --override allows it.

    given: the flags of the command line; fresh: the settings if there is no such run, which
    --resume auto may find.
    """
    folder = Path(given["out"] if resume == "auto" else resume)
    if resume != "auto" and given.setdefault("out", resume) != resume:
        parser.error(f"--out {given['out']} is not the run that --resume {resume} goes on with")
    path = folder / "config.json"
    if not path.is_file():
        if resume == "auto":
            return fresh
        parser.error(f"--resume {resume}: holds no run (no config.json)")
    known = {entry.name for entry in dataclasses.fields(Config)}
    for key in override:
        if key not in known:
            parser.error(f"--override {key}: no such setting")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or set(saved) != known:
            raise ValueError("not the settings of this version of train.py")
        for entry in dataclasses.fields(Config):
            if not is_setting(saved[entry.name], entry.type):
                raise ValueError(f"{entry.name} is {json.dumps(saved[entry.name])}")
    except (OSError, ValueError) as error:
        parser.error(f"--resume {resume}: {path} cannot be used ({error})")
    given = given | {"out": str(folder)}
    differing = [k for k in given if given[k] != saved[k] and k not in ("out", *override)]
    if differing:
        changes = ", ".join(f"{key} (saved {saved[key]}, now {given[key]})" for key in differing)
        parser.error(
            f"--resume {resume}: the run was started with other settings: {changes}; leave them "
            f"out, or say --override {' '.join([*override, *differing])}"
        )
    return saved | given


def is_setting(value, kind) -> bool:
    """May this value, read from JSON, be a setting of that type?"""
    if isinstance(value, bool):  # to Python True is an int as well
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(1.0, kind))
