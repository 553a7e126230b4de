"""Every PNG that the project draws: a report's differences and Figures 1 to 5, a run's curves.

    png = draw_history({"1. runs/a": run}, wide=True)
    curves(history, Path("runs/a/curves.png"))

Each figure is drawn with matplotlib's defaults, because a user's own settings would change it, and
without a screen. One that cannot be drawn is said and is None: a picture never ends the work that
it shows. Names, questions and traces are untrusted: they pass `drawable`, and matplotlib reads none
of its own markup ($ and _) in them.
"""

import functools
import io
import itertools
import os
import sys
from pathlib import Path

import numpy as np

from data.files import write_file
from lab.measure.table1 import WORD_KINDS
from lab.show.heat import LIGHT
from lab.show.tables import CHANGES
from lab.show.text import fold, is_right_to_left, visible

# Okabe and Ito's colours (their yellow darker, for a white ground), told apart in all common colour
# blindness. An arm has a marker and a kind of line of its own as well.
ARM_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#000000"]
ARM_MARKERS = "osD^vP*"
ARM_LINES = ["-", "--", "-.", ":"]

DPI = {True: 110, False: 180}  # of a wide figure; of a narrow one, because phones have finer pixels
LINES, COLUMNS, GAP = 30, 46, 3  # of a trace in Figures 3 to 5, and columns between two traces
ACROSS = 3  # traces beside each other
FONT, FONT_SIZE = "DejaVu Sans Mono", 9
CELL_WIDTH, CELL_HEIGHT, MARGIN = 5.42, 15, 10  # points: of this font's characters, around the text


def own_style(draw):
    """Have a function draw with matplotlib's defaults, not a user's own, and read no markup.

    It returns None, after a sentence, where that fails.
    """

    @functools.wraps(draw)
    def wrapped(*arguments):
        os.environ["MPLBACKEND"] = "agg"  # read at import, which a notebook's may end
        try:
            import matplotlib  # here, because it is slow to import and most commands draw nothing

            with matplotlib.rc_context():
                matplotlib.rcdefaults()
                style = {"text.parse_math": False, "font.family": ["DejaVu Sans"]}
                matplotlib.rcParams.update(style)
                return draw(*arguments)
        except Exception as error:  # of matplotlib, its fonts, the user's settings, the disk
            reason = f"{type(error).__name__}: {visible(str(error))}"
            print(f"note: {draw.__name__} has drawn no figure ({reason})", file=sys.stderr)

    return wrapped


def new_figure(width: float, height: float, layout: str | None = "constrained"):
    """A figure that needs no screen, in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout=layout)


def as_png(figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


@functools.cache
def glyphs(family: str) -> frozenset[int]:
    """Characters that a font of matplotlib's can draw, and the line break."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(family))
    return frozenset(font.get_charmap()) | {ord("\n")}


def drawable(text: str, family: str = "DejaVu Sans") -> str:
    """The text as a figure shows it: a character without a glyph becomes its name.

    So does a character that is written from right to left, because matplotlib would not turn it.
    """

    def plain(character: str) -> bool:
        return ord(character) in glyphs(family) and not is_right_to_left(character)

    return "".join(c if plain(c) else f"‹U+{ord(c):04X}›" for c in visible(text))


def short(label: str, length: int) -> str:
    """One line of a figure: a long name keeps its end, because the end tells paths apart."""
    text = drawable(label).replace("\n", "")
    return text if len(text) <= length else f"{text[:4]}…{text[5 - length :]}"


def label_axis(axis, title: str, below: str, size: int = 8) -> None:
    axis.set_title(title, fontsize=size + 1)
    axis.set_xlabel(below, fontsize=size)
    axis.tick_params(labelsize=size)


@own_style
def draw_differences(pairs: list[tuple[str, str, dict]], wide: bool) -> bytes:
    """What changed: a forest plot of each pair (after, before, compare.compare_arms' result).

    A marker is filled where the interval leaves 0 out. Tokens have an axis of their own.
    """
    height = 3.3 * len(pairs)
    figure = new_figure(*((8.5, height) if wide else (4.3, height)))
    panels = figure.subfigures(len(pairs), 1, squeeze=False)[:, 0]
    for panel, (*labels, result) in zip(panels, pairs, strict=True):
        title = " less ".join(short(label, 44 if wide else 22) for label in labels)
        panel.suptitle(title, fontsize=9, weight="bold")
        sides = result["own"], result["matched"]["differences"]
        keys = [key for key in CHANGES if key in sides[0] and key != "tokens"]
        upper, lower = panel.subplots(2, 1, height_ratios=[max(1, len(keys)), 1.5])
        draw_intervals(upper, keys, sides)
        label_axis(upper, "", "difference (shares and areas as parts of 1; hidden: nats)")
        draw_intervals(lower, ["tokens"], sides)
        label_axis(lower, "", "difference in tokens")
    handles = upper.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return as_png(figure, DPI[wide])


