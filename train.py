"""Train a Llama so that its reasoning is both right and used (AtManRL).

    torchrun train.py                                              # data/micro, minutes on a CPU
    torchrun --nproc-per-node=8 train.py --preset paper            # the paper's setting, 8 GPUs
    torchrun train.py --saliency none                              # the outcome-only baseline
    python train.py --preset paper --dry-run                       # what it would take (plan.py)

One update, in the paper's order: sample a group of rollouts per question, score the outcome
(Eq. 4), learn each rollout's attention mask and read its saliency (Eq. 2, 3), turn total rewards
into advantages, and step on the clipped loss (Eq. 5). A run's folder receives config.json,
metrics.jsonl (a line per update and per evaluation), samples.jsonl, curves.png and checkpoint/.

Departures from section 3.4, beyond those in atman.py and grpo.py:
1. paper silent: AdamW without weight decay and without gradient clipping updates the policy.
2. Rollouts are dealt over the ranks in equal blocks, which need not be whole questions, so that
   any number of ranks works.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import plan
from atman import MaskConfig, rollout_saliency
from cache import Prefill
from data import DATASETS, Problem, instruction, load_problems
from data.prompts import Tokenizer
from data.traces import Trace, split_trace
from eval import curves, evaluate, make_folder
from faithfulness import optimize_traces
from grpo import generate, group_advantages, outcome_reward, update_policy
from hub import checkpoint_directory
from model import Llama
from ranks import Progress, Ranks, pick_device
from table1 import load_spacy, summarize, table


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
    saliency: str = option("attribution", "saliency reward", ("mask", "attribution", "none"))
    saliency_weight: float = option(1.0, "weight of the saliency reward", least=0)
    saliency_sign: str = option("restored", "sign of the mask saliency", ("restored", "literal"))
    saliency_reduction: str = option(
        "mean", "attribution of a trace as one number", ("even", "mean", "share", "sum")
    )
    gate_saliency: bool = option(False, "pay saliency to correct rollouts only")
    # the mask
    mask_steps: int = option(5, "optimisation steps per mask", least=1)
    mask_lr: float | None = option(None, "rate of those steps; default: 0.2 / steps", above=0)
    mask_memory: str = option(
        "steps",
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
    ratio: str = option("sequence", "ratio over the sequence or per token", ("sequence", "token"))
    temperature: float = option(1.0, "of the rollouts; the policy is scored at the same", above=0)
    max_new_tokens: int = option(200, "longest rollout; longer ones are cut and wrong", least=1)
    steps: int | None = option(40, "number of updates", least=0)
    epochs: int | None = option(None, "passes over the questions, in place of --steps", least=1)
    # evaluation
    eval_problems: int = option(300, "held-out problems before and after training", least=1)
    eval_samples: int = option(4, "samples per held-out problem", least=1)
    eval_batch: int = option(256, "samples decoded together, per rank", least=1)
    eval_every: int = option(10, "updates between evaluations in between, 0 for none", least=0)
    eval_every_problems: int = option(64, "held-out problems of those evaluations", least=1)
    spacy_model: str | None = option(None, "trained spaCy pipeline; default: blank English")

    def mask(self) -> MaskConfig:
        """The mask optimisation's part. paper silent: fewer steps go as far, at a larger rate."""
        paper = MaskConfig()
        # 0.6 forgets a gradient within 3 steps: 3 in 200 of the paper's path, a third of a path of
        # 10. `path` forgets after as much of the path as the paper (tests/fewer_steps.py).
        power = paper.steps / self.mask_steps if self.mask_memory == "path" else 1
        return MaskConfig(
            betas=tuple(beta**power for beta in paper.betas),
            init=self.mask_init,
            scale=self.mask_scale,
            steps=self.mask_steps,
            lr=self.mask_lr or 0.2 / self.mask_steps,
            sparsity=self.mask_sparsity,
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
        "steps": None,
        "epochs": 5,
        "eval_problems": 500,
        "eval_batch": 32,
        "eval_every": 100,
        "eval_every_problems": 100,
    },
}


