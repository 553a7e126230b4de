"""A supervised warm start: a model learns the data set's own solutions in the format to come.

    python -m lab.study.warm_start --model DIR --dataset gsm8k --out runs/warm
    torchrun train.py --model runs/warm --dataset gsm8k

A model that hardly ever writes the delimiter earns no reward, and GRPO has nothing to raise. Here
it reads every training problem as train.py will put it (--shots, --system and --delimiter are the
same) and lowers the cross-entropy of what a worked example says: solution, delimiter, answer, EOS.
AdamW, a short warm-up and a rate that falls to zero; one process on one device.

OUT receives an ordinary checkpoint and warm_start.json: the settings, each step's loss, and what
held-out problems say before and after. Until then OUT.state holds what the same command goes on
from after a kill or a signal. make_micro.py trains with `fit` too.
"""

import dataclasses
import itertools
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from data import DATASETS, Problem, load_problems
from data.files import json_text, read_json, write_file
from data.prompts import Prompting
from data.tokenizer import BASE_PROMPT, Tokenizer
from eval import sample_problems
from grpo import token_logprobs
from lab.run import flags, graphs
from lab.run.checkpoint import load_llama, save_llama
from lab.run.command import changes, sentences
from lab.run.flags import PromptFlags, flag, precision_flag
from lab.run.hub import weights_directory
from lab.run.policy import Policy
from lab.run.ranks import Interrupted, Progress, Ranks, Stop, pick_device
from lab.run.runs import RunFolder

FREE = ("out", "micro_tokens", "save_every", "device")  # training is the same, rounding aside
SAMPLED = 32  # held-out problems that are sampled too
Row = tuple[list[int], list[int], list[float]]  # prompt, completion, a weight for each of its ids


@dataclass(frozen=True)
class Settings(PromptFlags):
    """The command line and its help."""

    keep: ClassVar[int] = 1  # states in OUT.state

    model: str = flag(None, "checkpoint directory, folder of a run, or hub name", required=True)
    out: str = flag(None, "checkpoint directory to write", required=True)
    dataset: str = flag("gsm8k", "whose solutions to learn", tuple(DATASETS))
    data_dir: str | None = flag(None, "folder with the dataset's files")
    limit: int | None = flag(None, "problems to learn (all; micro: 10,000)", least=1, most=10**6)
    epochs: int | None = flag(None, "passes over them, by default 2", least=1)
    steps: int | None = flag(None, "optimiser steps, in place of --epochs", least=1)
    batch_size: int = flag(32, "problems a step", least=1)
    micro_tokens: int = flag(4096, "tokens of a forward pass; fewer take less memory", least=1)
    lr: float = flag(1e-5, "rate between warm-up and decay", above=0)
    precision: str | None = precision_flag("of forward passes; all else is float32")
    heldout: int = flag(128, f"held-out problems; {SAMPLED} are sampled", least=1, most=10**6)
    max_new_tokens: int | None = flag(None, "longest sample (default: 512, micro: 200)", least=1)
    save_every: int = flag(100, "steps between states to go on from", least=1)
    device: str | None = flag(None, "cpu or cuda; default: cuda where there is one")
    seed: int = flag(0, "of the order of the problems and of sampling", least=0)

    def check(self) -> None:
        """Raise ValueError for settings that do not go together."""
        if self.dataset == "mmlu":
            reason = "has no solutions to learn; name a data set that has, such as gsm8k"
            raise ValueError(f"--dataset mmlu: {reason}")
        if self.steps and self.epochs:
            raise ValueError("--steps and --epochs both say how long to train: give one")


# ------------------------------------------------------------------- training, make_micro.py's too


def summed_loss(model, rows: list[Row], autocast=None) -> torch.Tensor:
    """Cross-entropy of the rows' completions in nats, times its weights, summed: a scalar.

    autocast: the dtype of the forward's products, None for the weights' own.
    """
    prompts, completions, weights = zip(*rows, strict=True)
    device = next(model.parameters()).device
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        logprobs, _ = token_logprobs(model, prompts, completions)  # (B, C)
    weights = pad_sequence([torch.tensor(row) for row in weights], batch_first=True)
    return -(logprobs * weights.to(device)).sum()


