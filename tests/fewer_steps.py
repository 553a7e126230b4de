"""Fewer mask steps than the paper's 200: is the order of rewards within a group kept?

    python -m tests.fewer_steps                              # one thread, about 11 minutes of it
    python -m tests.fewer_steps --questions 4 --steps 10 5   # a first look

The shipped model answers held-out questions of the micro task eight times each. Every trace gets
the paper's mask (200 AdamW steps) and cheaper ones, from which the same rewards are read. A rule
with N steps has rate 0.2 / N, so that it can go as far, and N + 1 gradient evaluations:
1. `plain`: N steps, all else as in the paper.
2. `matched`: its betas raised to the power 200 / N, so that AdamW remembers as long a part of the
   path. 0.6 forgets in 3 of 200 steps; at 10 steps the same 0.6 remembers a quarter of the path.
3. `L(c) alone`: no step. Where the optimisation recovers nearly all of the loss it began with, that
   loss says what `sum`, and over the number of tokens what `mean`, will be.

Rank correlations are with the paper's masks, ties averaged (Kendall's is tau-b): of a group's
rewards, averaged over questions with their 95% interval, and of a trace's token saliencies. Groups
where either side is constant have none and are counted. AUROC is against the micro task's labels,
on all correct traces that have both classes. Seconds are CPU time per rollout, prompts included.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from atman import MaskConfig, rollout_saliency, token_saliency
from data import instruction, load_problems, micro_task
from data.prompts import Tokenizer
from data.traces import reasoning_spans, split_trace
from eval import evaluate
from faithfulness import auroc, optimize_traces
from model import Llama
from ranks import Progress

PAPER = MaskConfig()
REWARDS = {  # name -> rollout_saliency's arguments; `literal` is `restored` upside down
    "mask": {"kind": "mask"},
    "even": {"kind": "attribution", "reduction": "even"},
    "mean": {"kind": "attribution", "reduction": "mean"},
    "share": {"kind": "attribution", "reduction": "share"},
    "sum": {"kind": "attribution", "reduction": "sum"},
}
KINDS = ("mask", "attribution")


def plain(steps: int) -> MaskConfig:
    return MaskConfig.in_steps(steps)


def matched(steps: int) -> MaskConfig:
    return MaskConfig.in_steps(steps, path_memory=True)


def ranks(values) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    values = np.asarray(values)
    smaller = (values[:, None] > values).sum(1)
    return smaller + ((values[:, None] == values).sum(1) - 1) / 2


def correlation(x, y) -> float | None:
    """Pearson's; None where either side is constant."""
    x, y = (np.asarray(side, dtype=float) - np.mean(side) for side in (x, y))
    length = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / length) if length else None


def spearman(x, y) -> float | None:
    return correlation(ranks(x), ranks(y))


def kendall(x, y) -> float | None:
    """tau-b: agreeing less disagreeing pairs, over the mean number of pairs without a tie."""
    x, y = (np.sign(np.subtract.outer(side, side)) for side in map(np.asarray, (x, y)))
    untied = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / untied) if untied else None


