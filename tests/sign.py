"""Before any training: what would each candidate reward pay for?

    python -m tests.sign --questions 4       # a first look; the whole is part of tests/study.py

The shipped model answers held-out questions of the micro task eight times each. Every trace gets
each candidate saliency, and within each question's eight the rewards are ranked against what the
traces are: their length, their share of numbers and of stop words (spaCy, blank English), their
share of decorating characters (the micro task's parser, by the trace's own answer) and whether the
answer is right. GRPO sees nothing of a reward but its differences within a group, so a reward whose
rank correlation with length is -1 there *is* a length penalty.

The paper's mask (200 steps) gives, each per token first and as the flat mean over entries (Eq. 3):
`restored` and `literal`; attribution's four reductions; the log-probability recovered. Masks of
other kinds take 50 steps that go as far, with AdamW's memory matched to the path (their order is
the 200 steps' to 0.95, docs/fewer_steps.md): with sparsity; one entry a column for all rows (per
column); only rows of delimiter and answer. And one step alone. `length` is the penalty itself.
"""

import argparse
import json
import math

import torch

import bootstrap
from atman import MaskConfig, MaskResult, answer_loss, frozen, pack, rollout_saliency
from cache import Prefill
from data import micro_task
from data.prompts import Tokenizer
from data.traces import gold_tail
from faithfulness import optimize_traces
from model import Llama
from ranks import Progress
from suffix import Suffix
from table1 import counts_by_text, load_spacy
from tests.fewer_steps import sample, spearman

PAPER = MaskConfig()
SHORT = MaskConfig.in_steps(50, path_memory=True)
SPARSITY = 1e-3
PROPERTIES = ("length", "numbers", "stop words", "decorating", "correct")
BATCH = 16


def rewards(model, tokenizer, rows, count) -> dict[str, list[float]]:
    """Every candidate reward of these rollouts (fewer_steps.sample's records)."""

    def learn(config):
        parts = ([row[key] for row in rows] for key in ("prompt", "trace", "gold"))
        return optimize_traces(model, tokenizer, *parts, config, count)

    result, found = learn(PAPER), {}
    for sign in ("restored", "literal"):
        found[f"mask {sign}"] = rollout_saliency(result, PAPER, "mask", sign)
    literal = result.mask.clamp(max=0) / PAPER.init * result.region
    flat = literal.sum((1, 2)) / result.region.sum((1, 2))  # Eq. 3, over all entries at once
    found |= {"mask restored, flat": 1 - flat, "mask literal, flat": flat}
    for reduction in ("even", "mean", "share", "sum"):
        saliency = rollout_saliency(result, PAPER, "attribution", reduction=reduction)
        found[f"attribution {reduction}"] = saliency
    tails = [gold_tail(row["trace"], row["gold"], tokenizer) for row in rows]
    answer_tokens = torch.tensor([len(answer) for _, answer in tails])
    found["log-probability recovered"] = (result.losses[0] - result.losses[-1]) * answer_tokens

    sparse = MaskConfig.in_steps(SHORT.steps, path_memory=True, sparsity=SPARSITY)
    found[f"mask restored, sparsity {SPARSITY:g}"] = rollout_saliency(learn(sparse), sparse)
    for kind in ("per column", "answer rows"):
        found[f"mask restored, {kind}"] = smaller_mask(model, rows, tails, kind, SHORT, count)
    one = MaskConfig.in_steps(1)
    result = learn(one)
    found["one step, mask restored"] = rollout_saliency(result, one)
    found["one step, attribution even"] = rollout_saliency(result, one, "attribution")
    found["length"] = [-len(row["trace"].reasoning) for row in rows]
    return {name: [float(value) for value in values] for name, values in found.items()}