@dataclass
class Rollout:
    """One sampled completion on its way through an update."""

    problem: Problem
    prompt: list[int]
    completion: list[int]
    trace: Trace
    outcome: float  # Eq. 4


def train(config: Config) -> None:
    ranks = Ranks.start(config.device)
    ranks.say(f"loading {config.model} and the problems of {config.dataset}")
    with ranks.local_first():  # a machine's others find what it has downloaded
        directory = checkpoint_directory(config.model)
        problems = load_problems(config.dataset, config.train_split, config.data_dir)
        heldout = load_problems(config.dataset, "heldout", config.data_dir, config.eval_problems)
    if len(problems) < config.questions:
        raise ValueError(f"--questions {config.questions}: there are {len(problems)} to train on")
    tokenizer = Tokenizer.from_directory(directory)
    model = Llama.from_pretrained(directory, device=ranks.device)
    tokenizer.check_fits(model.config.vocab_size)
    # The policy pass goes through DDP's wrapper, or its gradients would never be averaged; sampling
    # and masks use the bare model.
    policy = model
    if ranks.world_size > 1:  # gradients live in DDP's buckets: no second copy of them
        policy = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    spacy_pipeline = load_spacy(config.spacy_model)
    steps = config.steps
    if config.epochs is not None:
        steps = config.epochs * (len(problems) // config.questions)
    tokenizer.encode_prompt(instruction(config.dataset, problems[0].question))  # or it says why not
    log = Log(config, ranks)
    ranks.say(
        f"{steps} updates of {config.questions} questions x {config.rollouts} rollouts on "
        f"{ranks.world_size} x {ranks.device}, saliency {config.saliency}, writing {log.folder}"
    )

    def evaluate_heldout(step: int, count: int, label: str) -> dict:
        records = sample_heldout(model, tokenizer, heldout[:count], config, ranks, label)
        summary = summarize(records, spacy_pipeline)
        log.write({"step": step, "eval": summary})
        ranks.say(evaluation_line(label, summary))
        return summary

    before = evaluate_heldout(0, config.eval_problems, "before")
    if before["pass@1"] < 0.05:
        ranks.say(
            f"note: {config.model} gets nearly all of {config.dataset} wrong, so few groups will "
            "differ in outcome and the outcome reward has little to teach"
        )
    if before["truncated"] > 0.1:
        ranks.say(
            f"note: {before['truncated']:.0%} of the held-out samples are cut at --max-new-tokens "
            f"{config.max_new_tokens} and count as wrong; raise it if they have more to say"
        )
    for step in range(steps):
        bar = Progress(f"update {step + 1}/{steps}", silent=ranks.rank > 0)
        clock = [time.time()]
        questions = draw_questions(problems, config, step)

        rollouts, prefill = sample_rollouts(
            model, tokenizer, questions, config, step, ranks, bar
        )  # Eq. 4
        clock.append(time.time())
        saliency = saliency_rewards(model, tokenizer, rollouts, config, bar, prefill)  # Eq. 2, 3
        del prefill  # keys and values of weights that are about to change
        clock.append(time.time())
        facts = ranks.gather([describe(r, s) for r, s in zip(rollouts, saliency, strict=True)])
        outcome = torch.tensor([fact["outcome"] for fact in facts])
        saliency = fill_missing(torch.tensor([fact["saliency"] for fact in facts]), outcome, config)
        reward = outcome + config.saliency_weight * saliency
        advantages = group_advantages(reward, config.rollouts)
        stats = update_policy(
            policy,
            optimizer,
            *fill_up(rollouts, ranks.share(advantages.tolist()), len(facts), ranks),
            passes=config.passes,
            micro_batch=config.micro_batch,
            clip_eps=config.clip_eps,
            ratio=config.ratio,
            temperature=config.temperature,
            normalizer=len(facts),
            world_size=ranks.world_size,
            progress=bar.phase("policy", config.passes * len(rollouts)),
        )  # Eq. 5
        bar.close()
        clock.append(time.time())

        clipped = ranks.gather(stats.pop("clipped_rows")[: len(rollouts)])
        spread = saliency.view(-1, config.rollouts).std(1).mean()
        no_signal = (advantages.view(-1, config.rollouts) == 0).all(1).float().mean()
        metrics = {
            "step": step + 1,
            "reward": reward.mean().item(),
            "outcome": outcome.mean().item(),
            "saliency": saliency.mean().item(),
            "saliency_spread": spread.item(),
            "no_signal": no_signal.item(),
            "measured": mean(fact["measured"] for fact in facts),
            "length": mean(fact["length"] for fact in facts),
            "truncated": mean(fact["truncated"] for fact in facts),
            "no_delimiter": mean(fact["delimiters"] == 0 for fact in facts),
            "several_delimiters": mean(fact["delimiters"] > 1 for fact in facts),
            "no_reasoning": mean(fact["no_reasoning"] for fact in facts),
            **clip_fractions(clipped, facts),
            **combine(ranks.gather([stats])),
            "seconds_sampling": clock[1] - clock[0],
            "seconds_masks": clock[2] - clock[1],
            "seconds_policy": clock[3] - clock[2],
        }
        log.write(metrics)
        log.write_samples(step + 1, facts, saliency, advantages)
        ranks.say(update_line(metrics, steps))
        if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < steps:
            evaluate_heldout(step + 1, config.eval_every_problems, f"after {step + 1}")
    after = evaluate_heldout(steps, config.eval_problems, "after")
    if ranks.rank == 0:
        model.save_pretrained(log.folder / "checkpoint")
        curves(log.history, log.folder / "curves.png")
        print(f"\n{table({'before': before, 'after': after}, spacy_pipeline)}\n")
        print(f"{log.folder}: {', '.join(sorted(path.name for path in log.folder.iterdir()))}")
    ranks.stop()


# -------------------------------------------------------------------------- the parts of an update


def draw_questions(problems, config: Config, step: int) -> list[Problem]:
    """The update's questions: each epoch is its own permutation, the same on every rank."""
    epoch, place = divmod(step, len(problems) // config.questions)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(problems), generator=generator)
    places = order[place * config.questions : (place + 1) * config.questions]
    return [problems[n] for n in places.tolist()]


def sample_rollouts(
    model, tokenizer, questions, config: Config, step, ranks, bar
) -> tuple[list[Rollout], Prefill | None]:
    """This rank's share of the update's rollouts, question-major, and their prompts as read."""
    jobs = ranks.share([(q, r) for q in range(len(questions)) for r in range(config.rollouts)])
    prompts = [
        tokenizer.encode_prompt(instruction(config.dataset, questions[q].question)) for q, _ in jobs
    ]
    prefill = Prefill(model, prompts) if prompts else None  # a rank may have no share
    completions = generate(
        model,
        prompts,
        config.max_new_tokens,
        config.temperature,
        tokenizer.eos_ids,
        [(config.seed, step, q, r) for q, r in jobs],  # the same on any number of ranks
        bar.phase("sampling", len(jobs)),
        prefill,
    )
    rollouts = []
    for (q, _), prompt, completion in zip(jobs, prompts, completions, strict=True):
        trace = split_trace(completion, tokenizer)
        outcome = outcome_reward(trace.correct(questions[q].answer))  # Eq. 4
        rollouts.append(Rollout(questions[q], prompt, completion, trace, outcome))
    return rollouts, prefill


def saliency_rewards(model, tokenizer, rollouts, config: Config, bar, prefill=None) -> list[float]:
    """Each rollout's saliency (Eq. 3) from its own mask (Eq. 2); nan where none can be learned."""
    if config.saliency == "none":
        return [math.nan] * len(rollouts)
    rewards = torch.full((len(rollouts),), torch.nan)
    mask_config = config.mask()
    valid = [n for n, rollout in enumerate(rollouts) if rollout.trace.valid]
    valid.sort(key=lambda n: len(rollouts[n].completion))  # neighbours in length: less padding
    progress = bar.phase("masks", len(valid) * config.mask_steps, unit="step")
    for start in range(0, len(valid), config.mask_batch):
        rows = valid[start : start + config.mask_batch]
        chosen = [rollouts[n] for n in rows]
        result = optimize_traces(
            model,
            tokenizer,
            [rollout.prompt for rollout in chosen],
            [rollout.trace for rollout in chosen],
            [rollout.problem.answer for rollout in chosen],
            mask_config,
            progress,
            prefill,
        )
        rewards[rows] = rollout_saliency(
            result,
            mask_config,
            kind=config.saliency,
            sign=config.saliency_sign,
            reduction=config.saliency_reduction,
        ).to("cpu", torch.float32)
    return rewards.tolist()


def fill_missing(saliency: torch.Tensor, outcome: torch.Tensor, config: Config) -> torch.Tensor:
    """Rollouts without a saliency (nan) get the lowest of their group, else 0: never a prize.

    With --gate-saliency a wrong rollout gets nothing: 0, or its group's lowest where that is less.
    """
    groups = saliency.view(-1, config.rollouts)
    lowest = groups.nan_to_num(torch.inf).amin(1, keepdim=True)
    lowest = lowest.masked_fill(lowest.isinf(), 0.0)
    filled = groups.where(~groups.isnan(), lowest)
    if config.gate_saliency:
        wrong = outcome.view(-1, config.rollouts) < 0
        filled = filled.where(~wrong, lowest.clamp(max=0.0))
    return filled.flatten()


def describe(rollout: Rollout, saliency: float) -> dict:
    """What the other ranks, the metrics and samples.jsonl need of a rollout."""
    return {
        "id": rollout.problem.id,
        "gold": rollout.problem.answer,
        "number": rollout.trace.parsed(rollout.problem.answer),
        "text": rollout.trace.text,
        "length": len(rollout.trace.reasoning),
        "tokens": len(rollout.completion),
        "truncated": rollout.trace.truncated,
        "delimiters": rollout.trace.delimiter_count,
        "no_reasoning": not rollout.trace.reasoning_text.strip(),
        "outcome": rollout.outcome,
        "measured": not math.isnan(saliency),
        "saliency": saliency,
    }


def fill_up(rollouts, advantages, everyone: int, ranks) -> tuple[list, list, torch.Tensor]:
    """This rank's prompts, completions and advantages, filled up with rows of no weight.

    Every rank must run as many micro-batches as the others, or the gradient exchange hangs.
    """
    missing = ranks.share_size(everyone) - len(rollouts)
    prompts = [rollout.prompt for rollout in rollouts] + [[0]] * missing
    completions = [rollout.completion for rollout in rollouts] + [[]] * missing
    return prompts, completions, torch.tensor(advantages + [0.0] * missing, device=ranks.device)


def clip_fractions(clipped: list[float], facts: list[dict]) -> dict:
    """Share of ratios that the clip held: overall, and in the shorter and longer half of rollouts.

    The ratio of a whole sequence strays further the longer it is; this shows how much.
    """
    by_length = sorted(range(len(facts)), key=lambda n: facts[n]["tokens"])
    half = len(facts) // 2
    return {
        "clip_fraction": mean(clipped),
        "clip_fraction_short": mean(clipped[n] for n in by_length[:half]),
        "clip_fraction_long": mean(clipped[n] for n in by_length[half:]),
    }


def combine(stats: list[dict]) -> dict:
    """update_policy's numbers of all ranks as one: their losses add up to the update's loss."""
    return {
        "loss": sum(part["loss"] for part in stats),
        "ratio_max": max(part["ratio_max"] for part in stats),
        "ratio_min": min(part["ratio_min"] for part in stats),
        "gradient_norm": stats[0]["gradient_norm"],  # of the averaged gradient, equal on all ranks
    }


def sample_heldout(model, tokenizer, problems, config: Config, ranks, label) -> list[dict]:
    """eval.evaluate with the problems dealt over the ranks; every rank returns all records."""
    mine = ranks.share(problems)
    bar = Progress(f"held-out {label}", silent=ranks.rank > 0)
    records = evaluate(
        model,
        tokenizer,
        mine,
        config.dataset,
        samples=config.eval_samples,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        batch_size=config.eval_batch,
        progress=bar.phase("sampling", len(mine) * config.eval_samples),
    )
    bar.close()
    return ranks.gather(records)


# ------------------------------------------------------------------------------------------ output


class Log:
    """The run's folder, written by rank 0."""

    def __init__(self, config: Config, ranks: Ranks):
        self.rank, self.history = ranks.rank, []
        self.folder = Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
        if self.rank == 0:
            make_folder(self.folder)
            if any(self.folder.iterdir()):
                raise ValueError(f"--out {self.folder}: is not empty; name another folder")
            text = json.dumps(dataclasses.asdict(config), indent=2)
            (self.folder / "config.json").write_text(text + "\n")

    def write(self, line: dict) -> None:
        self.history.append(line)
        self._append("metrics.jsonl", [line])

    def write_samples(self, step, facts, saliency, advantages) -> None:
        columns = zip(facts, saliency.tolist(), advantages.tolist(), strict=True)
        lines = [{"step": step, **fact, "saliency": s, "advantage": a} for fact, s, a in columns]
        self._append("samples.jsonl", lines)

    def _append(self, name: str, lines: list[dict]) -> None:
        if self.rank == 0:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def update_line(m: dict, steps: int) -> str:
    seconds = [m["seconds_sampling"], m["seconds_masks"], m["seconds_policy"]]
    return (
        f"update {m['step']:>3}/{steps}  outcome {m['outcome']:+.3f}  "
        f"saliency {m['saliency']:.3f}  reward {m['reward']:+.3f}  length {m['length']:5.1f}  "
        f"clipped {m['clip_fraction']:4.0%}  {sum(seconds):4.1f} s "
        f"(sampling {seconds[0]:.1f}, masks {seconds[1]:.1f}, policy {seconds[2]:.1f})"
    )


def evaluation_line(label: str, summary: dict) -> str:
    passes = "  ".join(f"{key} {summary[key]:.1%}" for key in summary if key.startswith("pass"))
    return f"held-out {label}: {passes}  length {summary['tokens']:.1f} tokens"


def parse_args(arguments=None) -> Config:
    """Config from the command line: the preset's values, then the flags."""
    return parse_command(arguments)[0]


def parse_command(arguments=None) -> tuple[Config, bool, int | None]:
    """Config, and what is no setting of a run: --dry-run and the --world-size to plan for."""
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
            parser.add_argument(flag, action="store_true", default=None, help=text)
            continue
        kind = {int: int, int | None: int, float: float, float | None: float}.get(entry.type, str)
        parser.add_argument(flag, type=kind, choices=entry.metadata["choices"], help=text)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, its memory and its time"
    )
    text = "GPUs to plan for with --dry-run (default: torchrun's, else 8 for paper, 1 for micro)"
    parser.add_argument("--world-size", type=int, help=text)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    dry_run, world_size = given.pop("dry_run"), given.pop("world_size", None)
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
    config = Config(**PRESETS[given.get("preset", "micro")] | given)
    for entry in entries:
        value, flag = getattr(config, entry.name), "--" + entry.name.replace("_", "-")
        least, above = entry.metadata["least"], entry.metadata["above"]
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{flag} {value}: must be a finite number")
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
    return config, dry_run, world_size


def main() -> None:
    config, dry_run, world_size = parse_command()
    try:
        if not dry_run:
            train(config)
        elif os.environ.get("RANK", "0") == "0":
            planned = plan.plan_run(config, world_size)
            print(plan.report(planned, plan.measured(planned, pick_device(config.device))))
    except (ValueError, OSError) as error:  # what a user gave: one sentence, no traceback
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}")


if __name__ == "__main__":
    main()
