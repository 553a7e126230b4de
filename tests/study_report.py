"""docs/study.md: the study's tables and figures, from what is kept of its runs.

    python -m tests.study_report

docs/study_template.md holds the words, with a mark where each table goes; every number of a table
is computed here from docs/study/*.json.
"""

import dataclasses
import json
import math
import random
import re
import shlex
from pathlib import Path

import numpy as np

from bootstrap import Ratios, resamples
from compare import near, nearest_lengths, reliance_ratios
from config import parse_args
from data import micro_task
from data.prompts import Tokenizer
from table1 import WORDS, counts_by_text, load_spacy, table1_ratios
from tests import sign
from tests.study import (
    ARMS,
    COMMON,
    DEFAULT,
    EVAL,
    EVALUATIONS,
    KEPT,
    PILOTS,
    ROOT,
    SECONDS,
    UPDATE,
    train_command,
)

MICRO = ROOT / "data/micro"
CONTROLS = ("length penalty", "length, gated")  # they know nothing of what a token is worth
TERSEST = "tersest trace"  # no arm: what the words and lengths of an arm can come to
MAP_TESTS = ("comprehensiveness", "sufficiency", "auroc", "auroc no punctuation")
TOLERANCE = 0.1  # how far apart matched lengths may be, a share of the longer: eval.py's default

# ------------------------------------------------------------------------------------ intervals

# A quantity of an arm: seed -> question -> (numerator, denominator), as bootstrap.Ratios.
Seeds = dict[int, Ratios]


def interval(one: Seeds, less: Seeds | None = None, relative=False, draws: int = 2000):
    """The mean over seeds of a ratio of sums over questions, with its 95% interval.

    With less it is the difference of two arms, or with relative one / less - 1, taken seed by seed:
    a seed stands for the same questions in the same order, and a question counts where both arms
    have it. Two sources of chance add up: questions, by a bootstrap that draws them for all seeds
    together, and training, by the spread between seeds. Seeds are few, so the interval is
    Student's t with Welch and Satterthwaite's degrees of freedom; of one seed it holds the
    questions alone. Returns value, low, high, seeds (the value of each) and pairs (of seed and
    question), None when there are no pairs.
    """
    arms = [one] if less is None else [one, less]
    used = {
        seed: set.intersection(*(set(arm[seed]) for arm in arms))
        for seed in sorted(set.intersection(*(set(arm) for arm in arms)))
    }
    used = {seed: questions for seed, questions in used.items() if questions}
    if not used:
        return None
    questions = sorted(set.union(*used.values()))

    def by_seed(weights) -> np.ndarray:
        """(draws, seeds) under weights (draws, questions); nan where nothing was drawn."""
        found = []
        for arm in arms:
            pairs = np.array([
                [arm[seed][q] if q in used[seed] else (0.0, 0.0) for q in questions]
                for seed in used
            ])  # (seeds, questions, 2)  # fmt: skip
            found.append((weights @ pairs[:, :, 0].T) / (weights @ pairs[:, :, 1].T))
        if less is None:
            return found[0]
        return found[0] / found[1] - 1 if relative else found[0] - found[1]

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
    half = quantile * np.sqrt(of_questions + of_seeds)
    return {
        "value": float(seeds.mean()),
        "low": float(seeds.mean() - half),
        "high": float(seeds.mean() + half),
        "seeds": seeds.tolist(),
        "pairs": sum(map(len, used.values())),
    }


def values(one: Seeds) -> list[float]:
    """The ratio of sums over questions, of each seed."""
    return [float(np.divide(*np.sum(list(one[seed].values()), axis=0))) for seed in sorted(one)]


def load() -> dict[str, dict[int, dict]]:
    """arm -> seed -> what is kept of that run; the start and ARMS, in their order."""
    arms: dict[str, dict[int, dict]] = {name: {} for name in ("start", *ARMS)}
    for path in sorted(KEPT.glob("*.json")):
        if not path.name.startswith(("sign-", "pilot-")):
            run = json.loads(path.read_text())
            arms[run["arm"]][run["seed"]] = run
    return {name: runs for name, runs in arms.items() if runs}


