"""Arms side by side: every measure by question, intervals, paired differences, matched length.

An arm is one checkpoint's samples and what was measured of them, rows of dicts with id and sample.
Its measures are ratios by question (bootstrap.py) under flat names:

    pass@1, pass@4, tokens, numbers, ...               table1.ROWS
    truncation, same answer at 0%, ... at 100%         faithfulness.truncation
    necessity, direct                                  faithfulness.knockout
    corruption                                         faithfulness.corruption
    comprehensiveness/RANKING, sufficiency/RANKING     faithfulness.erasure, AOPC
    comprehensiveness 10%/RANKING, ...                 the same at one share
    auroc/RANKING, auroc no punctuation/RANKING        faithfulness.label_areas (micro)
    unlabelled                                         share of characters without a label (micro)

A question counts once: the mean over its samples. Matched length: a run that shortens its reasoning
changes all of these by shortness alone, so two arms are compared once more on pairs of traces that
are about equally long. From each question comes the pair, one trace of either arm, whose numbers of
reasoning tokens are nearest; it counts when they differ by no more than the tolerance (a share of
the longer one, or 3 tokens). What remains are the longer traces of the shorter arm and the shorter
ones of the longer arm, of fewer questions: how many is part of the result.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from bootstrap import Ratios, difference, interval
from faithfulness import FRACTIONS, TOP_SHARES, area_over_curve
from table1 import ROWS, table1_ratios

SLACK = 3  # tokens by which a matched pair may always differ

Key = tuple[str, int]  # a trace: problem's id, sample's number


@dataclass
class Arm:
    """words: table1.counts_by_text of the records. reliance, map: row of each measured trace."""

    records: list[dict]
    words: list[dict[str, int]]
    reliance: dict[Key, dict] = field(default_factory=dict)
    map: dict[Key, dict] = field(default_factory=dict)
    mask: dict | None = None  # how one mask came about: eval.follow_mask

    def own(self) -> dict[str, Ratios]:
        """All measures at the arm's own lengths; the map on each question's first correct trace."""
        ratios = table1_ratios(self.records, self.words)
        ratios |= reliance_ratios(self.reliance.values())
        chosen = first_correct(self.records)
        return ratios | map_ratios([self.map[key] for key in chosen if key in self.map])

    def of_traces(self, keys: list[Key], map_keys: list[Key]) -> dict[str, Ratios]:
        """All measures that make sense of one trace a question, on the given traces."""
        places = {(r["id"], r["sample"]): n for n, r in enumerate(self.records)}
        ratios: dict[str, Ratios] = {}
        if keys:
            chosen = [places[key] for key in keys]
            ratios = table1_ratios(
                [self.records[n] for n in chosen], [self.words[n] for n in chosen]
            )
            del ratios["tokens_spread"], ratios["truncated"], ratios["no_delimiter"]
        ratios |= reliance_ratios([self.reliance[key] for key in keys if key in self.reliance])
        return ratios | map_ratios([self.map[key] for key in map_keys if key in self.map])


class Matched(NamedTuple):
    """Pairs of traces of two arms, about equally long: for reliance, and for the map."""

    traces: list[tuple[Key, Key]]
    map_traces: list[tuple[Key, Key]]

    def of_side(self, side: int) -> tuple[list[Key], list[Key]]:
        """One arm's part of traces and of map_traces; side: 0 is the arm before, 1 after."""
        return [pair[side] for pair in self.traces], [pair[side] for pair in self.map_traces]


def reliance_ratios(rows) -> dict[str, Ratios]:
    """By question, the mean over its traces. A trace that a measure says None of is left out."""
    values: dict[str, dict[str, list[float]]] = {}

    def put(key, row, value):
        values.setdefault(key, {}).setdefault(row["id"], []).append(float(value))

    for row in rows:
        if row["same"] is not None:
            put("truncation", row, area_over_curve(row["same"]))
            for fraction, same in zip(FRACTIONS, row["same"], strict=True):
                put(f"same answer at {fraction:.0%}", row, same)
        for key in ("necessity", "direct", "corruption"):
            if row[key] is not None:
                put(key, row, row[key])
    return {
        key: {problem: (sum(found) / len(found), 1.0) for problem, found in by_problem.items()}
        for key, by_problem in values.items()
    }