def fit(model, optimizers, batches: Iterable, rate, autocast=None) -> Iterator[torch.Tensor]:
    """Train on batches; yields each step's loss, divided by its weights' sum, on the device.

    batches: (step, micro-batches) each, a micro-batch being a list of Rows
    rate: step -> factor on the optimisers' rates
    """
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    for step, parts in batches:
        total, loss = sum(sum(row[2]) for part in parts for row in part), 0.0
        for part in parts:
            share = summed_loss(model, part, autocast) / total
            share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, full in groups:
            group["lr"] = full * rate(step)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        yield loss


def warm_up_and_decay(step: int, steps: int, warm_up: int, decay: float = 1.0) -> float:
    """Factor on a rate: up in warm_up steps, then 1, then to zero over the last share `decay`."""
    return min((step + 1) / warm_up, 1.0, (steps - step) / (decay * steps))


def length(row: Row) -> int:
    return len(row[0]) + len(row[1])


def by_length(rows: list[Row], size: int, rng: random.Random) -> list[list[Row]]:
    """Batches of neighbours in length, because that leaves less padding, in an order by chance."""
    rows = sorted(rows, key=length)
    batches = [rows[n : n + size] for n in range(0, len(rows), size)]
    rng.shuffle(batches)
    return batches


# ------------------------------------------------------------------------------------ the problems


def rows_of(problems: list[Problem], prompting: Prompting, tokenizer: Tokenizer) -> list[Row]:
    """Each problem's prompt, and its solution as the model is to write it, through the EOS."""
    rows = []
    for problem in problems:
        text = prompting.completion(problem)
        if tokenizer.chat_template is None:  # a base model's prompt ends in "Answer:"
            text = BASE_PROMPT["assistant"].format(text).rstrip()
        # Of Llama 3 Instruct's stop tokens the last one ends a turn.
        completion = [*tokenizer.encode(text), tokenizer.eos_ids[-1]]
        rows.append((prompting.prompt(tokenizer, problem), completion, [1.0] * len(completion)))
    return rows


def micro_batches(rows: list[Row], most: int) -> list[list[Row]]:
    """Rows, sorted by length, in parts of one row or of at most `most` tokens with padding."""
    parts: list[list[Row]] = []
    for row in rows:
        if not parts or length(row) * (len(parts[-1]) + 1) > most:
            parts.append([])
        parts[-1].append(row)
    return parts


def batches_of(rows: list[Row], settings: Settings) -> Iterator[list[list[Row]]]:
    """The micro-batches of one step after the other, without end: the seed alone decides them."""
    size = settings.batch_size
    for epoch in itertools.count():
        rng = random.Random(f"epoch/{settings.seed}/{epoch}")
        order = rng.sample(rows, len(rows))
        for start in range(0, len(rows), 16 * size):  # sorted among sixteen batches
            for batch in by_length(order[start : start + 16 * size], size, rng):
                yield micro_batches(batch, settings.micro_tokens)


# ------------------------------------------------------------------------------------- the command