def load_pilots() -> dict[str, dict]:
    """pilot -> what is kept of it, in the order of PILOTS."""
    runs = [json.loads(path.read_text()) for path in sorted(KEPT.glob("pilot-*.json"))]
    found = {run["pilot"]: run for run in runs}
    return {name: found[name] for name in PILOTS if name in found}


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


def tersest_trace(problem: micro_task.MicroProblem) -> str:
    """The shortest that the generator writes: one bare equation a step, two where it must first be
    found how much. Half of its draws are careful, in smaller steps; of 16 the shortest is not.
    """
    draws = (micro_task.write_trace(problem, random.Random(n), verbosity=0) for n in range(16))
    return min(draws, key=len)


def tersest(count: int) -> dict[str, Ratios]:
    """Table 1, but for accuracy, of the tersest traces of the first held-out problems."""
    problems, tokenizer = micro_task.load("heldout", count), Tokenizer.from_directory(MICRO)
    texts = [tersest_trace(problem) for problem in problems]
    records = [
        {"id": p.id, "sample": 0, "correct": True, "truncated": False, "no_delimiter": False,
         "reasoning": tokenizer.encode(f"{text}\n")}
        for p, text in zip(problems, texts, strict=True)
    ]  # fmt: skip
    found = table1_ratios(records, counts_by_text(texts, load_spacy(None)))
    return {key: ratios for key, ratios in found.items() if key != "pass@1"}


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
        tested = {
            problem
            for problem in pair[0]["map"].keys() & pair[1]["map"].keys()
            if near(*(run["map"][problem][1] for run in pair), TOLERANCE)
        }
        for n, (side, run) in enumerate(zip(sides, pair, strict=True)):
            rows = reliance_rows(run, {key[n] for key in keys})
            side[seed] = reliance_ratios(rows) | map_of(run, tested)
    return tuple(map(by_measure, sides))


# ------------------------------------------------------------------------------------ the report

COLUMNS = {  # measure: (heading, whether in percent)
    "pass@1": ("accuracy", True), "pass@4": ("pass@4", True), "tokens": ("tokens", False),
    "numbers": ("numbers", True), "stop_words": ("stop words", True),
    "symbols": ("symbols", True), "hard pass@1": ("hard accuracy", True),
    "hard pass@4": ("hard pass@4", True),
}  # fmt: skip
RELATIVE = {key: COLUMNS[key] for key in ("tokens", "numbers", "stop_words", "symbols")}
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

BOUNDS = {"truncation": 0.9, "necessity": math.log(2)}  # of the others 1, or 0 where less is better


def cell(found: dict | None, percent: bool, signed: bool = False) -> str:
    """A value with its interval, in percent or as it is.

    A difference is bold where its interval excludes 0, and there is more than one seed.
    """
    if found is None:
        return "-"
    scale = 100 if percent else 1
    digits = 1 if percent or abs(found["value"]) >= 5 else 3
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    value, low, high = (form.format(scale * found[key]) for key in ("value", "low", "high"))
    text = f"{value} [{low}, {high}]"
    sure = signed and len(found["seeds"]) > 1 and (found["low"] > 0 or found["high"] < 0)
    return f"**{text}**" if sure else text


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headings(columns: dict, unit: str) -> list[str]:
    """The columns' titles, with the unit where they are in percent."""
    return [f"{title}, {unit}" if percent else title for title, percent in columns.values()]


def arms_table(arms: dict[str, dict], measures: dict[str, dict], columns: dict) -> str:
    """A row an arm, its number of seeds in parentheses."""
    rows = []
    for name, runs in arms.items():
        cells = [
            cell(interval(measures[name][key]), percent) if key in measures.get(name, {}) else "-"
            for key, (_, percent) in columns.items()
        ]
        rows.append([name if name in ("start", TERSEST) else f"{name} ({len(runs)})", *cells])
    return table(["arm (seeds)", *headings(columns, "%")], rows)


