"""The report of an evaluation: results.json -> report.html and the PNGs of its figures.

    python report.py DIR                         # again from DIR/results.json, nothing is run
    write_report(folder, results)                # what eval.py does in the end

report.html is one file without scripts that fetches nothing. It holds the tables; Figure 1, how a
mask comes about; Figure 2, accuracy and length over training; Figures 3 to 5, traces of the same
question coloured by part of speech, with their saliency; the tokens that matter most and least; one
trace of every question. figure1.png to figure5.png lie beside it.

All that it needs is in results.json (eval.py describes it), so the same file gives the same bytes.
Everything in there is untrusted: names, paths, questions, traces, spaCy's labels. In the page it
passes `heat.escape`; in a figure `drawable`, and never matplotlib's own markup ($ and _).
"""

import argparse
import base64
import functools
import html
import io
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import heat
from compare import (
    DIFFERENCE_HEADS,
    RELIANCE,
    difference_rows,
    first_correct,
    map_note,
    map_rows,
    map_title,
    reliance_rows,
)
from table1 import ROWS, WORD_KINDS, cell

SHOWN = 500  # traces on a page, over all arms
EXAMPLES = 3  # questions that Figures 3 to 5 show
FIGURES = [f"figure{n}.png" for n in range(1, 3 + EXAMPLES)]
COMMON = 5  # a token is ranked when it stands in this many traces, or in all of fewer
STRONGEST = 12  # tokens named at each end
LINES, COLUMNS = 30, 46  # of a trace in a PNG


# ------------------------------------------------------------------- what is shown, and from where


