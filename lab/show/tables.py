"""The text tables: Table 1, reliance on the reasoning, rightness of the map, differences of arms.

    print(summary_table({"before": summary, "after": summary}, pipeline))       # train.py's
    print(reliance_table({name: measures}))                                     # eval.py's

The `*_rows` functions give (label, cells) lines, which the report sets in HTML and `columns_of` as
text. `measures` are those of an arm by name (lab/measure/compare.py), each a dict with value, low,
high and questions (lab/measure/bootstrap.py).
"""

from lab.measure.faithfulness import FRACTIONS
from lab.measure.table1 import describe_spacy

Line = tuple[str, list[str]]  # label, cells

ROWS = {  # Table 1, key: (label, whether it is a share)
    "pass@1": ("accuracy (pass@1)", True),
    "macro pass@1": ("  mean of subjects", True),
    "pass@2": ("pass@2", True),
    "pass@3": ("pass@3", True),
    "pass@4": ("pass@4", True),
    "computing": ("computing share", True),
    "computing pass@1": ("  accuracy of these", True),
    "decoy pass@1": ("  accuracy of the others", True),
    "tokens": ("tokens per trace", False),
    "tokens_spread": ("  spread in a question", False),
    "spacy_tokens": ("spaCy tokens per trace", False),
    "numbers": ("numbers", True),
    "stop_words": ("stop words", True),
    "symbols": ("symbols", True),
    "truncated": ("cut at the limit", True),
    "no_delimiter": ("no delimiter", True),
}
RELIANCE = {
    "truncation": "truncation (area over the curve)",
    "necessity": "knockout: reasoning hidden (nats)",
    "direct": "knockout: prompt hidden (nats)",
    "corruption": "corruption (answer changes)",
}
MAP_HEADS = {
    "comprehensiveness": "comprehensiveness (up)",
    "sufficiency": "sufficiency (down)",
    "auroc": "AUROC",
    "auroc no punctuation": "AUROC, no punctuation",
}
CHANGES = {  # of a pair of arms, what its forest plot shows
    "computing": "computing share", "pass@1": "accuracy", "pass@4": "pass@4",
    "corruption": "corruption", "truncation": "truncation", "necessity": "reasoning hidden",
    "direct": "prompt hidden", "tokens": "tokens per trace",
}  # fmt: skip
MAIN_CHANGES = ("computing", "pass@1", "tokens", "corruption")  # what its sentence names
DIFFERENCE_HEADS = ["own lengths", "matched length", "matched questions"]


def columns_of(lines: list[Line], heads: list[str], corner="", label_width=None, widths=None):
    """Lines under their heads as text; columns are as wide as their longest cell, or as given."""
    lines = [(corner, heads), *lines]
    label_width = label_width or max(len(label) for label, _ in lines) + 2
    columns = zip(*(cells for _, cells in lines), strict=True)
    widths = widths or [max(map(len, column)) + 3 for column in columns]
    text = []
    for label, cells in lines:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        text.append((label.ljust(label_width) + "".join(aligned)).rstrip())
    return "\n".join(text)


def cell(measure: dict | None, sign: str = "") -> str:
    """A measure and its interval; sign "+" shows the sign of positive numbers too."""
    if not measure or measure["value"] is None:
        return "-"
    text = f"{measure['value']:{sign}.3f}"
    if measure["low"] is None:
        return text
    return f"{text} [{measure['low']:{sign}.3f}, {measure['high']:{sign}.3f}]"


def summary_rows(summaries: dict[str, dict], measures: dict[str, dict]) -> dict[str, Line]:
    """Table 1 (table1.summarize) by key; the measures of a name give the intervals of its cells."""
    lines = {}
    for key, (label, share) in ROWS.items():
        if any(key in summary for summary in summaries.values()):
            cells = []
            for name, summary in summaries.items():
                measure = measures.get(name, {}).get(key)
                cells.append(summary_cell(summary.get(key), share, measure))
            lines[key] = label, cells
    return lines


def summary_cell(value: float | None, share: bool, measure: dict | None) -> str:
    """A number of Table 1, and the interval of its measure where there is one."""
    if value is None:
        return "-"
    text, scale = (f"{value:.1%}", 100) if share else (f"{value:.1f}", 1)
    if not measure or measure["low"] is None:
        return text
    ends = f"[{scale * measure['low']:.1f}, {scale * measure['high']:.1f}]"
    return f"{text} {ends:>14}"


def summary_table(summaries: dict[str, dict], pipeline, measures: dict[str, dict] | None = None):
    """Table 1 of each name side by side (table1.summarize), with the last one's change.

    measures: of each name; their intervals stand behind each number, in place of the change.
    """
    lines, heads = summary_rows(summaries, measures or {}), list(summaries)
    first, last = summaries[heads[0]], summaries[heads[-1]]
    widths = [max(25 if measures else 12, *(len(name) + 2 for name in heads))] * len(heads)
    if len(heads) > 1 and not measures:
        heads, widths = [*heads, "change"], [*widths, 12]
        for key, (_, cells) in lines.items():
            cells.append(change(key, first.get(key), last.get(key)))
    note = (
        f"{first['problems']} problems x {first['samples']} samples; numbers, stop words and "
        f"symbols by spaCy, {describe_spacy(pipeline)}"
    )
    return f"{note}\n{columns_of(lines.values(), heads, label_width=24, widths=widths)}"


