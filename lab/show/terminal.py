"""Heat maps on a terminal, in 256 colours or with a row of marks under the text.

    print(draw([heat_map], width=100, colour=True) + legend("mask", colour=True))

A list of heat maps is one question: one checkpoint, or several side by side.
"""

import itertools
from typing import NamedTuple

from lab.show import heat
from lab.show.heat import ABOVE, BELOW, LEVELS, LIMIT, PARTS, UNIT, HeatMap, Piece, level, number
from lab.show.text import Cell, fold, is_right_to_left, visible

# Backgrounds of levels 1 to 10 and -1 to -10, of the 256 colours that terminals have: all but a few
# terminals show these, and they are the same on light and dark ones.
BLUES = [195, 189, 153, 117, 111, 75, 69, 33, 27, 26]
ORANGES = [230, 223, 222, 216, 215, 214, 208, 172, 166, 130]
# By level, under the text where there is no colour.
MARKS = dict(zip(range(-LEVELS, LEVELS + 1), "jihgfedcba 123456789X", strict=True))
INDENT = 11  # columns of the labels
LISTED = 40  # sentences or equations at most


class Row(NamedTuple):
    """A label and the styled texts beside it; a style is a level, or bold, dim or plain."""

    label: str
    runs: list[tuple[str, int | str]]
    marks: bool = False  # whether levels are written under the texts where colour is off


def draw(heat_maps: list[HeatMap], width: int = 80, colour: bool = False) -> str:
    """One question's heat maps, side by side where they fit and read left to right, else stacked.

    width: columns of the terminal. colour: False writes no escape sequence at all.
    """
    width = max(width, 40)
    each = (width - 3 * (len(heat_maps) - 1)) // len(heat_maps)
    lines = [text for text, _ in lines_of([row("question", heat_maps[0].question)], width, colour)]
    if len(heat_maps) > 1 and each >= 48 and not any(map(right_to_left, heat_maps)):
        lines.append("")
        blocks = [lines_of(rows_of(heat_map), each, colour) for heat_map in heat_maps]
        for beside in itertools.zip_longest(*blocks, fillvalue=("", 0)):
            lines.append(" │ ".join(text + " " * (each - columns) for text, columns in beside))
    else:
        for heat_map in heat_maps:
            lines += ["", *(text for text, _ in lines_of(rows_of(heat_map), width, colour))]
    return "".join(f"{line.rstrip(' ')}\n" for line in lines)


def legend(kind: str, colour: bool) -> str:
    """What the colours mean, or the marks where there are none; at most 80 columns wide."""
    if colour:
        scale = "".join(paint(" ", step) for step in range(-LEVELS, LEVELS + 1))
        ends = f"{BELOW[kind]} {-LIMIT[kind]:g} {scale} {LIMIT[kind]:+g} {ABOVE[kind]}"
        return f"{ends}\n({UNIT[kind]}; steps are squares; below 0 underlined)\n"
    values = " ".join(f"{MARKS[n]}={heat.at_level(n, kind):g}" for n in range(1, LEVELS + 1))
    return (
        f"marks under the text, {UNIT[kind]}:\n{values}\n"
        f"({ABOVE[kind]}); a to j are the same below 0 ({BELOW[kind]})\n"
    )


def row(label: str, content: str | list[Piece], style: int | str = "plain") -> Row:
    """A row of untrusted text, or of tokens."""
    if isinstance(content, str):
        return Row(label, [(visible(content), style)])
    runs = [(heat.shown(piece.text), style) for piece in content]
    return Row(label, runs or [("(none)", "plain")])