def smaller_mask(model, rows, tails, kind: str, config: MaskConfig, count) -> torch.Tensor:
    """`restored` (B,) of a mask with fewer entries than the paper's, learned in the same way.

    per column: one entry for all rows that see a token. answer rows: entries in the rows of
    delimiter and answer alone; the reasoning's own rows see each other as usual.
    """
    prompts, reasonings = [row["prompt"] for row in rows], [r["trace"].reasoning for r in rows]
    batch = pack(prompts, reasonings, *zip(*tails, strict=True), "cpu")
    suffix = Suffix(model, Prefill(model, prompts), prompts, batch.tokens, batch.answer_rows)
    columns = batch.region.any(1)  # (B, T)
    if kind == "per column":
        region, entries = batch.region, columns[:, None]  # (B, R, T), (B, 1, T)
    else:
        place = torch.arange(batch.region.shape[1])[:, None]
        region = entries = batch.region & (place >= columns.sum(1)[:, None, None])
    mask = (config.init * entries).requires_grad_()
    optimizer = torch.optim.AdamW(
        [mask], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    with frozen(model):
        for _ in range(config.steps):
            additive = (config.scale * mask.clamp(max=0)).expand_as(region)
            loss = answer_loss(suffix.logits(additive.masked_fill(~region, 0.0)), batch).sum()
            (mask.grad,) = torch.autograd.grad(loss, mask)
            optimizer.step()
            count(len(rows))
    # Only mask and region are read for this kind of saliency.
    return rollout_saliency(MaskResult(mask.detach(), entries, None, None), config)


def describe(records) -> list[dict]:
    """What each trace is: PROPERTIES by name, None for decoration that cannot be told."""
    words = counts_by_text([record["text"] for record in records], load_spacy(None))
    rows = []
    for record, counts in zip(records, words, strict=True):
        decorating = None
        if record["number"] is not None:
            labels = micro_task.label_characters(record["text"], record["number"])
            pairs = zip(record["text"], labels, strict=True)
            marks = [mark for char, mark in pairs if not char.isspace()]
            decorating = marks.count(micro_task.DECORATING) / max(len(marks), 1)
        rows.append(
            {
                "length": len(record["trace"].reasoning),
                "numbers": counts["numbers"] / max(counts["tokens"], 1),
                "stop words": counts["stop_words"] / max(counts["tokens"], 1),
                "decorating": decorating,
                "correct": float(record["correct"]),
            }
        )
    return rows


def measure(model, tokenizer, first: int, questions: int, rollouts: int, bar) -> list[dict]:
    """Rows of id, PROPERTIES and rewards: held-out questions first, first + 1, ..."""
    records = sample(model, tokenizer, questions, rollouts, 0, bar, first)
    steps = PAPER.steps + 3 * SHORT.steps + 1
    count = bar.phase("masks", steps * len(records), unit="step")
    rows = []
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        columns = rewards(model, tokenizer, batch, count)
        for n, (record, facts) in enumerate(zip(batch, describe(batch), strict=True)):
            values = {name: float(f"{column[n]:.6g}") for name, column in columns.items()}
            rows.append({"id": record["id"], **facts, "rewards": values})
    bar.close()
    return rows


def correlations(
    rows: list[dict], held: str | None = None, draws: int = bootstrap.DRAWS
) -> dict[str, dict[str, dict]]:
    """reward -> property -> mean within-question Spearman with its interval over questions.

    Questions where either side is constant have no order and are left out, which `questions` tells.
    held: a property that is held fixed. The correlation is then the partial one of the ranks, and
    questions where that property alone decides the order of either side are left out as well.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    table: dict[str, dict[str, dict]] = {}
    for name in rows[0]["rewards"]:
        table[name] = {}
        for which in PROPERTIES:
            if which == held:
                continue
            found = {}
            for question, members in groups.items():
                known = [m for m in members if m[which] is not None]
                if len(known) < 2:
                    continue
                sides = [m["rewards"][name] for m in known], [m[which] for m in known]
                order = spearman(*sides)
                if held is not None:
                    order = partial(order, *(spearman(side, [m[held] for m in known])
                                             for side in sides))  # fmt: skip
                if order is not None:
                    found[question] = (order, 1.0)
            table[name][which] = bootstrap.interval(found, draws)
    return table


def partial(both: float | None, one: float | None, other: float | None) -> float | None:
    """The correlation of two with a third held fixed, from the three correlations by pairs."""
    if None in (both, one, other) or max(abs(one), abs(other)) > 1 - 1e-9:
        return None
    return (both - one * other) / math.sqrt((1 - one**2) * (1 - other**2))


def markdown(table: dict[str, dict[str, dict]]) -> str:
    """`correlations` as a table; in parentheses the most questions that a column rests on."""
    columns = list(next(iter(table.values())))
    most = {which: max(line[which]["questions"] for line in table.values()) for which in columns}
    heads = [f"{which} ({count})" for which, count in most.items()]
    lines = [f"| reward | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, line in table.items():
        lines.append(f"| {name} | {' | '.join(map(cell, line.values()))} |")
    return "\n".join(lines)


def cell(found: dict) -> str:
    """A correlation with its interval; - where no question has an order."""
    if found["low"] is None:
        return "-"
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=200, help="default: 200")
    parser.add_argument("--rollouts", type=int, default=8, help="of each (default: 8)")
    parser.add_argument("--first", type=int, default=0, help="number of the first question")
    parser.add_argument("--out", metavar="FILE", help="JSON file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = Llama.from_pretrained("data/micro"), Tokenizer.from_directory("data/micro")
    bar = Progress("sign")
    rows = measure(model, tokenizer, args.first, args.questions, args.rollouts, bar)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(rows, file)
    print(markdown(correlations(rows)))


if __name__ == "__main__":
    main()