def draw_intervals(axis, keys: list[str], sides: tuple[dict, dict]) -> None:
    """A row for each measure, at own lengths and below it at matched length."""
    for n, (label, side) in enumerate(zip(("own lengths", "matched length"), sides, strict=True)):
        colour = ARM_COLOURS[n]
        axis.plot([], [], ARM_MARKERS[n], color=colour, label=label)
        for row, measure in enumerate(map(side.get, keys), 1):
            if measure and measure["low"] is not None:
                low, high, y = measure["low"], measure["high"], row + 0.3 * n - 0.15
                axis.plot([low, high], [y, y], color=colour, lw=1.5)
                face = colour if low > 0 or high < 0 else "white"
                axis.plot([measure["value"]], [y], ARM_MARKERS[n], color=colour, mfc=face, ms=5)
    axis.axvline(0, color="#000000", lw=0.8, zorder=0)
    axis.set_yticks(range(1, len(keys) + 1), [CHANGES[key] for key in keys])
    axis.set_ylim(len(keys) + 0.6, 0.4)
    axis.grid(axis="x", alpha=0.3)


@own_style
def draw_masks(masks: dict[str, dict], wide: bool) -> bytes:
    """Figure 1: of each arm (label -> arms.follow_mask's row) three masks and the probability."""
    # Shares of the suppression removed: (masks, rows, columns) of each arm; nan is no entry.
    removed = [1 - np.array(row["masks"], float) / row["masks"][0][0][0] for row in masks.values()]
    limit = max(np.nanmax(np.abs(shares)) for shares in removed) or 1
    width, height, shape = (11.5, 3, (1, 4)) if wide else (4.3, 4.6, (2, 2))
    figure = new_figure(width, height * len(masks))
    panels = figure.subfigures(len(masks), 1, squeeze=False)[:, 0]
    for panel, shares, (label, row) in zip(panels, removed, masks.items(), strict=True):
        panel.suptitle(short(label, 60 if wide else 34), fontsize=10, weight="bold")
        axes = panel.subplots(*shape).flatten()
        draw_one_mask(panel, axes, row, shares, limit, wide)
        last = axes[3]
        chances = np.array(row["probability"], float)
        last.plot(chances, color=ARM_COLOURS[0])
        for marker, steps in zip("osD", row["steps"], strict=True):
            last.plot([steps], [chances[steps]], marker, color="#000000")
        last.set(ylim=(-0.03, 1.03))
        last.grid(alpha=0.3)
        title = "probability of the answer" if wide else "P(answer)"
        label_axis(last, title, "step of the mask")
    return as_png(figure, DPI[wide])


