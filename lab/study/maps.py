"""Which token map finds what the answer rests on: learned, integrated, left out, or none at all?

    python -m lab.study.maps --questions 100 --out docs/study/maps-heldout.json
    python -m lab.study.maps --questions 100 --split hard --out docs/study/maps-hard.json

A map scores each reasoning token of a trace. It is measured on right traces that compute, the
first such sample of each question: by AUROC (computing tokens against decorating ones, with and
without punctuation), comprehensiveness and sufficiency (faithfulness.erasure, the mean over the
shares of tokens). The two rankings to beat know nothing of the model: later is more, and numbers
are more. `joint` adds the ranks of attribution and leave-one-out.
"""

from collections import defaultdict

import numpy as np
import torch

from atman import MaskConfig, frozen
from data.traces import Rollout
from lab.measure.bootstrap import interval
from lab.measure.faithfulness import Erased, erasure, label_areas, rankings
from lab.run import flags
from lab.run.command import sentences
from lab.run.ranks import Progress
from lab.study.kept import round_off, write
from lab.study.measures import cell, table
from lab.study.selection import (
    POINTS,
    Settings,
    integrated_gradients,
    open_start,
    sample_traces,
)

MEASURES = ("AUROC", "AUROC, no punctuation", "comprehensiveness", "sufficiency")
BASES = ("recency", "is-number")
COSTS = {  # of each map that costs anything, for a trace of T tokens
    "mask": "{steps} b", "attribution": "{steps} b", "gradient": "1 b", "leave-one-out": "T f",
    "integrated gradients": f"{POINTS} b", "joint": "{steps} b, T f",
}  # fmt: skip


def measure(model, tokenizer, rollouts: list[Rollout], steps: int, count) -> list[dict]:
    """ranking -> its MEASURES, for each rollout; an AUROC is None where one class is absent."""
    erased, config = Erased(model, tokenizer, rollouts), MaskConfig.in_steps(steps, True)
    configs = {"mask": (config, "mask"), "attribution": (config, "attribution")}
    scores = rankings(erased, configs)
    for n, row in enumerate(scores):
        batch, suffix = erased.batch([n])
        with frozen(model), torch.enable_grad():
            gained = integrated_gradients(batch, suffix.logits, -12.0)
        row["integrated gradients"] = gained.sum(1)[0].double().cpu().numpy()
        row["joint"] = sum(np.argsort(np.argsort(row[k])) for k in ("attribution", "leave-one-out"))
    rows = []
    for rollout, by_ranking, erasing in zip(rollouts, scores, erasure(erased, scores), strict=True):
        areas = label_areas(rollout, tokenizer, by_ranking)
        of = [areas["all tokens"], areas["no punctuation"]]
        of += [{name: np.mean(v) for name, v in erasing[kind].items()} for kind in MEASURES[2:]]
        rows.append({name: [values[name] for values in of] for name in by_ranking})
        count(1)
    return rows


def markdown(kept: dict) -> str:
    """The maps' measures, and how far each is from BASES; less sufficiency is better."""
    found: dict[str, dict[str, dict]] = defaultdict(lambda: defaultdict(dict))
    for question, row in kept["traces"].items():
        for name, values in row.items():
            for measure, value in zip(MEASURES, values, strict=True):
                if value is not None:
                    found[name][measure][question] = (value, 1.0)
    rows = [
        [name, *(cell(interval(of[measure])) for measure in MEASURES),
         COSTS.get(name, "0").format(steps=kept["settings"]["steps"] + 1)]
        for name, of in found.items()
    ]  # fmt: skip
    parts = [f"{len(kept['traces'])} traces.", table(["map", *MEASURES, "passes"], rows)]
    for base in BASES:
        rows = [
            [name, *(cell(interval(of[m], found[base][m]), signed=True) for m in MEASURES)]
            for name, of in found.items() if name not in (*BASES, "random")
        ]  # fmt: skip
        parts.append(table([f"less {base}", *MEASURES], rows))
    return "\n\n".join(parts)


def run(args: Settings) -> None:
    model, tokenizer, settings = open_start(args)
    bar = Progress("maps")
    chosen: dict[str, Rollout] = {}
    for n, rollout in sorted(sample_traces(model, tokenizer, args, bar), key=lambda it: it[0]):
        if rollout.outcome == 0 and rollout.computing and rollout.problem.id not in chosen:
            rollout.seed = (0, len(chosen), n)
            chosen[rollout.problem.id] = rollout
    rollouts = sorted(chosen.values(), key=lambda rollout: len(rollout.completion))
    count, rows = bar.phase("maps", len(rollouts)), []
    for start in range(0, len(rollouts), args.batch):
        rows += measure(model, tokenizer, rollouts[start : start + args.batch], args.steps, count)
    bar.close()
    by_question = {it.problem.id: rounded(row) for it, row in zip(rollouts, rows, strict=True)}
    kept = {"settings": settings, "traces": by_question}
    if args.out:
        write(args.out, kept)
    print(markdown(kept))


def rounded(row: dict[str, list]) -> dict[str, list]:
    """As it is kept: ranking -> numbers of five digits."""
    return {name: [round_off(value) for value in values] for name, values in row.items()}


def main() -> None:
    settings = flags.parse(Settings, __doc__.split("\n")[0])
    with sentences():
        run(settings)


if __name__ == "__main__":
    main()