def change(key: str, before: float | None, after: float | None) -> str:
    """In points for shares of samples, else relative; "" where a number lacks or begins at 0."""
    if before is None or after is None:
        return ""
    if "pass@" in key or key in ("computing", "truncated", "no_delimiter"):
        return f"{100 * (after - before):+.1f} pts"
    return f"{(after - before) / before:+.0%}" if before else ""


def headline(name: str, measures: dict[str, dict]) -> str:
    """What is known of an arm first, in a line."""
    shares = [key for key in measures if key.startswith("pass@") or key == "computing"]
    parts = [f"{key} {100 * measures[key]['value']:.1f}%" for key in shares]
    return f"{name}: {', '.join(parts)}, {measures['tokens']['value']:.1f} tokens per trace"


def reliance_rows(arms: dict[str, dict[str, dict]]) -> list[Line]:
    """How far each arm relies on its reasoning; arms: name -> measures."""
    same = {f"same answer at {share:.0%}": f"  same answer at {share:.0%} of it"
            for share in FRACTIONS[:-1]}  # fmt: skip
    return [
        (label, [cell(measures.get(key)) for measures in arms.values()])
        for key, label in (RELIANCE | same).items()
    ]


def reliance_table(arms: dict[str, dict[str, dict]]) -> str:
    return columns_of(reliance_rows(arms), list(arms), "reliance on the reasoning")


def map_rows(name: str, measures: dict[str, dict]) -> tuple[str, list[str], list[Line], str]:
    """Whether each ranking of an arm is right: title, heads, lines, a note on masks and areas.

    Without a correct trace only the title is not empty.
    """
    rankings = [key.partition("/")[2] for key in measures if key.startswith("comprehensiveness/")]
    if not rankings:
        return f"{name}: no correct trace, so no map to test", [], [], ""
    traces = measures[f"comprehensiveness/{rankings[0]}"]["questions"]
    tests = [test for test in MAP_HEADS if any(key.startswith(f"{test}/") for key in measures)]
    lines = [(name, [cell(measures.get(f"{test}/{name}")) for test in tests]) for name in rankings]
    unknown, notes = measures.get("unlabelled", {}).get("value"), []
    if share := measures.get("overshot", {}).get("value"):
        nats = measures["overshoot"]["value"] / share
        notes.append(overshoot_note(round(share * traces), traces, nats))
    if unknown is not None:
        notes.append(
            f"AUROC leaves out the {unknown:.1%} of characters that the parser does not know"
        )
    title = f"is the map right? {name}, {traces} traces"
    return title, [MAP_HEADS[test] for test in tests], lines, "; ".join(notes)


def overshoot_note(overshot: int, masks: int, nats: float) -> str:
    """How many learned masks went on below the unmasked loss, and how far these did (mean)."""
    by = f"by {nats:.3g} nats per answer token on average"
    return f"overshoot: {overshot} of {masks} masks ended below the unmasked loss, {by}"


def map_table(name: str, measures: dict[str, dict]) -> str:
    title, heads, lines, note = map_rows(name, measures)
    return f"{columns_of(lines, heads, title)}\n{note}".rstrip("\n") if lines else title


def main_changes(result: dict) -> str:
    """What a pair of arms (compare_arms' result) differs in, no stronger than the intervals say."""
    clauses = []
    for key in MAIN_CHANGES:
        if (measure := result["own"].get(key)) and measure["value"] is not None:
            scale, unit = (1, "") if key == "tokens" else (100, " points")
            value, low, high = (measure[name] for name in ("value", "low", "high"))
            verdict, ends = "not distinguishable", ""  # as of one question alone
            if low is not None:
                verdict = "higher" if low > 0 else "lower" if high < 0 else verdict
                ends = f" [{scale * low:+.1f}, {scale * high:+.1f}]"
            clauses.append(f"{CHANGES[key]} {verdict}, {scale * value:+.1f}{unit}{ends}")
    return "; ".join(clauses)


def difference_rows(result: dict) -> list[Line]:
    """A pair of arms, compare_arms' result."""
    own, matched = result["own"], result["matched"]["differences"]
    labels = {key: label.strip() for key, (label, _) in ROWS.items()} | RELIANCE
    for key in own:
        if key.endswith(("/mask", "/attribution")) and "%" not in key and "auroc" not in key:
            labels[key] = "map: " + key.replace("/", ", ")
    return [
        (label, [cell(own[key], "+"), cell(matched.get(key), "+"),
                 str(matched.get(key, {}).get("questions", "-"))])
        for key, label in labels.items() if key in own
    ]  # fmt: skip


def difference_table(before: str, after: str, result: dict, pipeline) -> str:
    words = f"numbers, stop words and symbols by spaCy, {describe_spacy(pipeline)}"
    table = columns_of(difference_rows(result), DIFFERENCE_HEADS, f"{after} - {before}")
    return f"paired by question; {words}\n{table}"
