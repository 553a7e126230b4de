"""A reasoning trace and its saliency made visible: in a terminal, as HTML, as JSON.

    print(terminal([heat_map], width=100, colour=True) + legend_line("mask", colour=True))
    Path("out.html").write_text(page([[heat_map], [left, right]], settings), encoding="utf-8")
    json.dumps(as_dict(heat_map))

Pure rendering: text and numbers in, text out; no model and no torch. Three rules hold everywhere:
1. Everything that is shown is untrusted, labels too. In HTML it is escaped; control characters,
   escape sequences and invisible or direction-changing characters are shown by name (`visible`).
2. The colours are a fixed scale, the same for all traces, so that traces compare (`level`).
3. Colour never stands alone: numbers are beside it, what is below zero is underlined, and where
   there is no colour a row of marks stands under the text.
A list of heat maps is one question: one checkpoint, or several side by side.
"""

import html
import itertools
import math
import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

# The fixed scale. Level n, -10 to 10, is limit * (n / 10)^2 with n's sign: squares, because most
# tokens are close to 0 and a few are far away. Values beyond the limit have its colour.
LEVELS = 10
LIMIT = {"mask": 1.0, "attribution": 2.0}
UNIT = {"mask": "share of the suppression removed", "attribution": "nats"}
ABOVE = {"mask": "re-enabled", "attribution": "loss recovered"}
BELOW = {"mask": "over-suppressed", "attribution": "loss added"}
TOGETHER = {"mask": "mean of their tokens", "attribution": "sum of their tokens, nats"}
STRONGEST = 8  # tokens named at each end
ROWS = 40  # sentences or equations that a terminal lists


class Piece(NamedTuple):
    """One token. Texts of pieces that are not special, joined, are the text they came from.

    text: the token's part of the text, "" for the later tokens of a character that several tokens
    spell; or the name of a special token, such as <|eot_id|>, which is no part of the text.
    """

    id: int
    text: str
    special: bool = False


@dataclass(frozen=True)
class HeatMap:
    """One trace in its parts, and the saliency of its reasoning.

    label: whose it is, a checkpoint's name. kind: `mask` or `attribution`. saliency: a number per
    piece of reasoning, [] where none could be learned; failure then says why. probabilities: of
    the whole answer, `suppressed`, `restored` and `unmasked`. losses: in nats per answer token,
    before each step of the mask and after the last. source: where the answer is from. rest: what
    was sampled after the answer, or in its place. notes: sentences to show beside it.
    """

    label: str
    question: str
    kind: str
    prompt: list[Piece]
    reasoning: list[Piece]
    delimiter: list[Piece]
    answer: list[Piece]
    rest: list[Piece]
    source: str
    saliency: list[float]
    probabilities: dict[str, float]
    losses: list[float]
    notes: list[str]
    failure: str = ""


class Unit(NamedTuple):
    """A sentence or an equation: [start, end) in the text, its tokens by number, its saliency."""

    start: int
    end: int
    text: str
    tokens: list[int]
    saliency: float


# ------------------------------------------------------------------------------------- aggregation

# A sentence ends with . ! ? and what closes it, before white space, or at a line break.
_SENTENCE_END = re.compile(r"(?:(?<![.!?…؟])[.!?…؟]++[\"'”’)\]]*+(?=\s)|[。！？]++|\n)\s*+")
_ENUMERATION = re.compile(r"\s*\d+\.\s*")  # "1. " begins a sentence, it is none
# Operands with operators between them. "5 apples + 3 apples" is none: words are not read.
_OPERAND = r"[-−+]?[($€£¥]*+(?<![\d.,])\d++(?:[.,]\d++)*+[%)]*+"
_EQUATION = re.compile(rf"{_OPERAND}(?:[ \t]*+[-+−*/×÷·x^=≈]++[ \t]*+{_OPERAND})+")


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if not piece.special)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """[start, end) of each sentence; they tile the text, white space going to the one before.

    A sentence ends at a line break, and after . ! or ? where white space follows: "3.5" holds no
    end, "e.g. this" does. A number and a full stop alone ("1. ") go with what follows.
    """
    spans, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        sentence = text[start : match.end()]
        if sentence.strip() and not (_ENUMERATION.fullmatch(sentence) and "\n" not in sentence):
            spans.append((start, match.end()))
            start = match.end()
    if text[start:].strip() or (text and not spans):
        spans.append((start, len(text)))
    elif spans:
        spans[-1] = (spans[-1][0], len(text))
    return spans