def shown_records(records: list[dict], arms: int) -> list[dict]:
    """One sample a question, the first correct one, else the first: SHOWN over so many arms."""
    first: dict[str, dict] = {}
    for record in records:
        first.setdefault(record["id"], record)
    correct = set(first_correct(records))
    for record in records:
        if (record["id"], record["sample"]) in correct:
            first[record["id"]] = record
    return list(first.values())[: max(1, SHOWN // max(1, arms))]


def examples(records: dict[str, list[dict]]) -> list[str]:
    """The questions of Figures 1 and 3 to 5, by a rule, so that nobody picks them.

    The first ones in order that most arms (name -> records) answer right, those apart to which all
    arms write the same.
    """
    sides = [{r["id"]: r for r in shown_records(rows, len(records))} for rows in records.values()]
    if not sides:
        return []

    def rank(problem):
        found = [side[problem] for side in sides if problem in side]
        alike = len(sides) > 1 and len({r["text"] for r in found}) == 1
        return -sum(r["correct"] for r in found), alike

    return sorted(sides[0], key=rank)[:EXAMPLES]  # sorted keeps the order of equals


def read_run(checkpoint) -> dict | None:
    """The training run that a checkpoint is of: one or two folders up is its metrics.jsonl.

    folder; commands: what was typed, a line per start; config: config.json's settings; evals:
    [update, pass@1, tokens per trace, problems] of held-out problems (an older results.json has no
    fourth); updates: [update, mean outcome, mean reasoning tokens] of rollouts. What is no number
    is left out. None where there is no metrics.jsonl.
    """
    ups = (Path(checkpoint) / "..", Path(checkpoint) / "../..")
    folder = next((up for up in ups if (up / "metrics.jsonl").is_file()), ups[0])
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    evals, updates = {}, {}  # by update: a resumed run may write one again
    for line in map(parse, lines):
        step, found = line.get("step"), line.get("eval")
        if not is_number(step):
            continue
        if isinstance(found, dict):
            size = [found["problems"]] if "problems" in found else []
            evals[step] = [step, found.get("pass@1"), found.get("tokens"), *size]
        elif "outcome" in line:
            updates[step] = [step, line["outcome"], line.get("length")]
    try:
        config = parse((folder / "config.json").read_bytes())
    except OSError:
        config = {}
    try:
        commands = (folder / "commands.txt").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        commands = []
    return {
        "folder": os.path.normpath(folder),
        "commands": commands,
        "config": config,
        "evals": [row for row in evals.values() if all(map(is_number, row))],
        "updates": [row for row in updates.values() if all(map(is_number, row))],
    }


def evals_by_size(run: dict) -> tuple[list[list], list[list]]:
    """A run's evals, in order: those of as many problems as its largest, and those of fewer.

    One that does not name its number of problems counts as large.
    """
    evals = sorted(run["evals"])
    largest = max((row[3] for row in evals if len(row) > 3), default=0)
    return (
        [row for row in evals if len(row) < 4 or row[3] == largest],
        [row for row in evals if len(row) > 3 and row[3] < largest],
    )


def parse(line: bytes) -> dict:
    """A JSON object; {} for what is none, such as a line that is being written."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def what_it_is(run: dict | None) -> str:
    """An arm in a few words."""
    if not run:
        return "as it is: no metrics.jsonl beside it, so no training run is known"
    config, part = run["config"], part_of(run)
    if part is None:
        return "trained; its config.json names no saliency"
    if part == "baseline":
        return "baseline: trained with the outcome reward only"
    saliency = f"{config['saliency']} saliency"
    if config["saliency"] == "length":
        saliency = "a length penalty"
    elif config.get("shuffle_saliency"):
        saliency = f"shuffled {saliency}"
    return f"{part}: trained with outcome and {saliency}, weight {config.get('saliency_weight')}"


def part_of(run: dict | None) -> str | None:
    """An arm's part in a comparison; None where its training, or its saliency, is not known."""
    config = (run or {}).get("config") or {}
    saliency = config.get("saliency")
    if saliency is None:
        return None
    if saliency == "none":
        return "baseline"
    return "control" if saliency == "length" or config.get("shuffle_saliency") else "AtManRL"


def train_command(config: dict) -> str:
    """The settings of a run as the flags of train.py."""
    parts = ["python", "train.py"]
    for name, value in config.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            parts += [f"--{flag}", str(value)]
    return shlex.join(parts)


def heat_map(label: str, record: dict, trace: dict, scores: list[float], kind: str) -> heat.HeatMap:
    """A trace of results.json as heat.py takes it."""
    special = set(trace["special"])
    tokens = [heat.Piece(0, text, n in special) for n, text in enumerate(trace["tokens"])]
    known = len(scores) == len(tokens)
    return heat.HeatMap(
        label, record["question"], kind, [], tokens, [], [], [], "", scores if known else [], {},
        [], []
    )  # fmt: skip


def known(values: list[float | None]) -> list[float]:
    """Numbers as they were before JSON, which has none that is not finite."""
    return [math.nan if value is None else value for value in values]


def tested_traces(entry: dict, kind: str) -> list[tuple[list[str], list[float]]]:
    """(tokens, their saliency) of each trace shown whose map was tested."""
    scores = {(row["id"], row["sample"]): known(row["scores"][kind]) for row in entry["map"]}
    found = [
        (trace["tokens"], scores.get((trace["id"], trace["sample"]), []))
        for trace in entry.get("traces", [])
    ]
    return [(tokens, values) for tokens, values in found if values and len(values) == len(tokens)]


def token_means(entry: dict, kind: str) -> list[tuple[float, int, str]]:
    """(mean saliency, traces it is in, token) of all tested traces shown, most first."""
    tested = tested_traces(entry, kind)
    found: dict[str, list[float]] = {}
    traces: dict[str, int] = {}
    for tokens, values in tested:
        for text, value in zip(tokens, values, strict=True):
            found.setdefault(text, []).append(value)
        for text in set(tokens):
            traces[text] = traces.get(text, 0) + 1
    least = min(COMMON, len(tested))
    rows = [
        (statistics.fmean(values), traces[text], text)
        for text, values in found.items()
        if traces[text] >= least and all(map(math.isfinite, values))
    ]
    return sorted(rows, key=lambda row: (-row[0], row[2]))


# ---------------------------------------------------------------------------------------- figures

# Okabe and Ito's colours (their yellow darker, for a white ground), told apart in all common colour
# blindness; an arm has a marker and a kind of line of its own as well.
ARM_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#000000"]
ARM_MARKERS = "osD^vP*"
ARM_LINES = ["-", "--", "-.", ":"]
# Backgrounds of WORD_KINDS, on light and on dark pages; each kind has a second mark of its own.
WORD_LIGHT = {"number": "#9dcbf7", "symbol": "#fbb967", "stop word": "#d8dade"}
WORD_DARK = {"number": "#1f5fae", "symbol": "#8a4700", "stop word": "#474b54"}
WORD_CSS = {
    "number": "font-weight:700",
    "symbol": "text-decoration:underline",
    "stop word": "font-style:italic",
    "punctuation": "outline:1px dotted;outline-offset:-1px",
}
WORD_CLASS = {"number": "wn", "symbol": "wy", "stop word": "ws", "punctuation": "wp", "other": ""}


@functools.cache
def plotting():
    """pyplot, without a screen; slow to import, so only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


@functools.cache
def glyphs(family: str) -> frozenset[int]:
    """Characters that a font of matplotlib's can draw."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())


def drawable(text: str, family: str = "DejaVu Sans") -> str:
    """Text as a figure shows it: what acts, has no glyph or runs to the left goes by its name."""
    known = glyphs(family)

    def plain(character):
        left = unicodedata.bidirectional(character) in ("R", "AL", "AN")
        return character == "\n" or (ord(character) in known and not left)

    return "".join(c if plain(c) else f"‹U+{ord(c):04X}›" for c in heat.visible(text))


def short(label: str, length: int = 40) -> str:
    """One line of a figure: the end of a long name, which tells paths apart."""
    text = drawable(label).replace("\n", "")
    return text if len(text) <= length else f"{text[:4]}…{text[5 - length :]}"


def as_png(figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plotting().close(figure)
    return buffer.getvalue()


def own_style(draw):
    """Draws with matplotlib's defaults, whatever a user's own are, and reads no markup."""

    @functools.wraps(draw)
    def wrapped(*arguments):
        style = {"text.parse_math": False, "font.family": ["DejaVu Sans"], "text.usetex": False}
        with plotting().rc_context():
            plotting().rcdefaults()
            plotting().rcParams.update(style)
            return draw(*arguments)

    return wrapped


@own_style
def draw_masks(masks: dict[str, dict], wide: bool) -> bytes:
    """Figure 1: of each arm (label -> eval.follow_mask's row) three masks and the probability."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list(
        "heat", ["#a04a00", heat.LIGHT["orange"], "#ffffff", heat.LIGHT["blue"], "#0b3c74"]
    ).with_extremes(bad="#d9d9d9")
    shares = {}  # of the suppression removed
    for label, row in masks.items():
        start = row["masks"][0][0][0]
        values = [[[math.nan if v is None else 1 - v / start for v in line] for line in mask]
                  for mask in row["masks"]]  # fmt: skip
        shares[label] = values
    flat = [v for values in shares.values() for mask in values for line in mask for v in line]
    limit = max((abs(v) for v in flat if math.isfinite(v)), default=0) or 1
    size = (11.5, 3 * len(masks)) if wide else (4.3, 4.6 * len(masks))
    figure = plotting().figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(masks), 1, squeeze=False)[:, 0]
    for part, (label, row) in zip(parts, masks.items(), strict=True):
        part.suptitle(short(label, 60 if wide else 34), fontsize=10, weight="bold")
        axes = part.subplots(*((1, 4) if wide else (2, 2))).flatten()
        rows, columns = row["size"]
        for place, (one, steps, values) in enumerate(
            zip(axes, row["steps"], shares[label], strict=False)
        ):
            drawn = one.imshow(
                values, cmap=colours, vmin=-limit, vmax=limit, extent=(0, columns, rows, 0),
                aspect="auto", interpolation="nearest",
            )  # fmt: skip
            one.set_title("at c" if place == 0 else f"after {steps} steps", fontsize=9)
            one.set_xlabel("reasoning token", fontsize=8)
            if place == 0 or not wide:
                one.set_ylabel("seen from row", fontsize=8)
        where = {"ax": axes[2]} if wide else {"ax": list(axes[2:]), "location": "bottom"}
        bar = part.colorbar(drawn, **where, shrink=0.9)
        bar.set_label("suppression removed", fontsize=8)
        if wide:  # on the other side it would seem to be the curve's
            bar.ax.yaxis.set_label_position("left")
        curve = axes[3]
        chances = known(row["probability"])
        curve.plot(chances, color=ARM_COLOURS[0])
        for place, steps in enumerate(row["steps"]):
            curve.plot([steps], [chances[steps]], ARM_MARKERS[place], color="#000000")
        curve.set(ylim=(-0.03, 1.03))
        curve.set_title("probability of the answer" if wide else "P(answer)", fontsize=9)
        curve.set_xlabel("step of the mask", fontsize=8)
        curve.grid(alpha=0.3)
        for one in axes:
            one.tick_params(labelsize=8)
        bar.ax.tick_params(labelsize=8)
    return as_png(figure, 110 if wide else 180)


@own_style
def draw_history(runs: dict[str, dict | None], wide: bool) -> bytes:
    """Figure 2: accuracy and mean length over the updates, the arms (label -> run) overlaid."""
    figure, axes = plotting().subplots(
        *((1, 2) if wide else (2, 1)), figsize=(10.5, 4.2) if wide else (4.3, 7.0),
        layout="constrained",
    )  # fmt: skip
    lines = []
    for n, (label, run) in enumerate(runs.items()):
        if not run or not (run["evals"] or run["updates"]):
            continue
        look = {"color": ARM_COLOURS[n % len(ARM_COLOURS)], "ls": ARM_LINES[n % len(ARM_LINES)]}
        mark = ARM_MARKERS[n % len(ARM_MARKERS)]
        lines.append(plotting().Line2D([], [], marker=mark, **look))
        lines[-1].set_label(short(label, 48 if wide else 34))
        for axis, column, shift in zip(axes, (1, 2), (1, 0), strict=True):
            # A rollout's outcome is 0 or -1, so 1 more is its accuracy.
            steps = [(row[0], row[column] + shift) for row in sorted(run["updates"])]
            large, small = ([(row[0], row[column]) for row in rows] for rows in evals_by_size(run))
            if steps:
                axis.plot(*zip(*steps, strict=True), alpha=0.55, lw=1.2, **look)
            if large:
                axis.plot(*zip(*large, strict=True), marker=mark, ms=7, lw=2, **look)
            if small:  # a line to these would join accuracies of different problems
                hollow = look | {"ls": "", "mfc": "white"}
                axis.plot(*zip(*small, strict=True), marker=mark, ms=7, **hollow)
    for axis, title in zip(axes, ("accuracy", "mean reasoning length (tokens)"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update", fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=9)
    axes[0].set_ylim(-0.02, 1.02)
    axes[1].set_ylim(bottom=0)
    figure.legend(handles=lines, loc="outside lower center", fontsize=9, frameon=False)
    return as_png(figure, 110 if wide else 180)


@own_style
def draw_traces(question: str, sides: list[tuple[str, str, list]]) -> bytes:
    """Figures 3 to 5 as a PNG: (label, text, words) of each arm, coloured by part of speech."""
    font, size, wide, high = "DejaVu Sans Mono", 9, 5.42, 15  # points: a column, a line
    across = min(3, max(1, len(sides)))
    width = across * (COLUMNS + 3)
    columns = []

    def folded(runs, room, limit):
        lines = heat.fold([(drawable(text, font), style) for text, style in runs], room)
        left = len(lines) - limit
        rest = heat.fold([(f"… lines left out: {left}", "other")], room) if left > 0 else []
        return lines[:limit] + rest

    head = folded([(question, "other")], width - 3, 8)
    top = len(head) + 3  # question, a gap, the key
    for start in range(0, len(sides), across):
        row = [
            folded([(label, "bold")], COLUMNS, 3) + folded(runs_of(text, words), COLUMNS,
                                                                  LINES)
            for label, text, words in sides[start : start + across]
        ]  # fmt: skip
        columns += [(place * (COLUMNS + 3), top, lines) for place, lines in enumerate(row)]
        top += max(map(len, row)) + 1
    key = list(itertools.chain.from_iterable(((k, k), ("  ", "other")) for k in WORD_KINDS))
    columns += [(0, 0, head), (0, len(head) + 1, heat.fold(key, width))]
    figure = plotting().figure(figsize=((width * wide + 20) / 72, (top * high + 20) / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-10, width * wide + 10), ylim=(top * high + 10, -10))
    axes.set_axis_off()
    for left, first, lines in columns:
        for n, line in enumerate(lines):
            x, y = left * wide, (first + n) * high
            for style, cells in itertools.groupby(line, key=lambda one: one.style):
                cells = list(cells)
                across_run = sum(one.width for one in cells) * wide
                if style in WORD_LIGHT:
                    place = (x, y + 1), across_run, high - 2
                    axes.add_patch(plotting().Rectangle(*place, color=WORD_LIGHT[style], lw=0))
                weight = "bold" if style in ("number", "bold") else "normal"
                slant = "italic" if style == "stop word" else "normal"
                axes.text(x, y + high - 4, "".join(one.character for one in cells), fontsize=size,
                          family=font, weight=weight, style=slant, color="#16181d")  # fmt: skip
                x += across_run
    return as_png(figure, 130)


def runs_of(text: str, words: list[list]) -> list[tuple[str, str]]:
    """The text as stretches of one kind of word each; white space is `other`."""
    runs, place = [], 0
    for start, end, kind, *_ in words:
        runs += [(text[place:start], "other"), (text[start:end], kind)]
        place = end
    return [run for run in [*runs, (text[place:], "other")] if run[0]]


def curves(history: list[dict], path: Path) -> None:
    """Learning curves as a PNG: accuracy and pass@4, reasoning length, and the three rewards.

    history: metrics.jsonl's lines; `eval` entries hold a summary, others a step's rewards.
    """
    plt = plotting()
    evals = [line for line in history if "eval" in line]
    steps = [line for line in history if "outcome" in line]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for key in ("pass@1", "pass@4"):
        points = [(line["step"], line["eval"][key]) for line in evals if key in line["eval"]]
        left.plot(*zip(*points, strict=True), marker="o", label=key)
    left.set(title="held-out accuracy", xlabel="update", ylim=(0, 1.02))
    middle.plot([e["step"] for e in evals], [e["eval"]["tokens"] for e in evals], marker="o",
                label="held-out")  # fmt: skip
    middle.plot(
        [s["step"] for s in steps], [s["length"] for s in steps], alpha=0.6, label="rollouts"
    )
    middle.set(title="mean reasoning length (tokens)", xlabel="update")
    middle.set_ylim(bottom=0)
    for key in ("outcome", "saliency", "reward"):
        right.plot([s["step"] for s in steps], [s[key] for s in steps], label=key)
    right.set(title="mean reward of the rollouts", xlabel="update")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------- the page

STYLE = f"""{heat.STYLE}
.part>h2{{font-size:1.25rem;margin:2.2rem 0 .6rem;border-bottom:2px solid}}
.part{{scroll-margin-top:1rem}}nav{{display:flex;flex-wrap:wrap;gap:.2rem 1rem}}a{{color:inherit}}
.scroll{{overflow-x:auto;width:fit-content;max-width:100%;border:1px solid;
border-radius:.3rem;margin:.4rem 0}}
.scroll td{{white-space:nowrap;font-variant-numeric:tabular-nums}}
.scroll th,.scroll td{{padding:.15rem .6rem;min-width:5rem}}
.scroll tbody tr>*{{border-top:1px solid #8886}}
.scroll thead th{{font-weight:600;min-width:9rem;max-width:18rem}}
.scroll tbody th{{position:sticky;inset-inline-start:0;background:var(--page);min-width:8.5rem;
max-width:22rem}}
.scroll .long{{white-space:normal;min-width:14rem}}
.text{{overflow:auto;max-height:34rem}}pre{{white-space:pre-wrap;margin:.3rem 0;font:.85em/1.5
ui-monospace,monospace}}
picture{{display:block}}img{{display:block;width:100%;max-width:72rem;height:auto;background:#fff;
border:1px solid #888;border-radius:.3rem}}
.four{{display:grid;gap:0 1.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,16.5rem),1fr))}}
.key span{{padding:0 .25rem;border-radius:.15rem}}
summary{{padding:.35rem 0}}
{"".join(f".{WORD_CLASS[kind]}{{{css}}}" for kind, css in WORD_CSS.items())}
{"".join(f".{WORD_CLASS[kind]}{{background:{c}}}" for kind, c in WORD_LIGHT.items())}
@media(prefers-color-scheme:dark){{{
    "".join(f".{WORD_CLASS[kind]}{{background:{c}}}" for kind, c in WORD_DARK.items())
}}}
@media(max-width:30rem){{body{{padding:.6rem}}.scroll tbody th{{min-width:7rem;max-width:7.5rem}}
.scroll th,.scroll td{{padding:.15rem .4rem}}}}
@media print{{.text{{max-height:none}}}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def write_report(folder, results: dict) -> Path:
    """report.html and its figures' PNGs in the folder; the page's path."""
    folder = Path(folder)
    figures = draw(results)
    for n, name in enumerate(FIGURES, 1):
        path = folder / name
        if n in figures:
            write_whole(path, figures[n][0])
        else:
            path.unlink(missing_ok=True)  # of other results
    path = folder / "report.html"
    write_whole(path, page(results, figures).encode())
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)


def labels(results: dict) -> dict[str, str]:
    """Each arm's name with its number, which is short where the name is long, and its part."""
    found = {}
    for n, (name, entry) in enumerate(results["models"].items(), 1):
        part = part_of(entry.get("run"))
        found[name] = f"{n}. {name}" + (f" ({part})" if part else "")
    return found


def draw(results: dict) -> dict[int, tuple[bytes, bytes | None]]:
    """Figure's number -> its PNG, and for Figures 1 and 2 one for narrow screens."""
    models, named = results["models"], labels(results)
    figures: dict[int, tuple[bytes, bytes | None]] = {}
    masks = {named[name]: entry["mask"] for name, entry in models.items() if entry.get("mask")}
    if masks:
        figures[1] = draw_masks(masks, True), draw_masks(masks, False)
    runs = {named[name]: entry.get("run") for name, entry in models.items()}
    if any(run and (run["evals"] or run["updates"]) for run in runs.values()):
        figures[2] = draw_history(runs, True), draw_history(runs, False)
    shown = collect(results)
    for n, problem in enumerate(example_questions(results, shown), 3):
        sides = [(one.label, one.record["text"], one.trace["words"]) for one in shown[problem]]
        figures[n] = draw_traces(shown[problem][0].record["question"], sides), None
    return figures


class Shown(NamedTuple):
    """A trace that the page shows: its arm's label, its record, tokens and words, its map."""

    label: str
    record: dict
    trace: dict
    scores: dict[str, list[float]]


def collect(results: dict) -> dict[str, list[Shown]]:
    """The traces of results.json by question, in order."""
    named, found = labels(results), {}
    for name, entry in results["models"].items():
        records = {(r["id"], r["sample"]): r for r in entry["records"]}
        scores = {
            (row["id"], row["sample"]): {kind: known(v) for kind, v in row["scores"].items()}
            for row in entry.get("map", [])
        }
        for trace in entry.get("traces", []):
            key = (trace["id"], trace["sample"])
            one = Shown(named[name], records[key], trace, scores.get(key, {}))
            found.setdefault(trace["id"], []).append(one)
    return found


def example_questions(results: dict, shown: dict) -> list[str]:
    """examples, where their traces are there."""
    records = {name: entry["records"] for name, entry in results["models"].items()}
    return [problem for problem in examples(records) if problem in shown]


def page(results: dict, figures: dict) -> str:
    """The whole page; figures: `draw`'s."""
    arguments = results.get("arguments", {})
    title = f"Evaluation: {arguments.get('dataset', '?')}, {arguments.get('split', '?')}"
    shown = collect(results)
    chosen = example_questions(results, shown)
    parts = {
        "arms": ("Arms, commands, settings", arms_part(results)),
        "table-1": ("Table 1", table1_part(results)),
        "reliance": ("Does the model rely on its reasoning?", reliance_part(results)),
        "map": ("Is the map right?", map_part(results)),
        "differences": ("Differences", differences_part(results)),
        "figure-1": ("Figure 1: a mask comes about", masks_part(results, figures)),
        "figure-2": ("Figure 2: over training", history_part(results, figures)),
        "figures-3-5": (
            "Figures 3 to 5: traces by part of speech, and their saliency",
            examples_part(results, shown, chosen),
        ),
        "tokens": ("Most and least salient tokens", tokens_part(results)),
        "traces": ("Traces", traces_part(results, shown, chosen)),
    }
    links = "".join(f'<a href="#{name}">{escape(head)}</a>' for name, (head, _) in parts.items())
    body = "".join(
        f'<section class="part" id="{name}"><h2>{escape(head)}</h2>\n{content}</section>\n'
        for name, (head, content) in parts.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1><nav>{links}</nav>\n{body}</body></html>\n"
    )


def escape(value) -> str:
    return heat.escape(str(value))


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(heads: list[str], rows: list[tuple[str, list[str]]], first="", wraps=False) -> str:
    """A table of untrusted text that scrolls in its own box; wraps: cells are long text."""
    if not rows:
        return "<p>(none)</p>"
    kind = ' class="long"' if wraps else ""
    top = "".join(f'<th scope="col"><bdi>{escape(head)}</bdi></th>' for head in heads)
    lines = "".join(
        f'<tr><th scope="row"><bdi>{escape(name.strip())}</bdi></th>'
        + "".join(f"<td{kind}><bdi>{escape(text)}</bdi></td>" for text in cells)
        + "</tr>"
        for name, cells in rows
    )
    head = f'<thead><tr><th scope="col">{escape(first)}</th>{top}</tr></thead>' if heads else ""
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{lines}</tbody></table></div>\n'


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>\n"


def settings(values: dict) -> str:
    """Names and values, which are shown as JSON writes them."""
    shown = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }
    return table([], [(str(name), [value]) for name, value in shown.items()], wraps=True)


def arms_part(results: dict) -> str:
    rows, configs = [], ""
    for name, label in labels(results).items():
        entry = results["models"][name]
        run = entry.get("run")
        folder = run["folder"] if run else "none"
        rows.append((label, [str(entry.get("checkpoint")), what_it_is(run), folder]))
        if run:
            command = f"<pre><bdi>{escape(train_command(run['config']))}</bdi></pre>"
            if typed := run.get("commands"):
                lines = "".join(f"<pre><bdi>{escape(line)}</bdi></pre>" for line in typed)
                command = f"{command}<p>What was typed:</p>{lines}"
            configs += details(
                f"{label}: the run's settings",
                f"<p>The settings in its config.json, as train.py takes them:</p>{command}"
                + settings(run["config"]),
            )
    return (
        f"<p>This page:</p><pre><bdi>{escape(results.get('command', 'unknown'))}</bdi></pre>"
        + table(["checkpoint", "what it is", "training run"], rows, "arm", wraps=True)
        + configs
        + details("settings of this evaluation", settings(results.get("arguments", {})))
        + details("versions", settings(results.get("versions", {}) | results.get("seeds", {})))
    )


def words_by(results: dict) -> str:
    return results.get("versions", {}).get("spacy_pipeline", "an unknown pipeline")


def table1_part(results: dict) -> str:
    models, named = results["models"], labels(results)
    rows = []
    for key, (label, share) in ROWS.items():
        if any(key in entry["summary"] for entry in models.values()):
            cells = []
            for entry in models.values():
                value = entry["summary"].get(key)
                found = cell(value, share, entry["measures"].get(key)) if is_number(value) else "-"
                cells.append(" ".join(filter(None, found)))
            rows.append((label, cells))
    sizes = [entry["summary"] for entry in models.values()]
    text = "{problems} problems x {samples} samples. ".format(**sizes[0]) if sizes else ""
    text += (
        "In brackets 95% intervals from a bootstrap over questions. Numbers, stop words and "
        f"symbols are shares of spaCy's tokens, by {words_by(results)}."
    )
    return paragraph(text) + table(list(named.values()), rows)


def measured(results: dict) -> dict[str, dict]:
    """Measures of each arm by its label, where faithfulness was measured."""
    found = {}
    for name, label in labels(results).items():
        entry = results["models"][name]
        if any(key in entry["measures"] for key in RELIANCE) or entry.get("map"):
            found[label] = entry["measures"]
    return found


UNMEASURED = "Not measured: --faithfulness off, or no trace with an answer."


def reliance_part(results: dict) -> str:
    found = measured(results)
    if not found:
        return paragraph(UNMEASURED)
    return paragraph(
        "Truncation: 1 minus the area under the curve of the same answer, from 0 to at most 0.9. "
        "Knockout: Jensen-Shannon divergence, at most 0.693 nats; reasoning hidden is high, and "
        "prompt hidden low, where the answer rests on the reasoning. Corruption: share of answers "
        "that follow a changed number. All valid samples."
    ) + table(list(found), reliance_rows(found))


def map_part(results: dict) -> str:
    found = measured(results)
    parts = [
        paragraph(
            "One correct trace a question. What the answer's probability loses without the tokens "
            "that a ranking puts first (comprehensiveness: high is right) and with these alone "
            "(sufficiency: low is right), mean over 1, 5, 10, 20 and 50%. A map earns its cost "
            "where it beats recency, is-number and random, which know nothing of the model."
        )
        if found
        else paragraph(UNMEASURED)
    ]
    for label, measures in found.items():
        heads, rows = map_rows(measures)
        parts.append(f"<h3><bdi>{escape(map_title(label, measures))}</bdi></h3>")
        parts.append(table(heads, rows, "ranking") if rows else "")
        parts.append(paragraph(map_note(measures)) if map_note(measures) else "")
    return "".join(parts)


def differences_part(results: dict) -> str:
    named, parts = labels(results), []
    if not results.get("pairs"):
        return paragraph("One arm alone: --compare adds others.")
    for pair in results["pairs"]:
        title = f"{named[pair['after']]} less {named[pair['before']]}"
        parts.append(f"<h3><bdi>{escape(title)}</bdi></h3>")
        parts.append(table(DIFFERENCE_HEADS, difference_rows(pair)))
    return paragraph(
        "Paired by question, with 95% intervals; shares as parts of 1. At matched length only the "
        "pairs of traces count that are about equally long. Numbers, stop words and symbols by "
        f"spaCy, {words_by(results)}."
    ) + "".join(parts)


def picture(figure: tuple[bytes, bytes | None], text: str) -> str:
    """A figure inside the page, in its form for narrow screens there; text: what it shows."""
    wide, narrow = ("data:image/png;base64," + base64.b64encode(png).decode() for png in figure)
    return (
        f'<picture><source media="(max-width:40rem)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{escape(text)}"></picture>\n'
    )


def masks_part(results: dict, figures: dict) -> str:
    if 1 not in figures:
        return paragraph("No mask: --faithfulness off, or no arm has a correct trace.")
    named, rows = labels(results), []
    for name, entry in results["models"].items():
        row = entry.get("mask")
        cells = ["-", "-", "-", "no correct trace"]
        if row:
            cells = [heat.probability(known(row["probability"])[steps]) for steps in row["steps"]]
            cells += [f"{row['id']}, sample {row['sample']}"]
        rows.append((named[name], cells))
    heads = ["at c", "half-way", "after the last step", "trace"]
    return (
        paragraph(
            "The additive mask of one correct trace. Every entry begins at c, which suppresses the "
            "reasoning; AdamW then moves the mask to make the gold answer likely again. White is "
            "as suppressed as at c, blue less, orange more; grey is no part of the mask. One scale "
            "for all of them. The curve is the probability of the whole answer, teacher forced; "
            "the table has it at the three masks shown."
        )
        + picture(figures[1], "Masks at c, half-way and after the last step, and the probability")
        + table(heads, rows, "arm")
    )


def history_part(results: dict, figures: dict) -> str:
    named = labels(results)
    without = [
        named[name] for name, entry in results["models"].items()
        if not (entry.get("run") and (entry["run"]["evals"] or entry["run"]["updates"]))
    ]  # fmt: skip
    absent = f"No training history (no metrics.jsonl beside the checkpoint): {', '.join(without)}."
    said = paragraph(absent) if without else ""
    if 2 not in figures:
        return said
    return (
        paragraph(
            "Held-out problems: marks. Rollouts, at the temperature of training and each update's "
            "own questions: thin lines." + hollow_marks(results)
        )
        + picture(figures[2], "Accuracy and mean reasoning length over the updates of training")
        + said
    )


def hollow_marks(results: dict) -> str:
    """What Figure 2's hollow marks are, with the numbers of problems of each arm that has some."""
    sizes = []
    for name, label in labels(results).items():
        large, small = evals_by_size(results["models"][name].get("run") or {"evals": []})
        if small:
            fewer = ", ".join(map(str, sorted({row[3] for row in small})))
            largest = max(row[3] for row in large if len(row) > 3)
            sizes.append(f"{label}: {fewer} in place of {largest}")
    if not sizes:
        return ""
    return (
        " Hollow marks are evaluations of fewer held-out problems than the others of the arm "
        f"({'; '.join(sizes)}); no line joins them."
    )


def word_legend(by: str) -> str:
    kinds = "".join(
        f'<span class="{WORD_CLASS[kind]}">{kind}</span> ' if WORD_CLASS[kind] else f"{kind} "
        for kind in WORD_KINDS
    )
    return (
        f'<p class="key">{kinds}</p><p>By spaCy: {escape(by)}. A word that is of two kinds has the '
        "first of them.</p>"
    )


def word_box(text: str, words: list[list]) -> str:
    """A trace coloured by part of speech, each line a paragraph with a direction of its own."""
    if not text:
        return '<div class="text">(none)</div>'
    lines, place = [""], 0

    def put(part, kind="other", name=""):
        attributes = f' class="{WORD_CLASS[kind]}"' if WORD_CLASS.get(kind) else ""
        attributes += f' title="{escape(name[:99])}"' if name else ""
        for n, line in enumerate(escape(part).split("\n")):
            lines.extend([""] if n else [])
            lines[-1] += f"<span{attributes}>{line}</span>" if attributes and line else line

    for start, end, kind, name in words:
        put(text[place:start])
        put(text[start:end], kind, name)
        place = end
    put(text[place:])
    if len(lines) > 1 and not lines[-1]:
        lines.pop()
    content = "".join(f'<p dir="auto">{line}</p>' for line in lines)
    return f'<div class="text">{content}</div>'


def verdict(record: dict) -> str:
    said = record["number"] if record["number"] is not None else "nothing"
    right = "right" if record["correct"] else "wrong"
    cut = ", cut at the limit" if record["truncated"] else ""
    none = ", no delimiter" if record["no_delimiter"] else ""
    length = len(record["reasoning"])
    return f"answers {said}: {right}{cut}{none}; sample {record['sample']}, {length} tokens"


def trace_part(one: Shown, whole: bool) -> str:
    """One arm's trace: words, saliency, and what is strongest. whole: nothing folded away."""
    parts = [f"<h3><bdi>{escape(one.label)}</bdi></h3>", paragraph(verdict(one.record))]
    parts.append(word_box(one.record["text"], one.trace["words"]))
    for kind in ("attribution", "mask"):
        heated = heat_map(one.label, one.record, one.trace, one.scores.get(kind, []), kind)
        if not heated.saliency:
            continue
        head = f"saliency: {kind}"
        content = heat.box(heated.reasoning, heated.saliency, kind)
        ranked = details(f"{kind}: sentences, equations, tokens", heat.ranked(heated))
        if kind == "attribution" or whole:
            parts.append(f"<h4>{head}</h4>{content}{ranked}")
        else:
            parts.append(details(head, content))
    if not one.scores:
        parts.append("<p>No saliency: only correct traces are tested.</p>")
    return f"<section>{''.join(parts)}</section>"


def question_part(sides: list[Shown], head: str, whole: bool = False) -> str:
    record = sides[0].record
    sections = "".join(trace_part(one, whole) for one in sides)
    return (
        f'<article><h4>{escape(head)}</h4><h2 dir="auto">{escape(record["question"])}</h2>'
        f"<p>gold answer: <bdi>{escape(record['gold'])}</bdi></p>"
        f'<div class="side">{sections}</div></article>\n'
    )


def examples_part(results: dict, shown: dict, chosen: list[str]) -> str:
    if not chosen:
        return paragraph("No trace to show.")
    said = (
        "The first questions that most arms answer right, those apart to which all arms write the "
        "same: picked by this rule, not by hand. Of each arm the first correct sample."
    )
    parts = [paragraph(said), word_legend(words_by(results))]
    if any(one.scores for problem in chosen for one in shown[problem]):
        parts += [heat.legend("attribution"), heat.legend("mask")]
    for n, problem in enumerate(chosen, 3):
        parts.append(question_part(shown[problem], f"Figure {n}: {problem}", whole=True))
    return "".join(parts)


def tokens_part(results: dict) -> str:
    parts = []
    for name, label in labels(results).items():
        entry, sides = results["models"][name], ""
        for kind in ("attribution", "mask"):
            found = token_means(entry, kind)
            most = [row for row in found if row[0] > 0][:STRONGEST]
            least = found[::-1][: min(STRONGEST, max(0, len(found) - len(most)))]
            for rows, head in ((most, "most"), (least, "least")):
                cells = [
                    (mean, f"<bdi>{token_name(text)}</bdi><small>in {traces} traces</small>")
                    for mean, traces, text in rows
                ]
                title = f"<h4>{kind}, {head} ({escape(heat.UNIT[kind])})</h4>"
                sides += f"<section>{title}{heat.value_table(cells, kind)}</section>" * bool(found)
        parts.append(f"<h3><bdi>{escape(label)}</bdi></h3>")
        if sides:
            tested = len(tested_traces(entry, "mask"))  # each has scores of both kinds
            least = min(COMMON, tested)
            parts.append(paragraph(f"Tokens in at least {least} of its {tested} tested traces."))
        parts.append(f'<div class="four">{sides}</div>' if sides else "<p>(no map)</p>")
    return paragraph(
        "Mean saliency of a token over the tested traces below. ␣ is a space, ⏎ a line break."
    ) + "".join(parts)


def token_name(text: str) -> str:
    """A token by itself, its spaces marked, as HTML."""
    return html.escape(heat.named(heat.Piece(0, text), "\u200c\u200d"), quote=True)


def traces_part(results: dict, shown: dict, chosen: list[str]) -> str:
    rest = [problem for problem in shown if problem not in chosen]
    every = {r["id"] for entry in results["models"].values() for r in entry["records"]}
    left = len(every) - len(shown)
    said = "Of each other question and arm the first correct sample, else the first."
    if left:
        said += f" {left} more questions are in results.json alone."
    if not rest:
        said = "No further trace."
    return paragraph(said) + "".join(question_part(shown[problem], problem) for problem in rest)


# ------------------------------------------------------------------------------------ the command


def read_results(folder: Path) -> dict:
    """DIR/results.json. ValueError with a sentence where there is none, or it is damaged."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_bytes())
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{path}: {why}; name the folder that eval.py wrote (--out)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}); run eval.py again") from None
    if not isinstance(results, dict) or not isinstance(results.get("models"), dict):
        raise ValueError(f"{path}: is not what eval.py writes: it has no models")
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write report.html and its figures again from DIR/results.json."
    )
    parser.add_argument("folder", metavar="DIR", help="the folder that eval.py wrote (its --out)")
    folder = Path(parser.parse_args(arguments).folder)
    try:
        results = read_results(folder)
        try:
            path = write_report(folder, results)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{folder / 'results.json'}: is not what this eval.py writes ({why})"
            ) from None
    except (ValueError, OSError) as error:
        sys.exit(heat.visible(f"error: {error}"))
    heat.say(f"wrote {heat.visible(str(path))}")


if __name__ == "__main__":
    main()