def difference_table(measures, names, base: str, columns: dict, relative=False) -> str:
    """A row an arm: its measures less the base arm's, seed by seed, or their relative change."""
    heads = headings(columns, "points")
    if relative:
        heads = [f"{title}, %" for title, _ in columns.values()]
    rows = []
    for name in names:
        if name in (base, "start"):
            continue
        cells, seeds = [], set(measures[name]["tokens"]) & set(measures[base]["tokens"])
        for key, (_, percent) in columns.items():
            pair = measures[name].get(key), measures[base].get(key)
            found = interval(*pair, relative=relative) if None not in pair else None
            cells.append(cell(found, percent or relative, signed=True))
        rows.append([name if name == TERSEST else f"{name} ({len(seeds)})", *cells])
    return table([f"against {base} (seeds of both)", *heads], rows)


def map_baselines(runs: dict[int, dict]) -> str:
    """The start's maps beside rankings that know nothing of the model, or of the mask."""
    measures = by_measure({seed: map_of(run) for seed, run in runs.items()})
    names = [key.partition("/")[2] for key in measures if key.startswith("comprehensiveness/")]
    rows = [
        [name, *(cell(interval(measures.get(f"{test}/{name}", {})), False) for test in MAP_TESTS)]
        for name in names
    ]
    heads = ["comprehensiveness", "sufficiency (less is better)", "AUROC, all tokens",
             "AUROC, no punctuation"]  # fmt: skip
    return table(["ranking", *heads], rows)


AIMS = {  # measure: (words, whether a relative change, what was aimed at, whether more is better)
    "tokens": ("reasoning tokens", True, -0.50, False),
    "numbers": ("share of numbers", True, 0.60, True),
    "stop_words": ("share of stop words", True, -0.30, False),
    "pass@4": ("pass@4, points", False, -0.01, True),
}


def seeds_of_all(*arms: dict[str, Seeds]) -> list[dict[str, Seeds]]:
    """The arms' measures, of the seeds alone that all of them have."""
    common = set.intersection(*(set(arm["tokens"]) for arm in arms))
    return [
        {key: {seed: seeds[seed] for seed in seeds if seed in common} for key, seeds in arm.items()}
        for arm in arms
    ]


def towards(found: dict, more: bool) -> tuple[float, float, float]:
    """Value, low and high, their signs turned where less is better; one seed has no interval."""
    sign = 1 if more else -1
    low, high = sorted(sign * found[key] for key in ("low", "high"))
    if len(found["seeds"]) < 2:
        low, high = -math.inf, math.inf
    return sign * found["value"], low, high


def reached(found: dict, aim: float, more: bool) -> str:
    """Does the value lie at the aim or beyond? "open" where its interval holds both answers."""
    value, low, high = towards(found, more)
    aim = aim if more else -aim
    if low >= aim or high < aim:
        return "yes" if low >= aim else "no"
    return f"open (by the mean {'yes' if value >= aim else 'no'})"


def aims_table(measures: dict[str, dict]) -> str:
    """The default against outcome only, beside what was aimed at and what the task has room for."""
    here, base, floor = seeds_of_all(*(measures[n] for n in (DEFAULT, "outcome only", TERSEST)))
    rows = []
    for key, (title, relative, aim, more) in AIMS.items():
        found = interval(here[key], base[key], relative=relative)
        if found is None:
            return "No seed in common yet."
        most = interval(floor[key], base[key], relative=relative) if key in floor else None
        aimed = f"{'at least' if more else 'at most'} {100 * aim:+.0f}{'%' * relative}"
        cells = [cell(one, True, signed=True) for one in (found, most)]
        rows.append([title, aimed, cells[0], reached(found, aim, more), cells[1]])
    count = len(base["tokens"])
    heads = [f"{DEFAULT} against outcome only ({count})", "aim", "found", "reached"]
    return table([*heads, f"the {TERSEST} against outcome only"], rows)


