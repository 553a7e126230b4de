"""docs/study.md: the study's tables and figures, from what is kept of its runs.

    python -m tests.study_report

docs/study_template.md holds the words, with a mark where each table goes; every number of a table
is computed here from docs/study/*.json.
"""

import json
import shlex
from pathlib import Path

import numpy as np

from bootstrap import Ratios
from compare import SLACK, nearest_lengths, reliance_ratios
from table1 import WORDS, table1_ratios
from tests import sign
from tests.study import ARMS, EVALUATIONS, KEPT, ROOT, train_command

MAP_TESTS = ("comprehensiveness", "sufficiency", "auroc", "auroc no punctuation")
TOLERANCE = 0.1  # how far apart matched lengths may be, a share of the longer: eval.py's default

# ------------------------------------------------------------------------------------ intervals

# A quantity of an arm: seed -> question -> (numerator, denominator), as bootstrap.Ratios.
Seeds = dict[int, Ratios]


def interval(one: Seeds, less: Seeds | None = None, draws: int = 2000) -> dict | None:
    """The mean over seeds of a ratio of sums over questions, less another arm's; 95% interval.

    Both seeds and questions are drawn again (with replacement, the same for both arms: a seed
    stands for the same questions in the same order). A question counts where both arms have it.
    None when no seed is in both arms. value, low, high, seeds, questions.
    """
    arms = [one] if less is None else [one, less]
    seeds = sorted(set.intersection(*(set(arm) for arm in arms)))
    used = {
        (seed, question)
        for seed in seeds
        for question in set.intersection(*(set(arm[seed]) for arm in arms))
    }
    if not used:
        return None
    questions = sorted({question for _, question in used})
    rng = np.random.default_rng(0)
    by_seed = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), draws) / len(seeds)
    weights = rng.multinomial(len(questions), [1 / len(questions)] * len(questions), draws)
    by_seed = np.vstack([np.full(len(seeds), 1 / len(seeds)), by_seed])  # first: as they are
    weights = np.vstack([np.ones(len(questions)), weights])
    total = 0.0
    for factor, arm in zip((1, -1), arms, strict=False):
        nothing = (0.0, 0.0)
        pairs = np.array([
            [arm[seed][q] if (seed, q) in used else nothing for q in questions] for seed in seeds
        ])  # (seeds, questions, 2)  # fmt: skip
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = (weights @ pairs[:, :, 0].T) / (weights @ pairs[:, :, 1].T)  # (draws, seeds)
        total = total + factor * (by_seed * np.nan_to_num(ratios)).sum(1)
    low, high = np.percentile(total[1:], (2.5, 97.5))
    return {"value": float(total[0]), "low": float(low), "high": float(high),
            "seeds": len(seeds), "questions": len(questions)}  # fmt: skip


def load(arm: str) -> dict[int, dict]:
    """seed -> what is kept of that run."""
    found = [json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))
             if not path.name.startswith("sign-")]  # fmt: skip
    return {run["seed"]: run for run in found if run["arm"] == arm}


def table1_of(run: dict, split: str) -> dict[str, dict]:
    """table1.table1_ratios of a kept run."""
    records, words = [], []
    for problem, rows in run[split].items():
        for sample, (correct, valid, truncated, missing, tokens, *counts) in enumerate(rows):
            records.append({"id": problem, "sample": sample, "correct": correct, "valid": valid,
                            "truncated": truncated, "no_delimiter": missing,
                            "reasoning": [0] * tokens})  # fmt: skip
            words.append(dict(zip(WORDS, counts, strict=True)))
    return table1_ratios(records, words)


def reliance_rows(run: dict, chosen=None) -> list[dict]:
    """Rows as compare.reliance_ratios takes them, of all samples or of the chosen (id, sample)."""
    return [
        {"id": problem, "sample": int(sample), "same": same}
        | {"necessity": necessity, "direct": direct, "corruption": corruption}
        for problem, samples in run["reliance"].items()
        for sample, (same, necessity, direct, corruption) in samples.items()
        if chosen is None or (problem, int(sample)) in chosen
    ]


def map_of(run: dict, chosen=None) -> dict[str, dict]:
    """MAP_TESTS/ranking -> question -> (value, 1), of all tested traces or the chosen questions."""
    ratios: dict[str, dict] = {}
    for problem, (_, _, rankings) in run["map"].items():
        if chosen is not None and problem not in chosen:
            continue
        for ranking, values in rankings.items():
            for test, value in zip(MAP_TESTS, values, strict=True):
                if value is not None:
                    ratios.setdefault(f"{test}/{ranking}", {})[problem] = (value, 1.0)
    return ratios