def warm_start(settings: Settings) -> None:
    """Train, measure before and after, and write OUT; go on from OUT.state where that is."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("a warm start is one process: start it with python, not with torchrun")
    out = Path(settings.out)
    state = out.with_name(f"{out.name}.state")
    refuse_changes(settings, out, state)
    ranks = Ranks(0, 1, pick_device(settings.device))
    graphs.ENABLED = not settings.eager
    directory = weights_directory(settings.model)
    problems = load_problems(
        settings.dataset, "train", settings.data_dir, settings.limit, settings.seed
    )
    heldout = load_problems(settings.dataset, "heldout", settings.data_dir, settings.heldout)
    tokenizer = Tokenizer.from_directory(directory)
    model = load_llama(directory, device=ranks.device)
    tokenizer.check_fits(model.config.vocab_size)
    rows = rows_of(problems, settings.prompting, tokenizer)
    steps = settings.steps or (settings.epochs or 2) * math.ceil(len(rows) / settings.batch_size)
    policy = Policy(model, ranks, settings.lr, settings.precision)
    folder = RunFolder(replace(settings, out=str(state)), ranks, resume=True)
    done, _ = folder.restore(model, policy.optimizer, ranks)
    print(
        f"{steps} steps of {settings.batch_size} of {len(rows)} problems on {ranks.device}"
        + (f", going on after step {done}" if done else "")
    )
    stop = Stop()
    bar = Progress("warm start", stop=stop)
    try:
        if not folder.history:
            before = measure(policy, tokenizer, heldout, settings, bar)
            folder.write({"step": 0, "heldout": before})
        left = enumerate(itertools.islice(batches_of(rows, settings), done, steps), done)
        warm_up = math.ceil(steps / 20)
        count, began = bar.phase("training", steps, "step"), time.time()
        count(done)
        for loss in fit(
            model, [policy.optimizer], left, lambda n: warm_up_and_decay(n, steps, warm_up),
            policy.autocast,
        ):  # fmt: skip
            done, now = done + 1, time.time()
            folder.write({"step": done, "loss": loss.item(), "seconds": now - began})
            began = now
            if done % settings.save_every == 0 or done == steps:
                folder.save(done, model, policy.optimizer, ranks, {})
            bar.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            count(1)
        save_llama(model, out)
        after = measure(policy, tokenizer, heldout, settings, bar)
    except Interrupted:
        if done and folder.saved != done:
            folder.save(done, model, policy.optimizer, ranks, {})
        print(f"stopped after step {done} of {steps}; the same command goes on")
        sys.exit(128 + stop.signal)
    lines = folder.history[1:]
    minutes = sum(line["seconds"] for line in lines) / 60
    result = {
        "settings": dataclasses.asdict(settings), "problems": len(rows), "steps": steps,
        "minutes": minutes, "losses": [line["loss"] for line in lines],
        "before": folder.history[0]["heldout"], "after": after,
    }  # fmt: skip
    write_file(out / "warm_start.json", json_text(result))
    (state / "config.json").unlink()  # first: from here on OUT is there already
    shutil.rmtree(state)
    print(f"{table(result)}\n{minutes:.1f} minutes of training; wrote {out}")


def refuse_changes(settings: Settings, out: Path, state: Path) -> None:
    """ValueError where OUT holds something, or OUT.state was begun with other settings."""
    if not (begun := state / "config.json").is_file():
        if out.is_file() or out.is_dir() and any(out.iterdir()):
            raise ValueError(f"--out {out}: is there already; name another folder")
        return
    saved = read_json(begun, f"delete {state} to begin anew")
    if changed := changes(saved, dataclasses.asdict(settings), FREE).values():
        advice = f"give the saved ones, or delete {state} to begin anew"
        reason = f"was begun with other settings: {', '.join(changed)}; {advice}"
        raise ValueError(f"--out {out}: {reason}")


@torch.no_grad()
def measure(policy, tokenizer, problems: list[Problem], settings: Settings, bar: Progress) -> dict:
    """loss: of held-out completions, nats per token; the other keys: shares of SAMPLED traces."""
    rows = sorted(rows_of(problems, settings.prompting, tokenizer), key=length)
    count, loss = bar.phase("held-out loss", len(rows), "problem"), 0.0
    for part in micro_batches(rows, settings.micro_tokens):
        loss += summed_loss(policy.model, part, policy.autocast).item()
        count(len(part))
    shares = {"loss": loss / sum(len(completion) for _, completion, _ in rows)}
    most = settings.max_new_tokens or min(512, DATASETS[settings.dataset].max_new_tokens["heldout"])
    policy.refresh()
    asked = problems[:SAMPLED]
    for temperature, name in ((0.0, "greedy"), (1.0, "at temperature 1")):
        records = sample_problems(
            policy.sampler, tokenizer, asked, settings.prompting, samples=1,
            temperature=temperature, max_new_tokens=most, seed=settings.seed,
            progress=bar.phase(f"sampling {name}", len(asked)),
        )  # fmt: skip
        for key in ("valid", "correct"):
            shares[f"{key} {name}"] = sum(record[key] for record in records) / len(records)
    bar.close()
    return shares


def table(result: dict) -> str:
    """The held-out numbers before and after training, a line each."""
    lines = [f"{'held out':<26}{'before':>10}{'after':>10}"]
    for key, before in result["before"].items():
        form = "10.3f" if key == "loss" else "10.1%"
        lines.append(f"{key:<26}{before:{form}}{result['after'][key]:{form}}")
    return "\n".join(lines)


def main() -> None:
    settings = flags.parse(Settings, __doc__.split("\n")[0])
    with sentences():
        warm_start(settings)


if __name__ == "__main__":
    main()