def room_table(measures: dict[str, dict], control: str) -> str:
    """The default's faithfulness less the control's, beside what the control leaves to be won."""
    here, base = seeds_of_all(measures[DEFAULT], measures[control])
    if not base["tokens"]:
        return "No seed in common yet."
    longer = np.mean(values(here["tokens"])) - np.mean(values(base["tokens"]))
    rows = []
    for key, (title, percent) in FAITHFULNESS.items():
        less = "less is better" in title
        found, own = interval(here[key], base[key]), np.mean(values(base[key]))
        room = abs(BOUNDS.get(key, 0.0 if less else 1.0) - own)
        scale, form = (100, "{:.1f}") if percent else (1, "{:.3f}")
        _, low, high = towards(found, not less)
        says = "better" if low > 0 else "worse" if high < 0 else "nothing"
        numbers = [form.format(scale * value) for value in (own, room)]
        rows.append([title + ", points" * percent, *numbers, cell(found, percent, True), says])
    claim = f"{DEFAULT} less {control} (longer by {longer:.1f} tokens)"
    heads = [f"{control} ({len(base['tokens'])})", "the most to be won", claim]
    return table(["measure", *heads, "the interval says"], rows)


def shorter_table(arms: dict[str, dict], floor: Ratios) -> str:
    """How many of each arm's held-out traces undercut the tersest, and how many of these answer.

    floor: the tersest traces' tokens, of every question.
    """
    rows = []
    for name, runs in arms.items():
        traces = [
            (correct, tokens < floor[problem][0])
            for run in runs.values()
            for problem, samples in run["heldout"].items()
            for correct, _, _, _, tokens, *_ in samples
        ]
        under = [correct for correct, shorter in traces if shorter]
        right = f"{np.mean(under):.1%}" if under else "-"
        rows.append([name, f"{len(under) / len(traces):.1%}", right])
    return table(["arm", f"shorter than the {TERSEST}", "right, of these"], rows)


def beside_common(pilot: str) -> str:
    """The flags in which a pilot differs from outcome only."""
    mine, common = (
        dataclasses.asdict(parse_args(train_command(name, 0)[1:]))
        for name in (pilot, "outcome only")
    )
    flags = []
    for key in mine.keys() - {"save_every", "keep"}:  # which steer nothing
        flag, value = key.replace("_", "-"), mine[key]
        if value != common[key]:
            own = [f"--{flag}"] if value is True else [f"--no-{flag}"] if value is False else []
            flags.append(own or [f"--{flag}", f"{value:g}" if isinstance(value, float) else value])
    return shlex.join(str(part) for flag in sorted(flags, key=str) for part in flag)


def seeds_table(measures: dict[str, dict], names) -> str:
    """Each seed by itself: what the intervals of few seeds are made of."""
    rows = [
        [name, *(
            ", ".join(f"{(100 if percent else 1) * value:.1f}"
                      for value in values(measures[name][key]))
            for key, (_, percent) in COLUMNS.items()
        )]
        for name in names
    ]  # fmt: skip
    return table(["arm", *headings(COLUMNS, "%")], rows)


def pilots_table(pilots: dict[str, dict]) -> str:
    """What was tried once on the way, by train.py's own last evaluation."""
    rows = []
    for name, run in pilots.items():
        step, *values = run["evals"][-1]
        found = dict(zip(EVAL, values, strict=True))
        shares = [f"{100 * found[key]:.1f}" for key in ("pass@1", "pass@4")]
        words = [f"{100 * found[key]:.1f}" for key in ("numbers", "stop_words")]
        rows.append(
            [name, f"`{beside_common(name)}`", str(step), *shares, f"{found['tokens']:.1f}", *words]
        )
    heads = ["accuracy, %", "pass@4, %", "tokens", "numbers, %", "stop words, %"]
    return table(["pilot", "OWN", "updates", *heads], rows)


