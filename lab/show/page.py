"""HTML pages by jinja2: one environment, one skeleton, one style for reports and explained traces.

    html = render("report.html", title="Evaluation", results=...)

Templates lie beside this file; each extends page.html, which holds the document's frame and
includes style.css. Whatever a template prints is made visible and escaped, because traces are text
that a model made up: a character that acts in place of being seen becomes its name. What a macro
returns, and Markup, is HTML already.
"""

from pathlib import Path

import jinja2
from markupsafe import Markup

from lab.show.text import JOINERS, visible


def show_value(value):
    """What a template prints: HTML as it is, all else as visible text, which jinja2 escapes."""
    return value if isinstance(value, Markup) else visible(str(value), JOINERS)


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=show_value,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values) -> str:
    """The template's text with these values. Raises jinja2.UndefinedError for a missing one."""
    return TEMPLATES.get_template(template).render(**values)
