"""Measures of arms over seeds and questions, their intervals, and what a table shows of them.

A measure of an arm is seed -> question -> (numerator, denominator): bootstrap.Ratios of each seed.
"""

import itertools
from collections import defaultdict

import numpy as np

from lab.measure.bootstrap import Ratios, resamples
from lab.measure.compare import key_of, keys_of, nearest_lengths, reliance_ratios
from lab.measure.table1 import table1_ratios
from lab.study.kept import SPLITS, reliance_rows, samples_of, table1_of

Seeds = dict[int, Ratios]
TOLERANCE = 0.1  # how far apart matched lengths may be, a share of the longer: eval.py's default


def interval(arm: Seeds, base: Seeds | None = None, draws: int = 2000) -> dict | None:
    """The mean over seeds of a ratio of sums over questions, with its 95% interval.

    With base it is the difference arm - base, taken seed by seed: a seed stands for the same
    questions in the same order, and a question counts where both arms have it. Two sources of
    chance add up: questions, by a bootstrap that draws them for all seeds together, and training,
    by the spread between seeds. Seeds are few, so the interval is Student's t with Welch and
    Satterthwaite's degrees of freedom; of one seed it holds the questions alone. Returns value,
    low, high, seeds (the value of each) and pairs (of seed and question), None without any pair.
    """
    sides, used = [arm] if base is None else [arm, base], {}
    for seed in sorted(set.intersection(*map(set, sides))):
        if common := set.intersection(*(set(side[seed]) for side in sides)):
            used[seed] = common
    if not used:
        return None
    questions = sorted(set.union(*used.values()))
    pairs = np.array([
        [[side[seed][q] if q in used[seed] else (0.0, 0.0) for q in questions] for seed in used]
        for side in sides
    ])  # (sides, seeds, questions, 2)  # fmt: skip

    def by_seed(weights) -> np.ndarray:
        """(draws, seeds) under weights (draws, questions); nan where nothing was drawn."""
        ratio, *less = ((weights @ p[:, :, 0].T) / (weights @ p[:, :, 1].T) for p in pairs)
        return ratio - less[0] if less else ratio

    with np.errstate(invalid="ignore", divide="ignore"):
        seeds = by_seed(np.ones((1, len(questions))))[0]
        drawn = by_seed(resamples(len(questions), draws, seed=0))
    drawn = drawn[np.isfinite(drawn).any(1)]
    of_questions = np.nanmean(drawn, 1).var()
    of_seeds = seeds.var(ddof=1) / len(seeds) if len(seeds) > 1 else 0.0
    quantile = 1.96
    if of_seeds > 0:
        freedom = (len(seeds) - 1) * ((of_questions + of_seeds) / of_seeds) ** 2
        t = np.random.default_rng(1).standard_t(freedom, 100_000)
        quantile = np.quantile(t, 0.975)
    mean, half = seeds.mean(), quantile * np.sqrt(of_questions + of_seeds)
    estimate = {"value": float(mean), "low": float(mean - half), "high": float(mean + half)}
    return estimate | {"seeds": seeds.tolist(), "pairs": sum(map(len, used.values()))}


def cell(estimate: dict | None, percent: bool = False, signed: bool = False) -> str:
    """A value with its interval, in percent or as it is; - where there is none.

    A difference, signed, is bold where its interval excludes 0 and there is more than one seed.
    """
    if estimate is None or estimate["low"] is None:
        return "-"
    scale = 100 if percent else 1
    digits = 1 if percent or abs(estimate["value"]) >= 5 else 3
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    value, low, high = (form.format(scale * estimate[key]) for key in ("value", "low", "high"))
    seeds, apart = len(estimate.get("seeds", ())), estimate["low"] > 0 or estimate["high"] < 0
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if signed and apart and seeds > 1 else text


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def own(runs: dict[int, dict]) -> dict[str, Seeds]:
    """Every measure of an arm at its own lengths; those of hard problems begin with "hard ".

    Corruption is there by kind of trace too, because nearly all decoys and few computing traces of
    one step hold a number that it can change.
    """
    found: dict[str, Seeds] = defaultdict(dict)
    for (seed, run), split in itertools.product(runs.items(), SPLITS):
        rows = reliance_rows(run, split)
        ratios = table1_of(run, split) | reliance_ratios(rows)
        label = {(s["id"], s["sample"]): s["computing"] for s in samples_of(run, split)}
        for kind, computing in (("computing", 1), ("decoy", 0)):
            chosen = [row for row in rows if label[row["id"], row["sample"]] == computing]
            ratios[f"{kind} corruption"] = reliance_ratios(chosen).get("corruption", {})
        for name, by_question in ratios.items():
            found["hard " * (split == "hard") + name][seed] = by_question
    return found


def matched(runs: dict[int, dict], base_runs: dict[int, dict]) -> tuple[dict, dict]:
    """Reliance, accuracy and computing share of two arms on pairs of traces about equally long.

    The pairs are compare.py's, of the held-out traces whose reliance was measured, seed by seed.
    """
    sides: tuple[dict, dict] = defaultdict(dict), defaultdict(dict)
    for seed in runs.keys() & base_runs.keys():
        records = []
        for run in (runs[seed], base_runs[seed]):
            samples = {key_of(sample): sample for sample in samples_of(run, "heldout")}
            rows = reliance_rows(run, "heldout")
            records.append([row | samples[key_of(row)] for row in rows])
        pairs = nearest_lengths(*records, TOLERANCE)
        for n, (side, rows) in enumerate(zip(sides, records, strict=True)):
            chosen = set(keys_of(pairs, n))
            if rows := [row for row in rows if key_of(row) in chosen]:
                for name, ratios in (reliance_ratios(rows) | table1_ratios(rows, rows)).items():
                    side[name][seed] = ratios
    return sides