def matched_table(arms: dict[str, dict], base: str) -> str:
    """Differences to the base arm on traces of matched length; how many pairs of them each had."""
    columns = {key: it for key, it in FAITHFULNESS.items() if not key.startswith("auroc")}
    rows = []
    for name, runs in arms.items():
        if name == base:
            continue
        here, there = matched(runs, arms[base])
        found = {
            key: interval(here[key], there[key]) if key in here and key in there else None
            for key in columns
        }
        counts = [str(found[key]["pairs"] if found[key] else 0) for key in
                  ("necessity", "comprehensiveness/attribution")]  # fmt: skip
        cells = [cell(found[key], percent, True) for key, (_, percent) in columns.items()]
        seeds = len(runs.keys() & arms[base].keys())
        rows.append([f"{name} ({seeds})", *cells, " / ".join(counts)])
    heads = headings(columns, "points")
    return table(
        [f"against {base} (seeds of both)", *heads, "pairs of traces: reliance / map"], rows
    )


def protocol(arms: dict[str, dict]) -> str:
    """Each arm's command, which seeds there are of it, and with what they ran."""
    rows = [
        [name, f"`{flags}`" if flags else "neither",
         ", ".join(map(str, sorted(arms.get(name, {})))) or "none yet"]
        for name, flags in ARMS.items()
    ]  # fmt: skip
    settings = parse_args(train_command(DEFAULT, 0)[1:])
    versions = {json.dumps(run["versions"]) for runs in arms.values() for run in runs.values()}
    evaluated = [f"`python eval.py --model RUN {flags}`" for flags in EVALUATIONS.values()]
    with_what = "; ".join(
        ", ".join(f"{name} {value}" for name, value in json.loads(found).items())
        for found in sorted(versions)
    )
    return "\n\n".join((
        f"Each is `python train.py COMMON OWN --seed N`, COMMON being `{COMMON}`; the last flag "
        f"counts. The {DEFAULT} is `python train.py --seed N`. An update is "
        f"{settings.questions} questions x {settings.rollouts} rollouts and {settings.passes} "
        "optimiser steps, as by default.",
        table(["arm", "OWN", "seeds N"], rows),
        f"Each run is then measured by {', '.join(evaluated)}. With {with_what}.",
    ))  # fmt: skip


def costs_table(arms: dict[str, dict]) -> str:
    """What an update took and what its saliency was like, over all updates and seeds."""
    rows = []
    for name, runs in arms.items():
        updates = np.array(
            [row for run in runs.values() for row in run["updates"]], dtype=float
        )  # None, of a mask that was not learned, becomes nan
        # Others were at work on the machine, and slow all three parts: their ratio tells more.
        sampling, masks, policy = (updates[:, UPDATE.index(key)] for key in SECONDS)
        seconds = [f"{np.quantile(part, 0.1):.1f}" for part in (sampling, masks, policy)]
        ratio = f"{np.median(masks / (sampling + policy)):.1f}"
        weight = {run["config"]["saliency_weight"] for run in runs.values()}.pop()
        spread = weight * np.nanmean(updates[:, UPDATE.index("saliency_spread")])
        clipped = np.nanmean(updates[:, UPDATE.index("clip_fraction")])
        rows.append([f"{name} ({len(runs)})", *seconds, ratio, f"{weight:g}", f"{spread:.3f}",
                     f"{clipped:.3f}"])  # fmt: skip
    heads = ["sampling, s", "masks, s", "policy, s", "masks / (sampling + policy)", "weight",
             "weight x spread in a group", "clipped"]  # fmt: skip
    return table(["arm (seeds)", *heads], rows)