def equation_spans(text: str) -> list[tuple[int, int]]:
    """[start, end) of each run of numbers joined by operators that has an equals sign."""
    return [match.span() for match in _EQUATION.finditer(text) if "=" in match[0]]


def units(heat: HeatMap, spans: list[tuple[int, int]]) -> list[Unit]:
    """The saliency of stretches of the reasoning: mean of its tokens for a mask, sum of nats else.

    A token belongs where its first character that is no white space stands; one without text where
    the token before it does. nan for a stretch in which no token begins.
    """
    text, anchors, position = text_of(heat.reasoning), [], 0
    for piece in heat.reasoning:
        if piece.special or not piece.text:
            anchors.append(anchors[-1] if anchors else 0)
            continue
        blank = len(piece.text) - len(piece.text.lstrip())
        anchors.append(position + (blank if blank < len(piece.text) else 0))
        position += len(piece.text)
    found = []
    for start, end in spans:
        # anchors never fall: a later token begins later
        tokens = list(range(bisect_left(anchors, start), bisect_left(anchors, end)))
        value = sum(heat.saliency[n] for n in tokens) if tokens else math.nan
        if heat.kind == "mask" and tokens:
            value /= len(tokens)
        found.append(Unit(start, end, text[start:end], tokens, value))
    return found


def sentences(heat: HeatMap) -> list[Unit]:
    return units(heat, sentence_spans(text_of(heat.reasoning))) if heat.saliency else []


def equations(heat: HeatMap) -> list[Unit]:
    return units(heat, equation_spans(text_of(heat.reasoning))) if heat.saliency else []


def strongest(heat: HeatMap) -> tuple[list[int], list[int]]:
    """Numbers of the tokens with the most saliency, and of those with the least, below zero."""
    known = [n for n, value in enumerate(heat.saliency) if math.isfinite(value)]
    order = sorted(known, key=lambda n: -heat.saliency[n])
    above = [n for n in order if heat.saliency[n] > 0][:STRONGEST]
    return above, [n for n in reversed(order) if heat.saliency[n] < 0][:STRONGEST]


# ------------------------------------------------------------------------------------------- scale


def level(value: float, kind: str) -> int:
    """-10 to 10: the step of the fixed scale closest in colour to the value; 0 for nan."""
    if math.isnan(value):
        return 0
    step = round(LEVELS * math.sqrt(min(abs(value) / LIMIT[kind], 1.0)))
    return step if value >= 0 else -step


def at_level(step: int, kind: str) -> float:
    """The value in the middle of a step."""
    return math.copysign(LIMIT[kind] * (step / LEVELS) ** 2, step)