def map_ratios(rows) -> dict[str, Ratios]:
    """By question, of one trace each."""
    ratios: dict[str, Ratios] = {}
    for row in rows:
        for test in ("comprehensiveness", "sufficiency"):
            for ranking, losses in row[test].items():
                aopc = sum(losses) / len(losses)
                ratios.setdefault(f"{test}/{ranking}", {})[row["id"]] = (aopc, 1.0)
                for share, loss in zip(TOP_SHARES, losses, strict=True):
                    ratios.setdefault(f"{test} {share:.0%}/{ranking}", {})[row["id"]] = (loss, 1.0)
        for column, name in (("all tokens", "auroc"), ("no punctuation", "auroc no punctuation")):
            for ranking, area in row.get("auroc", {}).get(column, {}).items():
                if area is not None:
                    ratios.setdefault(f"{name}/{ranking}", {})[row["id"]] = (area, 1.0)
        if "unlabelled" in row:  # characters, pooled
            ratios.setdefault("unlabelled", {})[row["id"]] = tuple(map(float, row["unlabelled"]))
    return ratios


def first_correct(records: list[dict]) -> list[Key]:
    """One correct trace a question, the first: there gold and own answer are one."""
    chosen: dict[str, Key] = {}
    for record in records:
        if record["correct"]:
            chosen.setdefault(record["id"], (record["id"], record["sample"]))
    return list(chosen.values())


def nearest_lengths(one: list[dict], other: list[dict], tolerance: float) -> list[tuple[Key, Key]]:
    """A pair of traces of each question, from either arm, about equally long (see above).

    one, other: records of the traces that may be chosen. Of equally near pairs the first samples.
    """
    by_problem: dict[str, list[dict]] = {}
    for record in other:
        by_problem.setdefault(record["id"], []).append(record)
    best: dict[str, tuple] = {}
    for a in one:
        for b in by_problem.get(a["id"], []):
            lengths = len(a["reasoning"]), len(b["reasoning"])
            if not near(*lengths, tolerance):
                continue
            candidate = (abs(lengths[0] - lengths[1]), a["sample"], b["sample"])
            best[a["id"]] = min(best.get(a["id"], candidate), candidate)
    return [((problem, a), (problem, b)) for problem, (_, a, b) in best.items()]


def near(one: int, other: int, tolerance: float) -> bool:
    """Whether two traces of so many tokens are about equally long (see above)."""
    return abs(one - other) <= max(SLACK, tolerance * max(one, other))


def matched_traces(before: Arm, after: Arm, tolerance: float) -> Matched:
    """nearest_lengths of all valid traces, for reliance, and of the correct ones, for the map."""

    def nearest(kind):
        one, other = ([r for r in arm.records if r[kind]] for arm in (before, after))
        return nearest_lengths(one, other, tolerance)

    return Matched(traces=nearest("valid"), map_traces=nearest("correct"))


def compare_arms(before: Arm, after: Arm, matched: Matched, draws: int, seed: int) -> dict:
    """Paired differences at the arms' own lengths and on `matched_traces`: eval.py's pairs."""
    sides = [arm.of_traces(*matched.of_side(n)) for n, arm in enumerate((before, after))]
    found = {
        name: [[problem, one, other] for (problem, one), (_, other) in pairs]
        for name, pairs in matched._asdict().items()
    }
    found["before"], found["after"] = (measures(side, draws, seed) for side in sides)
    found["differences"] = differences(*sides, draws, seed)
    return {"own": differences(before.own(), after.own(), draws, seed), "matched": found}


def measures(ratios: dict[str, Ratios], draws: int, seed: int) -> dict[str, dict]:
    """Each measure with its interval."""
    return {key: interval(found, draws, seed) for key, found in ratios.items()}


def differences(before, after, draws: int, seed: int) -> dict[str, dict]:
    """after - before, of the measures that both arms have, paired by question."""
    keys = [key for key in after if key in before]
    return {key: difference(before[key], after[key], draws, seed) for key in keys}


# ------------------------------------------------------------------------------------ as text

RELIANCE = {  # key: label
    "truncation": "truncation (area over the curve)",
    "necessity": "knockout: reasoning hidden (nats)",
    "direct": "knockout: prompt hidden (nats)",
    "corruption": "corruption (answer changes)",
}


