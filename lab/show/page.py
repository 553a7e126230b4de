"""HTML pages by jinja2: one environment, one frame, one style for reports and explained traces.

    html = explained_page([[heat_map], [left, right]], settings)     # one list a question
    html = render("report.html", title="Evaluation", ...)            # lab/show/report.py

The templates lie beside this file: page.html is the frame of a document, report.html and trace.html
fill it, macros.html holds what both show, style.css their looks. Whatever a template prints is made
visible and escaped, because traces are text that a model made up.
"""

import itertools
from pathlib import Path

import jinja2
from markupsafe import Markup

from lab.show import heat
from lab.show.heat import HeatMap, Piece
from lab.show.text import JOINERS, NO_TEXT, visible

Run = tuple[str, str, str]  # a stretch of text, its CSS classes, its tooltip


def show_value(value):
    """What a template prints: HTML as it is, all else as visible text, which jinja2 escapes."""
    return value if isinstance(value, Markup) else visible(str(value), JOINERS)


def shade(value: float, kind: str) -> str:
    """The CSS class of a saliency's level: p1 to p10, n1 to n10, "" for level 0."""
    step = heat.level(value, kind)
    return f"{'p' if step > 0 else 'n'}{abs(step)}" if step else ""


def in_lines(runs: list[Run]) -> list[list[Run]]:
    """The runs of each line of text. A line break at the end begins no line of its own.

    A page gives each line a paragraph with a direction of its own, because in one paragraph
    "5 * 2 = 10" below a line of Arabic would be turned around.
    """
    lines = [[]]
    for text, classes, title in runs:
        first, *more = visible(text, JOINERS).split("\n")
        lines[-1].append((first, classes, title))
        lines += [[(line, classes, title)] for line in more]
    lines = [[run for run in line if run[0]] for line in lines]
    return lines[:-1] if not lines[-1] else lines


def token_lines(pieces: list[Piece], saliency=(), kind: str = "") -> list[list[Run]]:
    """Tokens as in_lines gives them, shaded by their saliency, which is the tooltip too."""
    runs = []
    for piece, value in itertools.zip_longest(pieces, saliency):
        colour, title = ("", "") if value is None else (shade(value, kind), heat.number(value))
        classes = f"{colour} sp".strip() if piece.special else colour
        runs.append((piece.text or NO_TEXT, classes, title))
    return in_lines(runs)


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
    autoescape=True, finalize=show_value, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
TEMPLATES.globals |= {"heat": heat, "JOINERS": JOINERS, "shade": shade, "lines_of": token_lines}


def render(template: str, **values) -> str:
    """The template's text with these values. Raises jinja2.UndefinedError for a missing one."""
    return TEMPLATES.get_template(template).render(**values)


def explained_page(questions: list[list[HeatMap]], settings: dict, title="Explained traces") -> str:
    """A page of heat maps, those of one question side by side. settings: names and values."""
    kinds = dict.fromkeys(trace.kind for traces in questions for trace in traces)
    return render("trace.html", title=title, questions=questions, settings=settings, kinds=kinds)