def draw_one_mask(panel, axes, row: dict, removed, limit: float, wide: bool) -> None:
    """An arm's mask at three steps, and the scale of its colours."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = "#a04a00", LIGHT["orange"], "#ffffff", LIGHT["blue"], "#0b3c74"
    colours = LinearSegmentedColormap.from_list("heat", ends).with_extremes(bad="#d9d9d9")
    rows, columns = row["size"]
    look = {"cmap": colours, "vmin": -limit, "vmax": limit, "extent": (0, columns, rows, 0)}
    for n, (axis, steps, shares) in enumerate(zip(axes, row["steps"], removed, strict=False)):
        image = axis.imshow(shares, **look, aspect="auto", interpolation="nearest")
        label_axis(axis, f"after {steps} steps" if n else "at c", "reasoning token")
        if n == 0 or not wide:
            axis.set_ylabel("seen from row", fontsize=8)
    if wide:
        bar = panel.colorbar(image, ax=axes[2], shrink=0.9)
        bar.ax.yaxis.set_label_position("left")  # on the right it would seem to be the curve's
    else:
        bar = panel.colorbar(image, ax=list(axes[2:]), location="bottom", shrink=0.9)
    bar.set_label("suppression removed", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def has_history(run: dict | None) -> bool:
    return bool(run and (run["evals"] or run["updates"]))


def full_evals(evals: list[list]) -> list[list]:
    """A run's evals in order, without those of fewer problems than its largest.

    A line to those would join accuracies of different problems. An eval that does not name its
    number of problems counts as large.
    """
    largest = max((row[3:] for row in evals), default=[])  # [problems], or [] where unknown
    return [row for row in sorted(evals) if row[3:] in ([], largest)]


@own_style
def draw_history(runs: dict[str, dict | None], wide: bool) -> bytes:
    """Figure 2: accuracy and mean length over the updates, the arms (label -> run) overlaid."""
    from matplotlib.lines import Line2D

    figure = new_figure(*((10.5, 4.2) if wide else (4.3, 7.0)))
    axes = figure.subplots(*((1, 2) if wide else (2, 1)))
    legend = []
    for n, (label, run) in enumerate(runs.items()):
        if not has_history(run):
            continue
        look = {"color": ARM_COLOURS[n % len(ARM_COLOURS)], "ls": ARM_LINES[n % len(ARM_LINES)]}
        marked = {"marker": ARM_MARKERS[n % len(ARM_MARKERS)]}
        legend.append(Line2D([], [], label=short(label, 48 if wide else 34), **look, **marked))
        for column, axis in enumerate(axes, 1):
            outcome = column == 1  # a rollout's is 0 or -1, so 1 more is its accuracy
            for rows, shift, style in (
                (sorted(run["updates"]), outcome, {"alpha": 0.55, "lw": 1.2}),
                (full_evals(run["evals"]), 0, {"ms": 7, "lw": 2} | marked),
            ):
                if rows:
                    points = [row[0] for row in rows], [row[column] + shift for row in rows]
                    axis.plot(*points, **look | style)
    for axis, title in zip(axes, ("accuracy", "mean reasoning length (tokens)"), strict=True):
        label_axis(axis, title, "update", 9)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.02, 1.02)
    axes[1].set_ylim(bottom=0)
    figure.legend(handles=legend, loc="outside lower center", fontsize=9, frameon=False)
    return as_png(figure, DPI[wide])


@own_style
def curves(history: list[dict], path: Path) -> None:
    """Learning curves as a PNG: accuracy and computing share, reasoning length, the three rewards.

    history: metrics.jsonl's lines; `eval` entries hold a summary, others a step's rewards.
    """
    evals = [{"step": line["step"], **line["eval"]} for line in history if "eval" in line]
    updates = [line for line in history if "outcome" in line]
    at_evals, faint = {"marker": "o"}, {"alpha": 0.6}
    panels = {  # title: (key, label, where from, look) of its lines
        "shares of held-out samples": [
            ("pass@1", "accuracy (pass@1)", evals, at_evals), ("pass@4", "pass@4", evals, at_evals),
            ("computing", "computing share", evals, at_evals),
            ("computing", "computing share, rollouts", updates, faint),
        ],
        "mean reasoning length (tokens)": [
            ("tokens", "held-out", evals, at_evals), ("length", "rollouts", updates, faint)
        ],
        "mean reward of the rollouts": [
            (key, key, updates, {}) for key in ("outcome", "saliency", "reward")
        ],
    }  # fmt: skip
    figure = new_figure(13, 3.6)
    axes = figure.subplots(1, 3)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for key, label, rows, look in lines:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **look)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
        if axis.lines:  # a run of no update has none
            axis.legend(frameon=False)
    axes[0].set_ylim(0, 1.02)
    axes[1].set_ylim(bottom=0)
    write_file(path, as_png(figure, 110))


@own_style
def draw_traces(question: str, sides: list[tuple[str, str, list]]) -> bytes:
    """Figures 3 to 5: (label, text, words) of each arm, coloured by part of speech."""
    across = min(ACROSS, len(sides))
    width = across * (COLUMNS + GAP)  # columns of the figure
    head = folded([(question, "other")], width - GAP, 8)
    key = [run for kind in WORD_KINDS for run in ((kind, kind), ("  ", "other"))]
    blocks = [(0, 0, head), (0, len(head) + 1, fold(key, width))]  # column, line, lines of cells
    top = len(head) + 3  # below the question, a gap and the key
    for start in range(0, len(sides), across):
        beside = []
        for label, text, words in sides[start : start + across]:
            runs = [(run, kind) for run, kind, _ in runs_of(text, words)]
            beside.append(folded([(label, "bold")], COLUMNS, 3) + folded(runs, COLUMNS, LINES))
        blocks += [(n * (COLUMNS + GAP), top, lines) for n, lines in enumerate(beside)]
        top += max(map(len, beside)) + 1
    right, bottom = width * CELL_WIDTH + MARGIN, top * CELL_HEIGHT + MARGIN  # in points
    figure = new_figure((right + MARGIN) / 72, (bottom + MARGIN) / 72, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-MARGIN, right), ylim=(bottom, -MARGIN))
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


def runs_of(text: str, words: list[list]) -> list[tuple[str, str, str]]:
    """The text in stretches: (text, kind of word, spaCy's name of it); white space is `other`."""
    runs, position = [], 0
    for start, end, kind, name in words:
        runs += [(text[position:start], "other", ""), (text[start:end], kind, name)]
        position = end
    return [run for run in [*runs, (text[position:], "other", "")] if run[0]]


def draw_line(axes, x: float, y: float, line: list) -> None:
    """One line of cells, each stretch of one kind of word on its colour."""
    from matplotlib.patches import Rectangle

    for kind, stretch in itertools.groupby(line, key=lambda cell: cell.style):
        cells = list(stretch)
        width = sum(cell.width for cell in cells) * CELL_WIDTH
        if kind in LIGHT:
            box = Rectangle((x, y + 1), width, CELL_HEIGHT - 2, color=LIGHT[kind], lw=0)
            axes.add_patch(box)
        axes.text(
            x, y + CELL_HEIGHT - 4, "".join(cell.character for cell in cells), fontsize=FONT_SIZE,
            family=FONT, weight="bold" if kind in ("number", "bold") else "normal",
            style="italic" if kind == "stop word" else "normal", color=LIGHT["ink"],
        )  # fmt: skip
        x += width
