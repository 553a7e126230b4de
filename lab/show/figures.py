"""Every PNG that the project draws: Figures 1 to 5 of a report, and the learning curves of a run.

    png = draw_history({"1. runs/a": run}, wide=True)
    curves(history, Path("runs/a/curves.png"))

Each figure is drawn with matplotlib's defaults, because a user's own settings would change it, and
without a screen. Names, questions and traces are untrusted: they pass `drawable`, and matplotlib
reads none of its own markup ($ and _) in them.
"""

import functools
import io
import itertools
import unicodedata
from pathlib import Path

import numpy as np

from lab.measure.table1 import WORD_KINDS
from lab.show.heat import LIGHT
from lab.show.text import fold, visible

# Okabe and Ito's colours (their yellow darker, for a white ground), told apart in all common colour
# blindness. An arm has a marker and a kind of line of its own as well.
ARM_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#000000"]
ARM_MARKERS = "osD^vP*"
ARM_LINES = ["-", "--", "-.", ":"]

DPI = {True: 110, False: 180}  # of a wide figure; of a narrow one, because phones have finer pixels
LINES, COLUMNS = 30, 46  # of a trace in Figures 3 to 5
GAP = 3  # columns between two traces
ACROSS = 3  # traces beside each other
FONT, FONT_SIZE = "DejaVu Sans Mono", 9
CELL_WIDTH, CELL_HEIGHT = 5.42, 15  # points that a character of this font takes
MARGIN = 10  # points around the text

# ------------------------------------------------------------------------------------- matplotlib


@functools.cache
def plotting():
    """pyplot without a screen. It is slow to import, so only a function that draws calls this."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def own_style(draw):
    """Have a function draw with matplotlib's defaults, not a user's own, and read no markup."""

    @functools.wraps(draw)
    def wrapped(*arguments, **options):
        style = {"text.parse_math": False, "font.family": ["DejaVu Sans"], "text.usetex": False}
        with plotting().rc_context():
            plotting().rcdefaults()
            plotting().rcParams.update(style)
            return draw(*arguments, **options)

    return wrapped


def as_png(figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plotting().close(figure)
    return buffer.getvalue()


@functools.cache
def glyphs(family: str) -> frozenset[int]:
    """Characters that a font of matplotlib's can draw."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())


def drawable(text: str, family: str = "DejaVu Sans") -> str:
    """The text as a figure shows it: a character without a glyph becomes its name.

    So does a character that is written from right to left, because matplotlib would not turn it.
    """
    with_glyph = glyphs(family)

    def plain(character):
        leftward = unicodedata.bidirectional(character) in ("R", "AL", "AN")
        return character == "\n" or (ord(character) in with_glyph and not leftward)

    return "".join(c if plain(c) else f"‹U+{ord(c):04X}›" for c in visible(text))


def short(label: str, length: int = 40) -> str:
    """One line of a figure: a long name keeps its end, because the end tells paths apart."""
    text = drawable(label).replace("\n", "")
    return text if len(text) <= length else f"{text[:4]}…{text[5 - length :]}"


# ---------------------------------------------------------------------------- Figure 1: the masks


@own_style
def draw_masks(masks: dict[str, dict], wide: bool) -> bytes:
    """Figure 1: of each arm (label -> arms.follow_mask's row) three masks and the probability."""
    removed = {}  # label -> shares of the suppression removed, one array a mask; nan is no entry
    for label, row in masks.items():
        start = row["masks"][0][0][0]
        removed[label] = [1 - np.array(mask, float) / start for mask in row["masks"]]
    limit = max(np.nanmax(np.abs(shares)) for arm in removed.values() for shares in arm) or 1
    size = (11.5, 3 * len(masks)) if wide else (4.3, 4.6 * len(masks))
    figure = plotting().figure(figsize=size, layout="constrained")
    panels = figure.subfigures(len(masks), 1, squeeze=False)[:, 0]
    for panel, (label, row) in zip(panels, masks.items(), strict=True):
        panel.suptitle(short(label, 60 if wide else 34), fontsize=10, weight="bold")
        axes = panel.subplots(*((1, 4) if wide else (2, 2))).flatten()
        draw_one_mask(panel, axes, row, removed[label], limit, wide)
        draw_probability(axes[3], row, wide)
        for axis in axes:
            axis.tick_params(labelsize=8)
    return as_png(figure, DPI[wide])