def number(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "n/a"


def probability(value: float) -> str:
    """Per cent, with enough digits to tell a small one from none."""
    if not math.isfinite(value):
        return "n/a"
    if 0 < value < 0.001:
        return f"{100 * value:.1e}%"
    return ">99.9%" if 0.9995 <= value < 1 else f"{value:.1%}"


# -------------------------------------------------------------------------------------------- text

LINE_END, TAB, NO_TEXT = "⏎", "⇥", "◦"  # shown for a line break, a tab, a token without text
_JOINERS = "\u200c\u200d"  # needed to write Persian and to join emoji, and harmless in HTML
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str, keep: str = "") -> str:
    """The text with nothing in it that acts in place of being seen; line breaks stay, marked.

    Characters that control a terminal, have no shape, change the direction of writing or are not
    assigned become their names (‹U+001B›, ‹U+202E›), but for those in keep.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character, keep) for character in text)


def _visible(character: str, keep: str) -> str:
    code = ord(character)
    if character in keep or 0x20 <= code < 0x7F:
        return character
    if character == "\n":
        return LINE_END + "\n"
    if character == "\t":
        return TAB
    return f"‹U+{code:04X}›" if unicodedata.category(character) in _HIDDEN else character


def shown(piece: Piece, keep: str = "") -> str:
    """A token as it is displayed: never empty."""
    return visible(piece.text, keep) or NO_TEXT


def named(piece: Piece, keep: str = "") -> str:
    """A token by itself, on one line and with its spaces marked."""
    return shown(piece, keep).replace("\n", "").replace(" ", "␣")


# ---------------------------------------------------------------------------------------- terminal

# Background and text colour of levels 1 to 10, of the 256 that terminals have: all but a few show
# these, and they are the same on light and dark ones.
BLUES = [195, 189, 153, 117, 111, 75, 69, 33, 27, 26]
ORANGES = [230, 223, 222, 216, 215, 214, 208, 172, 166, 130]
MARKS = " 123456789X"  # the row under the text, where there is no colour; below zero:
MARKS_BELOW = " abcdefghij"
INDENT = 11


class Cell(NamedTuple):
    """One character of a terminal, its width in columns, and its style: a level, or a name."""

    character: str
    width: int
    style: int | str


def terminal(heats: list[HeatMap], width: int = 80, colour: bool = False) -> str:
    """One question's heat maps, side by side where they fit and read left to right, else stacked.

    width: columns of the terminal. colour: False writes no escape sequence at all.
    """
    width = max(width, 40)
    head = _lines([_row("question", heats[0].question)], width, colour)
    each = (width - 3 * (len(heats) - 1)) // len(heats)
    if len(heats) > 1 and each >= 48 and not any(map(_right_to_left, heats)):
        rows = []
        blocks = [_lines(_rows(heat), each, colour) for heat in heats]
        for lines in itertools.zip_longest(*blocks, fillvalue=("", 0)):
            rows.append(" │ ".join(text + " " * (each - used) for text, used in lines))
    else:
        rows = []
        for heat in heats:
            rows += ["", *(text for text, _ in _lines(_rows(heat), width, colour))]
        rows = rows[1:]
    return "".join(f"{row.rstrip(' ')}\n" for row in [*(text for text, _ in head), "", *rows])


def legend_line(kind: str, colour: bool) -> str:
    """What the colours mean, or the marks where there are none; at most 80 columns wide."""
    if colour:
        scale = "".join(_paint(" ", step) for step in range(-LEVELS, LEVELS + 1))
        ends = f"{BELOW[kind]} {-LIMIT[kind]:g} {scale} {LIMIT[kind]:+g} {ABOVE[kind]}"
        return f"{ends}\n({UNIT[kind]}; steps are squares; below 0 underlined)\n"
    values = " ".join(f"{MARKS[n]}={at_level(n, kind):g}" for n in range(1, LEVELS + 1))
    return (
        f"marks under the text, {UNIT[kind]}:\n{values}\n"
        f"({ABOVE[kind]}); a to j are the same below 0 ({BELOW[kind]})\n"
    )


class Row(NamedTuple):
    """A label and the styled texts beside it; marks: write levels under it where colour is off."""

    label: str
    runs: list[tuple[str, int | str]]
    marks: bool = False


def _row(label: str, content: str | list[Piece], style: int | str = "plain") -> Row:
    """A row of untrusted text, or of tokens."""
    if isinstance(content, str):
        return Row(label, [(visible(content), style)])
    return Row(label, [(shown(piece), style) for piece in content] or [("(none)", "plain")])


def _rows(heat: HeatMap) -> list[Row]:
    """All that a terminal shows of a heat map."""
    rows = [_row("checkpoint", heat.label, "bold"), _row("prompt", heat.prompt, "dim")]
    if heat.saliency:
        levels = [level(value, heat.kind) for value in heat.saliency]
        texts = map(shown, heat.reasoning)
        rows += [Row("reasoning", list(zip(texts, levels, strict=True)), marks=True)]
    else:
        rows += [_row("reasoning", heat.reasoning)]
    rows += [_row("delimiter", heat.delimiter), _row("answer", heat.answer, "bold")]
    rows += [_row("", f"({heat.source})", "dim")] if heat.answer else []
    rows += [_row("sampled", heat.rest, "dim")] if heat.rest else []
    rows += [_row("note", note) for note in heat.notes]
    if heat.failure:
        return [*rows, _row("no map", heat.failure, "bold")]

    chances = "  ".join(f"{name} {probability(p)}" for name, p in heat.probabilities.items())
    rows += [Row("", []), _row("P(answer)", chances)]
    if heat.losses:
        course = f"{heat.losses[0]:.3f} -> {heat.losses[-1]:.3f} nats per answer token"
        rows += [_row("loss", f"{course}, {len(heat.losses) - 1} steps")]
    for name, found in (("sentences", sentences(heat)), ("equations", equations(heat))):
        title = TOGETHER[heat.kind] if found else "(none)"
        if len(found) > ROWS:
            title += f"; the {ROWS} strongest of {len(found)}"
        rows += [Row("", []), _row(name, title, "dim")]
        for unit in sorted(sorted(found, key=lambda unit: -abs(unit.saliency))[:ROWS]):
            style = level(unit.saliency, heat.kind)
            rows += [_row(number(unit.saliency), unit.text.strip(), style)]
    for name, tokens in zip((ABOVE, BELOW), strongest(heat), strict=True):
        title = f"most {name[heat.kind]}" + ("" if tokens else ": none")
        rows += [Row("", []), _row("tokens", title, "dim")]
        for n in tokens:
            text = (named(heat.reasoning[n]), level(heat.saliency[n], heat.kind))
            rows += [Row(number(heat.saliency[n]), [text, (f"   token {n}", "dim")])]
    return rows


def _lines(rows: list[Row], width: int, colour: bool) -> list[tuple[str, int]]:
    """Rows as lines, each with the columns that it takes."""
    lines = []
    for label, runs, marks in rows:
        for place, cells in enumerate(fold(runs, width - INDENT)):
            front = f"{label if place == 0 else '':<{INDENT - 1}} "
            lines.append((front + _line(cells, colour), INDENT + sum(c.width for c in cells)))
            under = "".join(mark(cell.style) * cell.width for cell in cells).rstrip()
            if marks and not colour and under:
                lines.append((" " * INDENT + under, INDENT + len(under)))
    return lines


def fold(runs: list[tuple[str, int | str]], width: int) -> list[list[Cell]]:
    """Styled texts as lines of cells at most `width` columns wide, folded after a space."""
    lines, line, used = [], [], 0
    for text, style in runs:
        for character in text:
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
    """Columns that a character takes; None for one to leave out, which only changes another."""
    if character < "\u0300":
        return 1
    if "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef":
        return None  # variation selectors: whether they widen an emoji differs between terminals
    if unicodedata.category(character) in ("Mn", "Me") or "\u1160" <= character <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def mark(style: int | str) -> str:
    """The mark of a level under plain text; a blank for what has no saliency."""
    if isinstance(style, str):
        return " "
    return MARKS[style] if style >= 0 else MARKS_BELOW[-style]


def _line(cells: list[Cell], colour: bool) -> str:
    """A line's text; with colour, each stretch of one style between its codes and a reset."""
    text, stretch = "", ""
    for n, cell in enumerate(cells):
        stretch += cell.character
        if n + 1 == len(cells) or cells[n + 1].style != cell.style:
            text += _paint(stretch, cell.style) if colour else stretch
            stretch = ""
    return text