def cell(found: dict | None, signed: bool = False) -> str:
    """A number and its interval."""
    if not found or found["value"] is None:
        return "-"
    sign = "+" if signed else ""
    text = f"{found['value']:{sign}.3f}"
    if found["low"] is not None:
        text += f" [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"
    return text


def columns_of(rows: list[tuple[str, list[str]]], heads: list[str], first: str = "") -> str:
    """Rows of text under their heads."""
    label = max(len(first), *(len(name) for name, _ in rows)) + 2
    widths = [
        max(len(head), *(len(cells[n]) for _, cells in rows)) + 3 for n, head in enumerate(heads)
    ]
    lines = [first.ljust(label) + "".join(h.rjust(w) for h, w in zip(heads, widths, strict=True))]
    for name, cells in rows:
        line = "".join(c.rjust(w) for c, w in zip(cells, widths, strict=True))
        lines.append(name.ljust(label) + line)
    return "\n".join(lines)


def reliance_rows(arms: dict[str, dict[str, dict]]) -> list[tuple[str, list[str]]]:
    """How far each arm relies on its reasoning; arms: name -> measures."""
    rows = [
        (label, [cell(found.get(key)) for found in arms.values()])
        for key, label in RELIANCE.items()
    ]
    for fraction in FRACTIONS[:-1]:
        key = f"same answer at {fraction:.0%}"
        rows.append((f"  {key} of it", [cell(found.get(key)) for found in arms.values()]))
    return rows


def reliance_table(arms: dict[str, dict[str, dict]]) -> str:
    return columns_of(reliance_rows(arms), list(arms), "reliance on the reasoning")


def map_rows(found: dict[str, dict]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Whether each ranking of one arm is right: heads and rows, none without a correct trace."""
    heads = {
        "comprehensiveness": "comprehensiveness (up)",
        "sufficiency": "sufficiency (down)",
        "auroc": "AUROC",
        "auroc no punctuation": "AUROC, no punctuation",
    }
    names = [key.partition("/")[2] for key in found if key.startswith("comprehensiveness/")]
    tests = [key for key in heads if any(k.startswith(f"{key}/") for k in found)]
    rows = [(rank, [cell(found.get(f"{test}/{rank}")) for test in tests]) for rank in names]
    return [heads[test] for test in tests], rows


def map_title(name: str, found: dict[str, dict]) -> str:
    tested = next((v for key, v in found.items() if key.startswith("comprehensiveness/")), None)
    if not tested:
        return f"{name}: no correct trace, so no map to test"
    return f"is the map right? {name}, {tested['questions']} traces"


def map_note(found: dict[str, dict]) -> str:
    """What the areas leave out; "" where there are none."""
    share = found.get("unlabelled", {}).get("value")
    if share is None:
        return ""
    return f"AUROC leaves out the {share:.1%} of characters that the parser does not know"


def map_table(name: str, found: dict[str, dict]) -> str:
    """Whether each ranking of one arm is right."""
    heads, rows = map_rows(found)
    if not rows:
        return map_title(name, found)
    return "\n".join(filter(None, (columns_of(rows, heads, map_title(name, found)),
                                   map_note(found))))  # fmt: skip


DIFFERENCE_HEADS = ["own lengths", "matched length", "matched questions"]


def difference_rows(result: dict) -> list[tuple[str, list[str]]]:
    """One pair of arms, compare_arms' result."""
    own, matched = result["own"], result["matched"]["differences"]
    labels = {key: label.strip() for key, (label, _) in ROWS.items()} | RELIANCE
    for key in own:
        if key.endswith(("/mask", "/attribution")) and "%" not in key and "auroc" not in key:
            labels[key] = "map: " + key.replace("/", ", ")
    rows = []
    for key, label in labels.items():
        if key in own:
            cells = [cell(own[key], True), cell(matched.get(key), True)]
            rows.append((label, [*cells, str(matched.get(key, {}).get("questions", "-"))]))
    return rows


def difference_table(before: str, after: str, result: dict, words_by: str) -> str:
    """One pair of arms, compare_arms' result; words_by: table1.describe_spacy's."""
    note = f"paired by question; numbers, stop words and symbols by spaCy, {words_by}\n"
    return note + columns_of(difference_rows(result), DIFFERENCE_HEADS, f"{after} - {before}")
