"""Text that others wrote, made safe to show in a terminal, a page or a figure, and folded."""

import unicodedata
from typing import NamedTuple

MARKED, NO_TEXT = {"\n": "⏎\n", "\t": "⇥"}, "◦"  # NO_TEXT is shown for a token without text
JOINERS = "\u200c\u200d"  # needed to write Persian and to join emoji, and harmless in HTML
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str, keep: str = "") -> str:
    """The text without any character that acts or hides; line breaks stay, and are marked.

    A character that controls a terminal, has no shape, changes the direction of writing or is not
    assigned becomes its name (‹U+001B›, ‹U+202E›), unless keep holds it.
    """
    if text.isascii() and text.isprintable():
        return text

    def shown(character: str) -> str:
        if character in keep:
            return character
        if character in MARKED:
            return MARKED[character]
        hidden = unicodedata.category(character) in HIDDEN
        return f"‹U+{ord(character):04X}›" if hidden else character

    return "".join(map(shown, text))


def is_right_to_left(character: str) -> bool:
    return unicodedata.bidirectional(character) in ("R", "AL", "AN")


class Cell(NamedTuple):
    """One character, its width in columns, and the style of its text."""

    character: str
    width: int
    style: int | str


def fold(runs: list[tuple[str, int | str]], width: int) -> list[list[Cell]]:
    """(text, style) runs as lines of cells at most `width` columns wide, folded after a space."""
    lines, line = [], []
    used = 0  # columns of the line
    for character, style in ((character, style) for text, style in runs for character in text):
        if character == "\n":
            lines.append(line)
            line, used = [], 0
            continue
        columns = columns_of(character)
        if columns is None:
            continue
        while used + columns > width:
            spaces = [n for n, cell in enumerate(line) if cell.character == " "]
            cut = spaces[-1] + 1 if spaces else len(line)
            lines.append(line[:cut])
            line = line[cut:]
            used = sum(cell.width for cell in line)
        line.append(Cell(character, columns, style))
        used += columns
    return [*lines, line] if line or not lines else lines


def columns_of(character: str) -> int | None:
    """Columns that a character takes; None for one to leave out, because it only changes another.

    Variation selectors are left out: whether they widen an emoji differs between terminals.
    """
    if character < "\u0300":
        return 1
    if "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef":
        return None
    if unicodedata.category(character) in ("Mn", "Me") or "\u1160" <= character <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