def draw_one_mask(panel, axes, row: dict, removed: list, limit: float, wide: bool) -> None:
    """An arm's mask at three steps, and the scale of its colours."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = "#a04a00", LIGHT["orange"], "#ffffff", LIGHT["blue"], "#0b3c74"
    colours = LinearSegmentedColormap.from_list("heat", ends).with_extremes(bad="#d9d9d9")
    rows, columns = row["size"]
    for n, (axis, steps, shares) in enumerate(zip(axes, row["steps"], removed, strict=False)):
        image = axis.imshow(
            shares, cmap=colours, vmin=-limit, vmax=limit, extent=(0, columns, rows, 0),
            aspect="auto", interpolation="nearest",
        )  # fmt: skip
        axis.set_title("at c" if n == 0 else f"after {steps} steps", fontsize=9)
        axis.set_xlabel("reasoning token", fontsize=8)
        if n == 0 or not wide:
            axis.set_ylabel("seen from row", fontsize=8)
    place = {"ax": axes[2]} if wide else {"ax": list(axes[2:]), "location": "bottom"}
    bar = panel.colorbar(image, **place, shrink=0.9)
    bar.set_label("suppression removed", fontsize=8)
    if wide:  # on the other side it would seem to be the curve's
        bar.ax.yaxis.set_label_position("left")
    bar.ax.tick_params(labelsize=8)


def draw_probability(axis, row: dict, wide: bool) -> None:
    """The probability of the answer over the steps of an arm's mask, the three shown marked."""
    chances = np.array(row["probability"], float)
    axis.plot(chances, color=ARM_COLOURS[0])
    for marker, steps in zip(ARM_MARKERS, row["steps"], strict=False):
        axis.plot([steps], [chances[steps]], marker, color="#000000")
    axis.set(ylim=(-0.03, 1.03))
    axis.set_title("probability of the answer" if wide else "P(answer)", fontsize=9)
    axis.set_xlabel("step of the mask", fontsize=8)
    axis.grid(alpha=0.3)


# --------------------------------------------------------------------------- Figure 2: the updates


def evals_by_size(run: dict) -> tuple[list[list], list[list]]:
    """A run's evals, in order: those of as many problems as its largest, and those of fewer.

    An eval that does not name its number of problems counts as large.
    """
    evals = sorted(run["evals"])
    largest = max((row[3] for row in evals if len(row) > 3), default=0)
    return (
        [row for row in evals if len(row) < 4 or row[3] == largest],
        [row for row in evals if len(row) > 3 and row[3] < largest],
    )