def by_measure(found: dict[int, dict[str, dict]]) -> dict[str, Seeds]:
    """seed -> measure -> Ratios, turned inside out."""
    turned: dict[str, Seeds] = {}
    for seed, measures in found.items():
        for name, ratios in measures.items():
            turned.setdefault(name, {})[seed] = ratios
    return turned


def own(runs: dict[int, dict]) -> dict[str, Seeds]:
    """Every measure of an arm at its own lengths."""
    found = {}
    for seed, run in runs.items():
        hard = {f"hard {key}": ratios for key, ratios in table1_of(run, "hard").items()}
        reliance = reliance_ratios(reliance_rows(run))
        found[seed] = table1_of(run, "heldout") | hard | reliance | map_of(run)
    return by_measure(found)


def matched(runs: dict[int, dict], others: dict[int, dict]) -> tuple[dict, dict]:
    """Faithfulness of two arms on pairs of traces about equally long (compare.py), seed by seed.

    Of the map only one trace a question was tested: those whose lengths happen to match.
    """
    sides: tuple[dict, dict] = {}, {}
    for seed in runs.keys() & others.keys():
        pair = runs[seed], others[seed]
        records = [
            [{"id": row["id"], "sample": row["sample"],
              "reasoning": range(run["heldout"][row["id"]][row["sample"]][4])}
             for row in reliance_rows(run)]
            for run in pair
        ]  # fmt: skip
        keys = nearest_lengths(*records, TOLERANCE)
        near = {
            problem
            for problem in pair[0]["map"].keys() & pair[1]["map"].keys()
            if close(*(run["map"][problem][1] for run in pair))
        }
        for n, (side, run) in enumerate(zip(sides, pair, strict=True)):
            rows = reliance_rows(run, {key[n] for key in keys})
            side[seed] = reliance_ratios(rows) | map_of(run, near)
    return tuple(map(by_measure, sides))


def close(one: int, other: int) -> bool:
    return abs(one - other) <= max(SLACK, TOLERANCE * max(one, other))


# ------------------------------------------------------------------------------------ the report

COLUMNS = {  # measure: (heading, whether in percent)
    "pass@1": ("accuracy", True), "pass@4": ("pass@4", True), "tokens": ("tokens", False),
    "numbers": ("numbers", True), "stop_words": ("stop words", True),
    "symbols": ("symbols", True), "hard pass@1": ("hard accuracy", True),
    "hard pass@4": ("hard pass@4", True),
}  # fmt: skip
FAITHFULNESS = {
    "truncation": ("truncation", False), "necessity": ("knockout, reasoning hidden", False),
    "direct": ("knockout, prompt hidden (less is better)", False),
    "corruption": ("corruption", True),
    "comprehensiveness/attribution": ("attribution map: comprehensiveness", False),
    "sufficiency/attribution": ("attribution map: sufficiency (less is better)", False),
    "auroc no punctuation/attribution": ("attribution map: AUROC, no punctuation", False),
    "comprehensiveness/mask": ("mask map: comprehensiveness", False),
    "auroc no punctuation/mask": ("mask map: AUROC, no punctuation", False),
}  # fmt: skip


def cell(found: dict | None, percent: bool, signed: bool = False) -> str:
    """A value with its interval, in percent or as it is; bold where an interval excludes 0."""
    if found is None:
        return "-"
    scale = 100 if percent else 1
    digits = 1 if percent or abs(found["value"]) >= 5 else 3
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    value, low, high = (form.format(scale * found[key]) for key in ("value", "low", "high"))
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if signed and (found["low"] > 0 or found["high"] < 0) else text


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading(name: str, runs: dict) -> str:
    return f"{name} ({len(runs)})" if name != "start" else name


def arms_table(arms: dict[str, dict], measures: dict[str, dict], columns: dict) -> str:
    """A row an arm, its number of seeds in parentheses."""
    units = [f"{title}, %" if percent else title for title, percent in columns.values()]
    rows = []
    for name, runs in arms.items():
        cells = [
            cell(interval(measures[name][key]), percent) if key in measures[name] else "-"
            for key, (_, percent) in columns.items()
        ]
        rows.append([heading(name, runs), *cells])
    return table(["arm (seeds)", *units], rows)


def difference_table(arms, measures, base: str, columns: dict) -> str:
    """A row an arm: its measures less the base arm's, seed by seed."""
    units = [f"{title}, points" if percent else title for title, percent in columns.values()]
    rows = []
    for name, runs in arms.items():
        if name in (base, "start"):
            continue
        cells = []
        for key, (_, percent) in columns.items():
            pair = measures[name].get(key), measures[base].get(key)
            found = interval(*pair) if None not in pair else None
            cells.append(cell(found, percent, signed=True))
        rows.append([heading(name, runs), *cells])
    return table([f"arm less {base}", *units], rows)