def draw_curves(arms: dict[str, dict], path: Path) -> None:
    """Reasoning length and share of right rollouts by update, over 9 updates; seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    colours, dashes = pyplot.get_cmap("tab10").colors, ("-", "--", ":")
    for n, (name, runs) in enumerate(arms.items()):
        steps, outcome, length = (
            np.array([[row[UPDATE.index(key)] for row in run["updates"]] for run in runs.values()])
            for key in ("step", "outcome", "length")
        )  # (seeds, updates)
        for axis, values in zip(axes, (length, 100 * (1 + outcome)), strict=True):
            windows = [values[:, max(0, n - 4) : n + 5].mean(1) for n in range(values.shape[1])]
            smooth = np.array(windows)  # (updates, seeds)
            look = {"color": colours[n % 10], "linestyle": dashes[n // 10]}
            axis.plot(steps[0], smooth.mean(1), label=f"{name} ({len(runs)})", lw=1.5, **look)
            axis.fill_between(
                steps[0], smooth.min(1), smooth.max(1), color=colours[n % 10], alpha=0.1, lw=0
            )
    for axis, title in zip(axes, ("reasoning tokens", "right rollouts, %"), strict=True):
        axis.set(xlabel="update", title=title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def report() -> None:
    """docs/study.md and its figures, from docs/study/*.json."""
    rows = [
        row for path in sorted(KEPT.glob("sign-*.json")) for row in json.loads(path.read_text())
    ]
    arms, pilots = load(), load_pilots()
    trained = {name: runs for name, runs in arms.items() if name != "start"}
    controls = [name for name in CONTROLS if name in trained]
    seeds = sorted({seed for runs in trained.values() for seed in runs}) or [0]
    if "start" in arms:  # one checkpoint, which every seed began with
        (start,) = arms["start"].values()
        arms["start"] = dict.fromkeys(seeds, start)
    measures = {name: own(runs) for name, runs in arms.items()}
    template = (ROOT / "docs/study_template.md").read_text(encoding="utf-8")
    parts = dict.fromkeys(re.findall("<!-- (.*) -->", template), "No result yet.")
    parts["protocol"] = protocol(trained)
    if rows:
        questions = len({row["id"] for row in rows})
        parts["sign"] = f"{len(rows)} valid traces of {questions} questions.\n\n" + sign.markdown(
            sign.correlations(rows)
        )
        by_other = sign.correlations(rows, held="length")
        del by_other["length"]
        parts["sign, length fixed"] = sign.markdown(by_other)
    if "start" in arms:
        floor = tersest(len(start["heldout"]))
        measures[TERSEST] = by_measure(dict.fromkeys(seeds, floor))
        parts["shorter"] = shorter_table(trained, floor["tokens"])
        parts["baselines"] = map_baselines({0: start})
        parts["against start"] = difference_table(measures, trained, "start", COLUMNS)
    if trained:
        draw_curves(trained, KEPT / "curves.png")
        parts["arms"] = arms_table(arms | {TERSEST: {}}, measures, COLUMNS)
        parts["faithfulness"] = arms_table(arms, measures, FAITHFULNESS)
        parts["costs"] = costs_table(trained)
        parts["seeds"] = seeds_table(measures, trained)
        parts["matched"] = "\n\n".join(matched_table(trained, control) for control in controls)
    for base in ("outcome only", *controls):
        if base in trained:
            parts[f"against {base}"] = "\n\n".join(
                difference_table(measures, trained, base, columns)
                for columns in (COLUMNS, FAITHFULNESS)
            )
    signs = ("mask restored", "mask literal")
    if set(signs) <= trained.keys():
        parts["trained sign"] = difference_table(measures, signs, "mask literal", COLUMNS)
    if {"start", "outcome only", DEFAULT} <= arms.keys():
        parts["claims"] = difference_table(
            measures, [*trained, TERSEST], "outcome only", RELATIVE, True
        )
        parts["aims"] = aims_table(measures)
        parts["room"] = "\n\n".join(room_table(measures, control) for control in controls)
    if pilots:
        parts["pilots"] = pilots_table(pilots)
    for key, text in parts.items():
        template = template.replace(f"<!-- {key} -->", text)
    (ROOT / "docs/study.md").write_text(template, encoding="utf-8")


if __name__ == "__main__":
    report()