def _paint(text: str, style: int | str) -> str:
    """The text in a style. Only these sequences are ever written, and never from the text."""
    if isinstance(style, str):
        code = {"bold": "1", "dim": "2"}.get(style)
    elif style == 0:
        code = None
    else:
        background = (BLUES if style > 0 else ORANGES)[abs(style) - 1]
        ink = 231 if background in (27, 26, 130) else 16  # white on the darkest three
        code = f"38;5;{ink};48;5;{background}" + (";4" if style < 0 else "")
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


def _right_to_left(heat: HeatMap) -> bool:
    """Whether a terminal may turn part of a line around, so that columns would mix."""
    parts = heat.prompt + heat.reasoning + heat.delimiter + heat.answer + heat.rest
    text = heat.label + "".join(piece.text for piece in parts) + "".join(heat.notes)
    return any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text if c > "\u0590")


# -------------------------------------------------------------------------------------------- HTML

# Tints run from the page's colour (level 0) to these (level 10); text keeps one colour on all of
# them, with a contrast of at least 4.5 to 1. Blue and orange differ in all common colour blindness.
LIGHT = {"page": "#ffffff", "ink": "#16181d", "blue": "#4d97de", "orange": "#f08c28"}
DARK = {"page": "#14161a", "ink": "#f2f2f2", "blue": "#1f5fae", "orange": "#9a4f00"}