@own_style
def draw_history(runs: dict[str, dict | None], wide: bool) -> bytes:
    """Figure 2: accuracy and mean length over the updates, the arms (label -> run) overlaid."""
    shape, size = ((1, 2), (10.5, 4.2)) if wide else ((2, 1), (4.3, 7.0))
    figure, axes = plotting().subplots(*shape, figsize=size, layout="constrained")
    legend = []
    for n, (label, run) in enumerate(runs.items()):
        if not run or not (run["evals"] or run["updates"]):
            continue
        look = {"color": ARM_COLOURS[n % len(ARM_COLOURS)], "ls": ARM_LINES[n % len(ARM_LINES)]}
        marker = ARM_MARKERS[n % len(ARM_MARKERS)]
        legend.append(plotting().Line2D([], [], marker=marker, **look))
        legend[-1].set_label(short(label, 48 if wide else 34))
        for axis, column, shift in zip(axes, (1, 2), (1, 0), strict=True):
            # A rollout's outcome is 0 or -1, so 1 more is its accuracy.
            updates = [(row[0], row[column] + shift) for row in sorted(run["updates"])]
            large, small = ([(row[0], row[column]) for row in rows] for rows in evals_by_size(run))
            if updates:
                axis.plot(*zip(*updates, strict=True), alpha=0.55, lw=1.2, **look)
            if large:
                axis.plot(*zip(*large, strict=True), marker=marker, ms=7, lw=2, **look)
            if small:  # a line to these would join accuracies of different problems
                hollow = look | {"ls": "", "mfc": "white"}
                axis.plot(*zip(*small, strict=True), marker=marker, ms=7, **hollow)
    for axis, title in zip(axes, ("accuracy", "mean reasoning length (tokens)"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update", fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=9)
    axes[0].set_ylim(-0.02, 1.02)
    axes[1].set_ylim(bottom=0)
    figure.legend(handles=legend, loc="outside lower center", fontsize=9, frameon=False)
    return as_png(figure, DPI[wide])


@own_style
def curves(history: list[dict], path: Path) -> None:
    """Learning curves as a PNG: accuracy and pass@4, reasoning length, and the three rewards.

    history: metrics.jsonl's lines; `eval` entries hold a summary, others a step's rewards.
    """
    evals = [line for line in history if "eval" in line]
    updates = [line for line in history if "outcome" in line]
    steps = [line["step"] for line in updates]
    figure, axes = plotting().subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    accuracy, length, rewards = axes
    for key in ("pass@1", "pass@4"):
        points = [(line["step"], line["eval"][key]) for line in evals if key in line["eval"]]
        accuracy.plot(*zip(*points, strict=True), marker="o", label=key)
    accuracy.set(title="held-out accuracy", xlabel="update", ylim=(0, 1.02))
    points = [(line["step"], line["eval"]["tokens"]) for line in evals]
    length.plot(*zip(*points, strict=True), marker="o", label="held-out")
    length.plot(steps, [line["length"] for line in updates], alpha=0.6, label="rollouts")
    length.set(title="mean reasoning length (tokens)", xlabel="update")
    length.set_ylim(bottom=0)
    for key in ("outcome", "saliency", "reward"):
        rewards.plot(steps, [line[key] for line in updates], label=key)
    rewards.set(title="mean reward of the rollouts", xlabel="update")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    Path(path).write_bytes(as_png(figure))


# ------------------------------------------------------------------------ Figures 3 to 5: the words


@own_style
def draw_traces(question: str, sides: list[tuple[str, str, list]]) -> bytes:
    """Figures 3 to 5: (label, text, words) of each arm, coloured by part of speech."""
    across = min(ACROSS, max(1, len(sides)))
    width = across * (COLUMNS + GAP)  # columns of the figure
    head = folded([(question, "other")], width - GAP, 8)
    key = [run for kind in WORD_KINDS for run in ((kind, kind), ("  ", "other"))]
    blocks = [(0, 0, head), (0, len(head) + 1, fold(key, width))]  # column, line, lines of cells
    top = len(head) + 3  # below the question, a gap and the key
    for start in range(0, len(sides), across):
        beside = [
            folded([(label, "bold")], COLUMNS, 3) + folded(runs_of(text, words), COLUMNS, LINES)
            for label, text, words in sides[start : start + across]
        ]
        blocks += [(n * (COLUMNS + GAP), top, lines) for n, lines in enumerate(beside)]
        top += max(map(len, beside)) + 1
    points = width * CELL_WIDTH + 2 * MARGIN, top * CELL_HEIGHT + 2 * MARGIN
    figure = plotting().figure(figsize=(points[0] / 72, points[1] / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-MARGIN, points[0] - MARGIN), ylim=(points[1] - MARGIN, -MARGIN))
    axes.set_axis_off()
    for column, first, lines in blocks:
        for n, line in enumerate(lines, first):
            draw_line(axes, column * CELL_WIDTH, n * CELL_HEIGHT, line)
    return as_png(figure, 130)


def folded(runs: list[tuple[str, str]], width: int, limit: int) -> list[list]:
    """Runs of text as lines of cells, `limit` of them; one more says how many are left out."""
    lines = fold([(drawable(text, FONT), style) for text, style in runs], width)
    left_out = len(lines) - limit
    more = fold([(f"… lines left out: {left_out}", "other")], width) if left_out > 0 else []
    return lines[:limit] + more


def runs_of(text: str, words: list[list]) -> list[tuple[str, str]]:
    """The text as stretches of one kind of word each; white space is `other`."""
    runs, position = [], 0
    for start, end, kind, *_ in words:
        runs += [(text[position:start], "other"), (text[start:end], kind)]
        position = end
    return [run for run in [*runs, (text[position:], "other")] if run[0]]


def draw_line(axes, x: float, y: float, line: list) -> None:
    """One line of cells, each stretch of one kind of word on its colour."""
    for kind, stretch in itertools.groupby(line, key=lambda cell: cell.style):
        cells = list(stretch)
        width = sum(cell.width for cell in cells) * CELL_WIDTH
        if kind in LIGHT:
            place = (x, y + 1), width, CELL_HEIGHT - 2
            axes.add_patch(plotting().Rectangle(*place, color=LIGHT[kind], lw=0))
        axes.text(
            x, y + CELL_HEIGHT - 4, "".join(cell.character for cell in cells), fontsize=FONT_SIZE,
            family=FONT, weight="bold" if kind in ("number", "bold") else "normal",
            style="italic" if kind == "stop word" else "normal", color=LIGHT["ink"],
        )  # fmt: skip
        x += width
