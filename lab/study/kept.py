"""What the study keeps of its runs: the JSON files in docs/study/, as written and as read again.

Those of the second start are in docs/study/micro2/.

    selection-START.json   lab/study/selection.py's rewards of one start's traces
maps-SPLIT.json        lab/study/maps.py's measures of token maps
    start.json             evaluations of the checkpoint that every arm starts from
    ARM-SEED.json          settings, updates and evaluations of one run
    pilot-NAME.json        settings and updates of one run

A run's file holds short rows in place of objects, because the files are committed:
updates        UPDATE of each
heldout, hard  problem -> for each sample what `sample_row` gives
reliance       heldout or hard -> problem -> sample -> same answer at each fraction (0, 1 or null),
               necessity, direct, corruption
"""

import json
import math
from pathlib import Path

from data.files import write_file
from data.micro_labels import computing_equations, equation_values, number_value
from data.traces import NUMBER
from lab.measure.table1 import WORDS, counts_by_text, load_spacy, table1_ratios
from lab.study.arms import ARMS, EVALUATIONS, PILOTS, ROOT, read_lines

KEPT, RUNS = ROOT / "docs/study", ROOT / "runs/study"
SECONDS = ("seconds_sampling", "seconds_masks", "seconds_policy")
UPDATE = ("step", "outcome", "computing", "length", "saliency", "saliency_spread", "clip_fraction")
UPDATE += SECONDS
FLAGS = ("correct", "valid", "truncated", "no_delimiter", "computing")  # of a sample
GAMES = ("wrong", "repeats", "states", "foreign")  # see `games`
SPLITS = ("heldout", "hard")


def folder_of(task: str, folder: Path = KEPT) -> Path:
    """Where a task's files lie: the first task's in the folder itself."""
    return folder if task == "micro" else folder / task


def write(path: Path, content: dict) -> None:
    write_file(path, json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")


def training_of(folder: Path) -> dict:
    """config and updates of a finished run."""
    lines = read_lines(folder / "metrics.jsonl")
    return {
        "config": json.loads((folder / "config.json").read_text()) | {"out": None},
        "updates": [[round_off(row[key]) for key in UPDATE] for row in lines if "outcome" in row],
    }


def evaluations_of(folder: Path) -> dict:
    """versions, heldout, hard and reliance, from the results of EVALUATIONS in a folder."""
    models = {}
    for evaluation in EVALUATIONS:
        results = json.loads((folder / f"eval-{evaluation}/results.json").read_text())
        models[evaluation] = next(iter(results["models"].values()))
    kept = {"versions": results["versions"], "heldout": {}, "hard": {}, "reliance": {}}
    for split, faithful in zip(SPLITS, ("faithful", "hard"), strict=True):
        records, rows = models[split]["records"], kept["reliance"].setdefault(split, {})
        words = counts_by_text([record["text"] for record in records], load_spacy(None))
        for record, counts in zip(records, words, strict=True):
            kept[split].setdefault(record["id"], []).append(sample_row(record, counts))
        for row in models[faithful]["reliance"]:
            same = row["same"] and [int(answer) for answer in row["same"]]
            values = [round_off(row[key]) for key in ("necessity", "direct", "corruption")]
            rows.setdefault(row["id"], {})[row["sample"]] = [same, *values]
    return kept


def sample_row(record: dict, counts: dict) -> list[int | None]:
    """FLAGS, GAMES, the number of reasoning tokens, table1.WORDS."""
    flags = [None if record[key] is None else int(record[key]) for key in FLAGS]
    return [*flags, *games(record), len(record["reasoning"]), *(counts[kind] for kind in WORDS)]


def games(record: dict) -> list[int]:
    """GAMES: ways to look used without having computed the answer from the question.

    wrong: the answer rests on an equation, and is wrong: something else was computed, and copied.
    repeats: an equation that the answer rests on is there twice.
    states: the answer's number is there, and no equation leads to it.
    foreign: the answer rests on equations none of whose operands is a number of the question: they
        were made up to result in an answer that was known.
    """
    answer = record["number"] or ""
    equations = [match[0] for match in computing_equations(record["text"], answer)]
    operands = set().union(*(equation_values(equation)[0] for equation in equations))
    wrong, repeats = equations and not record["correct"], len(set(equations)) < len(equations)
    states = not equations and number_value(answer) in values_of(record["text"])
    foreign = equations and not values_of(record["question"]) & operands
    return [int(bool(record["valid"] and game)) for game in (wrong, repeats, states, foreign)]


def values_of(text: str) -> set:
    """All numbers of a text, signed as data.traces reads answers."""
    found = NUMBER.finditer(text)
    return {number_value("-" * bool(match["sign"]) + match["digits"]) for match in found}


def round_off(value):
    """Five significant digits are more than any interval can use."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, bool) else float(f"{value:.5g}")


def load_all(folder: Path, pattern: str) -> dict[str, dict]:
    """Content of each file, by its name without the ending."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(pattern))}


def load_arms(folder: Path = KEPT) -> dict[str, dict[int, dict]]:
    """arm -> seed -> what is kept of that run; the start and ARMS, in their order."""
    arms: dict[str, dict[int, dict]] = {name: {} for name in ("start", *ARMS)}
    for run in (load_all(folder, "start.json") | load_all(folder, "*-[0-9]*.json")).values():
        if "arm" in run:  # and no pilot
            arms[run["arm"]][run["seed"]] = run
    return {name: runs for name, runs in arms.items() if runs}


def load_pilots(folder: Path = KEPT) -> dict[str, dict]:
    """pilot -> what is kept of it, in the order of PILOTS."""
    runs = {run["pilot"]: run for run in load_all(folder, "pilot-*.json").values()}
    return {name: runs[name] for name in PILOTS if name in runs}


def samples_of(run: dict, split: str) -> list[dict]:
    """Records as table1_ratios takes them, with GAMES, and WORDS among their keys."""
    names = (*FLAGS, *GAMES, "reasoning", *WORDS)
    samples = [
        {"id": problem, "sample": sample, **dict(zip(names, row, strict=True))}
        for problem, rows in run[split].items()
        for sample, row in enumerate(rows)
    ]
    return [sample | {"reasoning": range(sample["reasoning"])} for sample in samples]


def table1_of(run: dict, split: str) -> dict[str, dict]:
    """table1.table1_ratios of a kept run, and the share of its samples of each of GAMES."""
    samples = samples_of(run, split)
    ratios = table1_ratios(samples, samples)
    for place, game in enumerate(GAMES, start=len(FLAGS)):
        counts = {name: sum(row[place] for row in rows) for name, rows in run[split].items()}
        ratios[game] = {name: (count, len(run[split][name])) for name, count in counts.items()}
    return ratios


def reliance_rows(run: dict, split: str) -> list[dict]:
    """Rows as compare.reliance_ratios takes them, of every sample that was measured."""
    keys = ("same", "necessity", "direct", "corruption")
    return [
        {"id": problem, "sample": int(sample), **dict(zip(keys, values, strict=True))}
        for problem, samples in run["reliance"][split].items()
        for sample, values in samples.items()
    ]