def tint(theme: dict, step: int) -> str:
    """The background of a level, #rrggbb."""
    end, page = theme["blue" if step >= 0 else "orange"], theme["page"]
    mixed = (
        round(int(page[n : n + 2], 16) * (1 - share) + int(end[n : n + 2], 16) * share)
        for share in [abs(step) / LEVELS]
        for n in (1, 3, 5)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def css_class(step: int) -> str:
    """p1 to p10, n1 to n10; "" for level 0."""
    return f"{'p' if step > 0 else 'n'}{abs(step)}" if step else ""


def _theme(theme: dict) -> str:
    rules = [f":root{{--page:{theme['page']};--ink:{theme['ink']}}}"]
    for step in range(1, LEVELS + 1):
        rules += [f".{css_class(s)}{{background:{tint(theme, s)}}}" for s in (step, -step)]
    return "\n".join(rules)


STYLE = f"""\
:root{{color-scheme:light dark}}
{_theme(LIGHT)}
@media(prefers-color-scheme:dark){{{_theme(DARK)}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:80rem;padding:1rem;background:var(--page);color:var(--ink);
font:16px/1.6 system-ui,sans-serif;overflow-wrap:anywhere}}
h1{{font-size:1.4rem}}h2{{font-size:1.1rem;white-space:pre-wrap;margin:.5rem 0}}
h3{{font-size:1rem;margin:.5rem 0}}h4{{font-size:.85rem;font-weight:600;margin:.8rem 0 .2rem}}
article{{content-visibility:auto;contain-intrinsic-size:auto 60rem;border-top:1px solid;
margin-top:1.5rem;padding-top:.5rem}}
.side{{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}}
.side>section{{min-width:0}}
.text{{overflow:hidden;border:1px solid;border-radius:.3rem;padding:.3rem .5rem}}
.text p{{white-space:pre-wrap;margin:0;line-height:1.8}}
.text span,.v{{border-radius:.15rem}}
{",".join(f".n{step}" for step in range(1, LEVELS + 1))}{{text-decoration:underline dotted}}
.sp{{font:.85em ui-monospace,monospace;outline:1px dotted;outline-offset:-1px}}
table{{border-collapse:collapse;margin:.2rem 0}}
th,td{{text-align:start;vertical-align:top;padding:.1rem .5rem;font-weight:400}}
td.say{{white-space:pre-wrap}}
.v{{font-variant-numeric:tabular-nums;white-space:nowrap}}
small{{opacity:.8;margin-inline-start:.5rem}}
.scale{{display:flex;flex-wrap:wrap;align-items:center;gap:.1rem .6rem}}
.scale span{{display:inline-block;width:.7rem;height:1.2rem;border:1px solid}}
.failure{{border-inline-start:.3rem solid;padding-inline-start:.6rem}}
summary{{cursor:pointer;font-size:.85rem}}
"""


def page(questions: list[list[HeatMap]], settings: dict, title: str = "Explained traces") -> str:
    """A whole HTML page: no scripts, nothing fetched. settings: names and values to state."""
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in settings.items()
    )
    kinds = dict.fromkeys(heat.kind for heats in questions for heat in heats)
    body = "".join(fragment(heats, n) for n, heats in enumerate(questions, 1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1>{''.join(map(legend, kinds))}"
        f"<details><summary>settings</summary><table>{rows}</table></details>\n"
        f"{body}</body></html>\n"
    )


def legend(kind: str) -> str:
    """What the colours mean, as HTML."""
    swatches = "".join(
        f'<span class="{css_class(step)}" title="{at_level(step, kind):+g}"></span>'
        for step in range(-LEVELS, LEVELS + 1)
    )
    return (
        f'<p class="scale">{BELOW[kind]}, {-LIMIT[kind]:g} <i>{swatches}</i> {LIMIT[kind]:+g}, '
        f"{ABOVE[kind]} ({UNIT[kind]})</p><p>The scale is the same for every trace; its steps "
        f"are squares, and values beyond {LIMIT[kind]:g} have the last colour. "
        "What is below 0 is underlined.</p>"
    )


def fragment(heats: list[HeatMap], place: int = 1) -> str:
    """One question's heat maps as HTML, for a page that has STYLE; side by side on a wide one."""
    sections = "".join(f"<section>{_section(heat)}</section>" for heat in heats)
    question = escape(heats[0].question)
    return (
        f'<article><h4>question {place}</h4><h2 dir="auto">{question}</h2>'
        f'<div class="side">{sections}</div></article>\n'
    )


def escape(text: str) -> str:
    """Text made safe for HTML, between tags and in quoted attributes."""
    return html.escape(visible(text, _JOINERS), quote=True)


def _section(heat: HeatMap) -> str:
    parts = [
        f"<h3><bdi>{escape(heat.label)}</bdi></h3>",
        f'<p class="failure">{escape(heat.failure)}</p>' if heat.failure else "",
        *(f'<p dir="auto">{escape(note)}</p>' for note in heat.notes),
        f"<details><summary>prompt, {len(heat.prompt)} tokens</summary>{box(heat.prompt)}"
        "</details>",
        f"<h4>reasoning, {len(heat.reasoning)} tokens</h4>",
        box(heat.reasoning, heat.saliency, heat.kind),
        f"<h4>delimiter</h4>{box(heat.delimiter)}",
        f"<h4>answer{f' ({escape(heat.source)})' if heat.answer else ''}</h4>{box(heat.answer)}",
        f"<h4>sampled after it, or in its place</h4>{box(heat.rest)}" if heat.rest else "",
    ]
    if heat.failure:
        return "".join(parts)
    names = "".join(f"<th>{escape(name)}</th>" for name in heat.probabilities)
    values = "".join(f'<td class="v">{probability(p)}</td>' for p in heat.probabilities.values())
    parts.append(
        f"<h4>probability of the answer</h4><table><tr>{names}</tr><tr>{values}</tr></table>"
    )
    if heat.losses:
        parts.append(
            f"<p>loss {heat.losses[0]:.3f} → {heat.losses[-1]:.3f} nats per answer token in "
            f"{len(heat.losses) - 1} steps</p>"
        )
    return "".join(parts) + ranked(heat)


def ranked(heat: HeatMap) -> str:
    """Sentences, equations and the strongest tokens with their saliency, as HTML."""
    parts = []
    for name, found in (("sentences", sentences(heat)), ("equations", equations(heat))):
        rows = [(unit.saliency, escape(unit.text.strip())) for unit in found]
        parts.append(f"<h4>{name}, {TOGETHER[heat.kind]}</h4>{value_table(rows, heat.kind)}")
    for name, tokens in zip((ABOVE, BELOW), strongest(heat), strict=True):
        rows = [
            (
                heat.saliency[n],
                f"<bdi>{html.escape(named(heat.reasoning[n], _JOINERS))}</bdi>"
                f"<small>token {n}</small>",
            )
            for n in tokens
        ]
        parts.append(f"<h4>tokens, most {name[heat.kind]}</h4>{value_table(rows, heat.kind)}")
    return "".join(parts)


def box(pieces: list[Piece], saliency: list[float] = (), kind: str = "") -> str:
    """Tokens as HTML, each line a paragraph with a direction of its own; numbers are tooltips.

    In one paragraph "5 * 2 = 10" below a line of Arabic would be turned around.
    """
    lines = [""]
    for piece, value in itertools.zip_longest(pieces, saliency):
        names = ["sp"] if piece.special else []
        if value is not None:
            names = [css_class(level(value, kind)), *names]
        attributes = f' class="{" ".join(names)}"' if any(names) else ""
        attributes += "" if value is None else f' title="{number(value)}"'
        first, *more = html.escape(shown(piece, _JOINERS), quote=True).split("\n")
        for n, text in enumerate([first, *more]):
            lines += [""] if n else []
            lines[-1] += f"<span{attributes}>{text}</span>" if attributes and text else text
    if len(lines) > 1 and not lines[-1]:
        lines.pop()
    content = "".join(f'<p dir="auto">{line}</p>' for line in lines) if pieces else "(none)"
    return f'<div class="text">{content}</div>'


def value_table(rows: list[tuple[float, str]], kind: str) -> str:
    """Numbers beside texts that are HTML already."""
    if not rows:
        return "<p>(none)</p>"
    cells = "".join(
        f'<tr><td class="{f"{css_class(level(value, kind))} v".strip()}">{number(value)}</td>'
        f'<td class="say" dir="auto">{text}</td></tr>'
        for value, text in rows
    )
    return f"<table>{cells}</table>"


# -------------------------------------------------------------------------------------------- JSON


def as_dict(heat: HeatMap) -> dict:
    """All of a heat map as what JSON can hold; numbers that are not finite become null.

    label, question, kind, source, notes, failure as in HeatMap; prompt, delimiter, answer, rest:
    lists of {id, text, special}; reasoning: the same with saliency and level; sentences,
    equations: lists of {start, end, text, tokens, saliency, level}, [start, end) in characters of
    the texts of reasoning joined without the special ones, tokens by number; probabilities; losses.
    """
    result = {"label": heat.label, "question": heat.question, "kind": heat.kind}
    for name in ("prompt", "reasoning", "delimiter", "answer", "rest"):
        result[name] = [piece._asdict() for piece in getattr(heat, name)]
    for token, value in zip(result["reasoning"], heat.saliency, strict=False):
        token |= {"saliency": finite(value), "level": level(value, heat.kind)}
    for name, found in (("sentences", sentences(heat)), ("equations", equations(heat))):
        result[name] = [
            unit._asdict()
            | {"saliency": finite(unit.saliency), "level": level(unit.saliency, heat.kind)}
            for unit in found
        ]
    result["probabilities"] = {name: finite(p) for name, p in heat.probabilities.items()}
    result["losses"] = [finite(loss) for loss in heat.losses]
    return result | {"source": heat.source, "notes": heat.notes, "failure": heat.failure}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