def rows_of(heat_map: HeatMap) -> list[Row]:
    """All that a terminal shows of a heat map."""
    rows = [row("checkpoint", heat_map.label, "bold"), row("prompt", heat_map.prompt, "dim")]
    if heat_map.saliency:
        texts = [heat.shown(piece.text) for piece in heat_map.reasoning]
        levels = [level(value, heat_map.kind) for value in heat_map.saliency]
        rows.append(Row("reasoning", list(zip(texts, levels, strict=True)), marks=True))
    else:
        rows.append(row("reasoning", heat_map.reasoning))
    rows += [row("delimiter", heat_map.delimiter), row("answer", heat_map.answer, "bold")]
    rows += [row("", f"({heat_map.source})", "dim")] if heat_map.answer else []
    rows += [row("sampled", heat_map.rest, "dim")] if heat_map.rest else []
    rows += [row("note", note) for note in heat_map.notes]
    if heat_map.failure:
        return [*rows, row("no map", heat_map.failure, "bold")]
    return rows + rows_of_numbers(heat_map)


def rows_of_numbers(heat_map: HeatMap) -> list[Row]:
    """Probabilities and losses, then sentences, equations and the strongest tokens by saliency."""
    kind, losses, blank = heat_map.kind, heat_map.losses, Row("", [])
    chances = [f"{name} {heat.probability(p)}" for name, p in heat_map.probabilities.items()]
    rows = [blank, row("P(answer)", "  ".join(chances))]
    if losses:
        course = f"{losses[0]:.3f} -> {losses[-1]:.3f} nats per answer token"
        rows.append(row("loss", f"{course}, {len(losses) - 1} steps"))
    if heat_map.overshoot > 0:
        rows.append(row("overshoot", f"{heat_map.overshoot:.3g} nats below the unmasked loss"))
    for name, title, ranked in heat.rankings(heat_map):
        if not ranked:
            title = f"{title}: none" if name == "tokens" else "(none)"
        if len(ranked) > LISTED:
            title += f"; the {LISTED} strongest of {len(ranked)}"
        rows += [blank, row(name, title, "dim")]
        strongest = sorted(range(len(ranked)), key=lambda n: -abs(ranked[n][0]))[:LISTED]
        for value, text, note in (ranked[n] for n in sorted(strongest)):
            runs = [(visible(text), level(value, kind)), (f"   {note}" if note else "", "dim")]
            rows.append(Row(number(value), runs))
    return rows


def lines_of(rows: list[Row], width: int, colour: bool) -> list[tuple[str, int]]:
    """Rows as lines, each with the columns that it takes."""
    lines = []
    for label, runs, marks in rows:
        for place, cells in enumerate(fold(runs, width - INDENT)):
            front = f"{label if place == 0 else '':<{INDENT - 1}} "
            text = painted(cells) if colour else "".join(cell.character for cell in cells)
            lines.append((front + text, INDENT + sum(cell.width for cell in cells)))
            under = "".join(MARKS.get(cell.style, " ") * cell.width for cell in cells).rstrip()
            if marks and not colour and under:
                lines.append((" " * INDENT + under, INDENT + len(under)))
    return lines


def painted(cells: list[Cell]) -> str:
    """A line's text, with each stretch of one style between its codes and a reset."""
    stretches = itertools.groupby(cells, key=lambda cell: cell.style)
    return "".join(paint("".join(c.character for c in cells), style) for style, cells in stretches)


def paint(text: str, style: int | str) -> str:
    """The text in a style. Only these sequences are ever written, and never from the text."""
    code = {"bold": "1", "dim": "2"}.get(style)
    if isinstance(style, int) and style:
        background = (BLUES if style > 0 else ORANGES)[abs(style) - 1]
        ink = 231 if background in (27, 26, 130) else 16  # white on the darkest three
        code = f"38;5;{ink};48;5;{background}" + (";4" if style < 0 else "")
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


def right_to_left(heat_map: HeatMap) -> bool:
    """Whether a terminal may turn a part of a line around, which would mix the columns."""
    texts = [piece.text for name in PARTS for piece in getattr(heat_map, name)]
    return any(map(is_right_to_left, "".join([heat_map.label, *texts, *heat_map.notes])))
