"""Measures of arms over seeds and questions, and their intervals.

A measure of an arm is seed -> question -> (numerator, denominator): bootstrap.Ratios of each seed.
"""

import random

import numpy as np

from data import micro_task
from data.tokenizer import Tokenizer
from lab.measure.bootstrap import Ratios, resamples
from lab.measure.compare import keys_of, near, nearest_lengths, reliance_ratios
from lab.measure.table1 import counts_by_text, load_spacy, table1_ratios
from lab.study.arms import ROOT
from lab.study.kept import map_of, reliance_rows, table1_of

Seeds = dict[int, Ratios]
TOLERANCE = 0.1  # how far apart matched lengths may be, a share of the longer: eval.py's default


def interval(arm: Seeds, base: Seeds | None = None, relative=False, draws: int = 2000):
    """The mean over seeds of a ratio of sums over questions, with its 95% interval.

    With base it is the difference arm - base, or with relative arm / base - 1, taken seed by seed:
    a seed stands for the same questions in the same order, and a question counts where both arms
    have it. Two sources of chance add up: questions, by a bootstrap that draws them for all seeds
    together, and training, by the spread between seeds. Seeds are few, so the interval is
    Student's t with Welch and Satterthwaite's degrees of freedom; of one seed it holds the
    questions alone. Returns value, low, high, seeds (the value of each) and pairs (of seed and
    question), None when there are no pairs.
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
        for of_base in less:
            ratio = ratio / of_base - 1 if relative else ratio - of_base
        return ratio

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


def values(arm: Seeds) -> list[float]:
    """The ratio of sums over questions, of each seed."""
    return [float(np.divide(*np.sum(list(arm[seed].values()), axis=0))) for seed in sorted(arm)]


def by_measure(seeds: dict[int, dict[str, dict]]) -> dict[str, Seeds]:
    """seed -> measure -> Ratios, turned inside out."""
    turned: dict[str, Seeds] = {}
    for seed, measures in seeds.items():
        for name, ratios in measures.items():
            turned.setdefault(name, {})[seed] = ratios
    return turned


def own(runs: dict[int, dict]) -> dict[str, Seeds]:
    """Every measure of an arm at its own lengths."""
    seeds = {}
    for seed, run in runs.items():
        hard = {f"hard {key}": ratios for key, ratios in table1_of(run, "hard").items()}
        reliance = reliance_ratios(reliance_rows(run))
        seeds[seed] = table1_of(run, "heldout") | hard | reliance | map_of(run)
    return by_measure(seeds)


def matched(runs: dict[int, dict], base_runs: dict[int, dict]) -> tuple[dict, dict]:
    """Faithfulness of two arms on pairs of traces about equally long (compare.py), seed by seed.

    Of the map only one trace a question was tested: those whose lengths happen to match.
    """
    sides: tuple[dict, dict] = {}, {}
    for seed in runs.keys() & base_runs.keys():
        pair = runs[seed], base_runs[seed]
        records = [reliance_rows(run) for run in pair]
        for run, rows in zip(pair, records, strict=True):
            for row in rows:
                row["reasoning"] = range(run["heldout"][row["id"]][row["sample"]][4])
        pairs = nearest_lengths(*records, TOLERANCE)
        both = pair[0]["map"].keys() & pair[1]["map"].keys()
        tested = {q for q in both if near(*(run["map"][q][1] for run in pair), TOLERANCE)}
        for n, (side, run) in enumerate(zip(sides, pair, strict=True)):
            rows = reliance_rows(run, set(keys_of(pairs, n)))
            side[seed] = reliance_ratios(rows) | map_of(run, tested)
    return tuple(map(by_measure, sides))


def seeds_of_all(*arms: dict[str, Seeds]) -> list[dict[str, Seeds]]:
    """The arms' measures, of the seeds alone that all of them have."""
    common = set.intersection(*(set(arm["tokens"]) for arm in arms))
    return [
        {key: {seed: seeds[seed] for seed in seeds if seed in common} for key, seeds in arm.items()}
        for arm in arms
    ]


def tersest_trace(problem: micro_task.MicroProblem) -> str:
    """The shortest trace that the generator writes: one bare equation a step, two where a quantity
    must be computed first. Half of the generator's draws go in smaller steps, so 16 are drawn.
    """
    draws = (micro_task.write_trace(problem, random.Random(n), verbosity=0) for n in range(16))
    return min(draws, key=len)


def tersest(count: int) -> dict[str, Ratios]:
    """Table 1, but for accuracy, of the tersest traces of the first held-out problems."""
    problems = micro_task.load("heldout", count)
    tokenizer = Tokenizer.from_directory(ROOT / "data/micro")
    texts = [tersest_trace(problem) for problem in problems]
    facts = {"sample": 0, "correct": True, "truncated": False, "no_delimiter": False}
    records = [
        facts | {"id": problem.id, "reasoning": tokenizer.encode(f"{text}\n")}
        for problem, text in zip(problems, texts, strict=True)
    ]
    ratios = table1_ratios(records, counts_by_text(texts, load_spacy(None)))
    return {key: by_problem for key, by_problem in ratios.items() if key != "pass@1"}