def matched_table(arms: dict[str, dict], base: str) -> str:
    """Differences to the base arm on traces of matched length; how many questions each had."""
    columns = [key for key in FAITHFULNESS if not key.startswith("auroc")]
    titles = [
        FAITHFULNESS[key][0] + (", points" if FAITHFULNESS[key][1] else "") for key in columns
    ]
    rows = []
    for name, runs in arms.items():
        if name == base:
            continue
        here, there = matched(runs, arms[base])
        found = {
            key: interval(here[key], there[key]) if key in here and key in there else None
            for key in columns
        }
        counts = [str(found[key]["questions"] if found[key] else 0) for key in
                  ("necessity", "comprehensiveness/attribution")]  # fmt: skip
        cells = [cell(found[key], FAITHFULNESS[key][1], signed=True) for key in columns]
        rows.append([heading(name, runs), *cells, " / ".join(counts)])
    heads = [f"arm less {base}, matched length", *titles, "questions, of reliance / of the map"]
    return table(heads, rows)


def protocol(arms: dict[str, dict]) -> str:
    """Each arm's command, how many seeds there are of it, and with what they ran."""
    rows = [
        [name, f"`python {shlex.join(train_command(name, 0)[:-1])} N`",
         ", ".join(map(str, sorted(runs))) or "none yet"]
        for name, runs in ((name, arms.get(name, {})) for name in ARMS)
    ]  # fmt: skip
    versions = {json.dumps(run["versions"]) for runs in arms.values() for run in runs.values()}
    evaluated = [f"`python eval.py --model RUN {flags}`" for flags in EVALUATIONS.values()]
    with_what = "; ".join(
        ", ".join(f"{name} {value}" for name, value in json.loads(found).items())
        for found in sorted(versions)
    )
    return "\n\n".join((
        table(["arm", "command", "seeds N"], rows),
        f"Each run is then measured by {', '.join(evaluated)}. With {with_what}.",
    ))  # fmt: skip


def seconds_per_update(runs: dict[int, dict]) -> str:
    """Mean over updates and seeds: sampling, masks, policy."""
    found = np.array([row[-3:] for run in runs.values() for row in run["updates"]])
    return " + ".join(f"{part:.1f}" for part in found.mean(0)) + f" = {found.sum(1).mean():.1f}"


def draw_curves(arms: dict[str, dict], path: Path) -> None:
    """Mean reasoning length and share of right rollouts per update; mean over seeds, smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, runs in arms.items():
        rows = np.array([[row[:4] for row in run["updates"]] for run in runs.values()])
        steps = rows[0, :, 0]
        for axis, values in zip(axes, (rows[:, :, 3], 100 * (1 + rows[:, :, 1])), strict=True):
            smooth = [values[:, max(0, n - 4) : n + 5].mean() for n in range(len(steps))]
            axis.plot(steps, smooth, label=f"{name} ({len(runs)})", linewidth=1.4)
    for axis, title in zip(axes, ("reasoning tokens", "right rollouts, %"), strict=True):
        axis.set(xlabel="update", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def report() -> None:
    """docs/study.md and its figures, from docs/study/*.json."""
    rows = [
        row for path in sorted(KEPT.glob("sign-*.json")) for row in json.loads(path.read_text())
    ]
    arms = {name: load(name) for name in ("start", *ARMS)}
    arms = {name: runs for name, runs in arms.items() if runs}
    measures = {name: own(runs) for name, runs in arms.items()}
    trained = {name: runs for name, runs in arms.items() if name != "start"}
    parts = {"protocol": protocol(trained), "sign": "No result yet.", "arms": "No result yet."}
    if rows:
        questions = len({row["id"] for row in rows})
        parts["sign"] = f"{len(rows)} valid traces of {questions} questions.\n\n" + sign.markdown(
            sign.correlations(rows)
        )
    if trained:
        draw_curves(trained, KEPT / "curves.png")
        parts["arms"] = arms_table(arms, measures, COLUMNS)
        parts["seconds"] = table(
            ["arm (seeds)", "seconds per update: sampling + masks + policy"],
            [[heading(name, runs), seconds_per_update(runs)] for name, runs in trained.items()],
        )
        parts["faithfulness"] = arms_table(arms, measures, FAITHFULNESS)
    for key, base in (("outcome", "outcome only"), ("length", "length penalty")):
        if base in trained:
            parts[f"less {key}"] = "\n\n".join(
                difference_table(trained, measures, base, columns)
                for columns in (COLUMNS, FAITHFULNESS)
            )
    if "length penalty" in trained:
        parts["matched"] = matched_table(trained, "length penalty")
    template = (ROOT / "docs/study_template.md").read_text(encoding="utf-8")
    for key, text in parts.items():
        template = template.replace(f"<!-- {key} -->", text)
    (ROOT / "docs/study.md").write_text(template, encoding="utf-8")


if __name__ == "__main__":
    report()