def mean_and_half_width(values: list[float]) -> tuple[float, float, int]:
    """Mean, half the width of its 95% interval (normal approximation), and how many."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan, len(values)
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half), len(values)


def sample(
    model, tokenizer, questions: int, rollouts: int, seed: int, bar: Progress, first: int = 0
) -> list[dict]:
    """evaluate's records of valid traces with their trace and labels, sorted by length.

    Of the held-out questions first, first + 1, ...
    """
    problems = load_problems("micro", "heldout", limit=first + questions)[first:]
    count = bar.phase("sampling", questions * rollouts)
    records = evaluate(
        model, tokenizer, problems, "micro",
        samples=rollouts, max_new_tokens=200, seed=seed, progress=count,
    )  # fmt: skip
    chosen = []
    for record in records:
        trace = split_trace(record["completion"], tokenizer)
        if not trace.valid:
            continue
        record["trace"] = trace
        record["prompt"] = tokenizer.encode_prompt(instruction("micro", record["question"]))
        text, spans = reasoning_spans(trace.reasoning, tokenizer)
        if record["correct"]:  # else there is no telling what the answer depends on
            record["labels"] = np.array(micro_task.token_labels(text, record["number"], spans))
            record["words"] = np.array([text[a:b].strip().strip(".,:;?!") != "" for a, b in spans])
        chosen.append(record)
    return sorted(chosen, key=lambda record: len(record["completion"]))


def learn(model, tokenizer, records, config, batch_size, count) -> dict:
    """What is compared: a reward per rollout of each kind, token saliencies, losses, seconds."""
    found = {name: [] for name in (*REWARDS, "first loss", "last loss")}
    found["tokens"] = {kind: [] for kind in KINDS}
    started = time.process_time()
    for start in range(0, len(records), batch_size):
        rows = records[start : start + batch_size]
        result = optimize_traces(
            model,
            tokenizer,
            [row["prompt"] for row in rows],
            [row["trace"] for row in rows],
            [row["gold"] for row in rows],
            config,
            count,
        )
        for name, arguments in REWARDS.items():
            found[name] += rollout_saliency(result, config, **arguments).tolist()
        for kind in KINDS:
            tokens = token_saliency(result, config, kind)
            found["tokens"][kind] += [row.numpy() for row in tokens]
        found["first loss"] += result.losses[0].tolist()
        found["last loss"] += result.losses[-1].tolist()
    return found | {"seconds": (time.process_time() - started) / len(records)}


def loss_alone(reference: dict, records) -> dict:
    """The rewards of the rule that takes no step, from losses before the first one."""
    loss = np.array(reference["first loss"])
    length = np.array([len(record["trace"].reasoning) for record in records])
    return {"sum": loss, "mean": loss / length}


def within_groups(measure, rewards, reference, ids) -> dict:
    """Mean over groups of a rank correlation, half its 95% interval, groups used and skipped."""
    groups = [np.flatnonzero(np.array(ids) == name) for name in dict.fromkeys(ids)]
    rewards, reference = np.array(rewards), np.array(reference)
    values = [measure(rewards[rows], reference[rows]) for rows in groups]
    used = [value for value in values if value is not None]
    mean, half, count = mean_and_half_width(used)
    return {"mean": mean, "half": half, "groups": count, "skipped": len(values) - count}


def token_spearman(tokens, reference) -> float:
    values = [spearman(*pair) for pair in zip(tokens, reference, strict=True)]
    return mean_and_half_width([value for value in values if value is not None])[0]


def label_auroc(tokens, records) -> dict:
    """all tokens and no punctuation -> (mean AUROC, half its 95% interval, questions, traces).

    Traces of a question are averaged first: they are too alike to count as independent.
    """
    areas = {"all tokens": {}, "no punctuation": {}}  # which -> question -> one per trace
    for scores, record in zip(tokens, records, strict=True):
        if "labels" not in record:
            continue
        known = record["labels"] != micro_task.UNRECOGNISED
        for which, used in (("all tokens", known), ("no punctuation", known & record["words"])):
            area = auroc(scores[used], record["labels"][used] == micro_task.COMPUTING)
            if area is not None:
                areas[which].setdefault(record["id"], []).append(area)
    return {
        which: (
            *mean_and_half_width([float(np.mean(found)) for found in by_question.values()]),
            sum(map(len, by_question.values())),
        )
        for which, by_question in areas.items()
    }


def compare(found, reference, records) -> dict:
    """The line of one rule: everything that is printed, and what only the JSON has."""
    ids = [record["id"] for record in records]
    line = {"seconds": found.get("seconds"), "spearman": {}, "kendall": {}, "token spearman": {}}
    for name in REWARDS:
        if name in found:
            for key, measure in (("spearman", spearman), ("kendall", kendall)):
                line[key][name] = within_groups(measure, found[name], reference[name], ids)
    if "tokens" in found:
        line["last loss"] = float(np.mean(found["last loss"]))
        for kind in KINDS:
            pair = found["tokens"][kind], reference["tokens"][kind]
            line["token spearman"][kind] = token_spearman(*pair)
        line["auroc"] = {kind: label_auroc(found["tokens"][kind], records) for kind in KINDS}
    return line


def orders_table(lines: dict) -> str:
    """Markdown: agreement of rewards with the paper's, Spearman with interval / Kendall."""
    rows = ["| rule | " + " | ".join(REWARDS) + " | s per rollout |", "|---" * 7 + "|"]
    for rule, line in lines.items():
        cells = []
        for name in REWARDS:
            order, tau = line["spearman"].get(name), line["kendall"].get(name)
            cells.append(
                f"{order['mean']:.2f} ± {order['half']:.2f} / {tau['mean']:.2f}" if order else ""
            )
        seconds = "" if line["seconds"] is None else f"{line['seconds']:.3f}"
        rows.append(f"| {rule} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(rows)


def tokens_table(lines: dict) -> str:
    """Markdown: token Spearman with the paper's, AUROC on all tokens / without punctuation."""
    titles = [f"{kind}: {what}" for kind in KINDS for what in ("token Spearman", "AUROC")]
    rows = ["| rule | " + " | ".join(titles) + " | last loss |", "|---" * 6 + "|"]
    for rule, line in lines.items():
        if "auroc" not in line:
            continue
        cells = []
        for kind in KINDS:
            areas = [f"{area[0]:.2f}" for area in line["auroc"][kind].values()]
            cells += [f"{line['token spearman'][kind]:.2f}", " / ".join(areas)]
        rows.append(f"| {rule} | {' | '.join(cells)} | {line['last loss']:.2f} |")
    return "\n".join(rows)


def describe(lines: dict, records) -> str:
    """The line below the tables: how much was measured, and what was left out."""
    ids = {record["id"] for record in records}
    areas = [area for line in lines.values() for kind in line.get("auroc", {}).values()
             for area in kind.values()]  # fmt: skip
    skipped = {
        f"{rule} {name}": order["skipped"]
        for rule, line in lines.items()
        for name, order in line["spearman"].items()
        if order["skipped"]
    }
    text = (
        f"{len(records)} traces of {len(ids)} questions; AUROC on {areas[0][3]} traces, "
        f"{areas[1][3]} without punctuation, +- {max(area[1] for area in areas):.2f} at most; "
    )
    return text + f"constant groups skipped: {skipped or 'none'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="data/micro", help="checkpoint directory")
    add("--questions", type=int, default=40, help="held-out questions")
    add("--rollouts", type=int, default=8, help="rollouts per question")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--steps", type=int, nargs="*", default=[100, 50, 20, 10, 5, 2, 1], metavar="N",
        help="steps of the plain rule")  # fmt: skip
    add("--matched", type=int, nargs="*", default=[50, 40, 20, 10, 5], metavar="N",
        help="steps of the rule with matched betas")  # fmt: skip
    add("--batch", type=int, default=16, help="rollouts per mask optimisation, sorted by length")
    add("--out", metavar="FILE", help="JSON file for all numbers")
    args = parser.parse_args()
    for name in ("questions", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.rollouts < 2:
        parser.error(f"--rollouts {args.rollouts}: an order needs at least 2")
    if min([*args.steps, *args.matched], default=1) < 1:
        parser.error("--steps, --matched: at least 1 step")
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if args.out:  # before the work, not after it
        Path(args.out).touch()
    tokenizer, model = Tokenizer.from_directory(args.model), Llama.from_pretrained(args.model)
    bar = Progress("fewer steps")
    records = sample(model, tokenizer, args.questions, args.rollouts, args.seed, bar)
    rules = {f"paper, {PAPER.steps}": PAPER}
    rules |= {f"plain, {steps}": plain(steps) for steps in args.steps}
    rules |= {f"matched, {steps}": matched(steps) for steps in args.matched}
    lines, reference = {}, None
    for name, config in rules.items():
        count = bar.phase(name, config.steps * len(records), unit="step")
        found = learn(model, tokenizer, records, config, args.batch, count)
        reference = reference or found
        lines[name] = compare(found, reference, records)
        if args.out:  # after each rule: a run that is cut short has something to show
            report = {"arguments": vars(args), "torch": torch.__version__, "rules": lines}
            Path(args.out).write_text(json.dumps(report, indent=1))
    bar.close()
    lines["L(c) alone"] = compare(loss_alone(reference, records), reference, records)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1))
    print(f"one thread, torch {torch.__version__}; {describe(lines, records)}\n")
    print(f"{orders_table(lines)}\n\n{tokens_table(lines)}")


if __name__ == "__main__":
    main()
