"""What the study keeps of its runs: the JSON files in docs/study/, as written and as read again.

    sign-PART.json    rows of lab/study/sign.py
    start.json        evaluations of the checkpoint that every arm starts from
    ARM-SEED.json     settings, updates and evaluations of one run
    pilot-NAME.json   settings and updates of one run

A run's file holds short rows in place of objects, because the files are committed:
updates       UPDATE of each
evals         step and EVAL of each of train.py's own evaluations
heldout, hard problem -> for each sample what `sample_row` gives
reliance      problem -> sample -> same answer at each fraction (0, 1 or null), necessity, direct,
              corruption
map           problem -> sample, length, ranking -> what MAP_TESTS name
"""

import json
import math
from pathlib import Path

from data.files import write_file
from lab.measure.faithfulness import TOP_SHARES
from lab.measure.table1 import WORDS, counts_by_text, load_spacy, table1_ratios
from lab.study.arms import ARMS, EVALUATIONS, PILOTS, ROOT, read_lines

KEPT, RUNS = ROOT / "docs/study", ROOT / "runs/study"
SECONDS = ("seconds_sampling", "seconds_masks", "seconds_policy")
UPDATE = ("step", "outcome", "saliency", "saliency_spread", "no_signal", "length", "clip_fraction")
UPDATE += SECONDS
EVAL = ("problems", "pass@1", "pass@4", "tokens", "numbers", "stop_words")
FLAGS = ("correct", "valid", "truncated", "no_delimiter")  # of a sample
# AOPC of the first two, AUROC on all tokens and without punctuation
MAP_TESTS = ("comprehensiveness", "sufficiency", "auroc", "auroc no punctuation")


def write(path: Path, content: dict) -> None:
    write_file(path, json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")


def training_of(folder: Path) -> dict:
    """config, updates and evals of a finished run."""
    lines = read_lines(folder / "metrics.jsonl")
    evals = [(line["step"], line["eval"]) for line in lines if "eval" in line]
    return {
        "config": json.loads((folder / "config.json").read_text()) | {"out": None},
        "updates": [[round_off(row[key]) for key in UPDATE] for row in lines if "outcome" in row],
        "evals": [[step, *(round_off(summary[key]) for key in EVAL)] for step, summary in evals],
    }


def evaluations_of(folder: Path) -> dict:
    """versions, heldout, hard, reliance and map, from the results of EVALUATIONS in a folder."""
    models = {}
    for evaluation in EVALUATIONS:
        results = json.loads((folder / f"eval-{evaluation}/results.json").read_text())
        models[evaluation] = next(iter(results["models"].values()))
    kept = {"versions": results["versions"], "heldout": {}, "hard": {}, "reliance": {}, "map": {}}
    for evaluation in ("heldout", "hard"):
        records = models[evaluation]["records"]
        words = counts_by_text([record["text"] for record in records], load_spacy(None))
        for record, counts in zip(records, words, strict=True):
            kept[evaluation].setdefault(record["id"], []).append(sample_row(record, counts))
    for row in models["faithful"]["reliance"]:
        same = row["same"] and [int(answer) for answer in row["same"]]
        values = [round_off(row[key]) for key in ("necessity", "direct", "corruption")]
        kept["reliance"].setdefault(row["id"], {})[row["sample"]] = [same, *values]
    for row in models["faithful"]["map"]:
        rankings = {ranking: map_values(row, ranking) for ranking in row["comprehensiveness"]}
        kept["map"][row["id"]] = [row["sample"], row["length"], rankings]
    return kept


def sample_row(record: dict, counts: dict) -> list[int]:
    """FLAGS, the number of reasoning tokens, table1.WORDS."""
    flags = [int(record[key]) for key in FLAGS]
    return [*flags, len(record["reasoning"]), *(counts[kind] for kind in WORDS)]


def map_values(row: dict, ranking: str) -> list[float | None]:
    """MAP_TESTS of one ranking of one trace."""
    aopc = [sum(row[test][ranking]) / len(TOP_SHARES) for test in MAP_TESTS[:2]]
    used = (row.get("auroc", {}).get(which, {}) for which in ("all tokens", "no punctuation"))
    return [round_off(value) for value in (*aopc, *(areas.get(ranking) for areas in used))]


def round_off(value):
    """Five significant digits are more than any interval can use."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, bool) else float(f"{value:.5g}")


def load_all(folder: Path, pattern: str) -> list:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def load_arms(folder: Path = KEPT) -> dict[str, dict[int, dict]]:
    """arm -> seed -> what is kept of that run; the start and ARMS, in their order."""
    arms: dict[str, dict[int, dict]] = {name: {} for name in ("start", *ARMS)}
    for run in load_all(folder, "*.json"):
        if "arm" in run:
            arms[run["arm"]][run["seed"]] = run
    return {name: runs for name, runs in arms.items() if runs}


def load_pilots(folder: Path = KEPT) -> dict[str, dict]:
    """pilot -> what is kept of it, in the order of PILOTS."""
    runs = {run["pilot"]: run for run in load_all(folder, "pilot-*.json")}
    return {name: runs[name] for name in PILOTS if name in runs}


def table1_of(run: dict, split: str) -> dict[str, dict]:
    """table1.table1_ratios of a kept run."""
    records, words = [], []
    for problem, rows in run[split].items():
        for sample, row in enumerate(rows):
            flags = dict(zip(FLAGS, row, strict=False))
            tokens, *counts = row[len(FLAGS) :]
            records.append({"id": problem, "sample": sample, "reasoning": [0] * tokens} | flags)
            words.append(dict(zip(WORDS, counts, strict=True)))
    return table1_ratios(records, words)


def reliance_rows(run: dict, chosen=None) -> list[dict]:
    """Rows as compare.reliance_ratios takes them, of all samples or of the chosen (id, sample)."""
    keys = ("same", "necessity", "direct", "corruption")
    return [
        {"id": problem, "sample": int(sample), **dict(zip(keys, values, strict=True))}
        for problem, samples in run["reliance"].items()
        for sample, values in samples.items()
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
