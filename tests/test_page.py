"""Pages of explained traces: untrusted text, the fixed scale, and nothing that is fetched."""

import html.parser
import math
import re

import jinja2
import pytest

from lab.show import heat
from lab.show.heat import Piece
from lab.show.page import TEMPLATES, explained_page, in_lines, token_lines
from lab.show.text import JOINERS, visible
from tests.test_heat import HOSTILE, acts, contrast, heat_map, hostile, rgb

# What a page may hold, and nothing that loads, runs or navigates.
ELEMENTS = set("html head meta title style body h1 h2 h3 h4 p i bdi small span div article section "
               "details summary table tr th td".split())  # fmt: skip
ATTRIBUTES = {"class", "title", "dir", "lang", "charset", "http-equiv", "content", "name"}
SHADES = {f"{side}{n}" for side in "pn" for n in range(1, 11)}


class Reader(html.parser.HTMLParser):
    """Elements, attributes and the text of each element with a given class or tag."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.open, self.texts = set(), [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append((tag, dict(attributes).get("class"), []))

    def handle_endtag(self, tag):
        name, kind, parts = self.open.pop()
        assert name == tag
        self.texts.append((tag, kind, "".join(parts)))
        if self.open:
            self.open[-1][2].append("".join(parts) + ("\n" if tag == "p" else ""))

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def of(self, tag, kind=None):
        return [text for name, k, text in self.texts if name == tag and kind in (k, None)]

    def values(self, attribute):
        return {value for name, value in self.attributes if name == attribute}

    def classes(self):
        return {name for value in self.values("class") for name in value.split()}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_html_holds_the_text_and_no_element_or_attribute_of_it(text):
    page = explained_page([[hostile(text), hostile(text)]], {text: text}, title=text)
    page.encode()
    reader = Reader(page)
    assert reader.elements <= ELEMENTS
    assert {name for name, _ in reader.attributes} <= ATTRIBUTES
    assert reader.classes() <= SHADES | {"text", "side", "scale", "say", "sp", "v"}
    assert not any(map(acts, set(page) - set("\n" + JOINERS)))
    assert reader.of("title") == [visible(text, JOINERS)]
    boxes = reader.of("div", "text")  # prompt, reasoning, delimiter, answer, ...
    expected = visible(text, JOINERS) or "(none)"
    assert boxes[1].removesuffix("\n") == boxes[3].removesuffix("\n") == expected.removesuffix("\n")
    if text == HOSTILE["markup"]:
        assert text in boxes[1]  # unescaped, it is what was written


def test_every_line_is_a_paragraph_and_white_space_stays():
    runs = [("a  b\n", "", ""), ("\nc ", "p3", "+0.1"), ("\n", "", "")]
    assert in_lines(runs) == [
        [("a  b⏎", "", "")], [("⏎", "p3", "+0.1")], [("c ", "p3", "+0.1"), ("⏎", "", "")],
    ]  # fmt: skip
    assert in_lines([]) == in_lines([("", "", "")]) == []
    page = explained_page([[heat_map("a  b\n c", [0.0, 1.0, -1.0], size=3)]], {})
    assert (
        '<div class="text"><p dir="auto"><span title="+0.000">a  </span>'
        '<span class="p10" title="+1.000">b⏎</span></p>'
        '<p dir="auto"><span class="p10" title="+1.000"> </span>'
        '<span class="n10" title="-1.000">c</span></p></div>'
    ) in page


def test_a_token_without_text_is_seen_and_a_special_one_is_marked():
    pieces = [Piece(1, ""), Piece(2, "<|end|>", True)]
    assert token_lines(pieces, [0.25, math.nan], "mask") == [
        [("◦", "p5", "+0.250"), ("<|end|>", "sp", "n/a")]
    ]


def test_the_same_value_looks_the_same_in_any_company():
    alone = explained_page([[heat_map([Piece(0, "seen"), Piece(1, " tiny")], [0.25, 1e-9])]], {})
    beside = explained_page([[heat_map([Piece(0, "huge"), Piece(1, "seen")], [-5.0, 0.25])]], {})
    spans = [re.findall(r"<span[^>]*>seen</span>", page)[0] for page in (alone, beside)]
    assert spans[0] == spans[1] == '<span class="p5" title="+0.250">seen</span>'
    assert 'class="n10" title="-5.000"' in beside


def test_numbers_that_are_none_are_shown_as_such():
    nothing = heat_map("abc", [math.nan], losses=[math.inf, math.nan],
                       probabilities={"restored": math.nan})  # fmt: skip
    page = explained_page([[nothing]], {})
    assert 'title="n/a"' in page and Reader(page).of("td", "v") == ["n/a"]


def test_a_trace_without_a_map_says_why():
    failed = heat_map(saliency=[], losses=[], probabilities={}, failure="no delimiter")
    page = explained_page([[failed]], {})
    assert '<p class="failure">no delimiter</p>' in page
    assert "probability of the answer" not in page


def test_what_is_ranked_stands_beside_its_number():
    page = explained_page([[heat_map("2 + 2 = 4. So\n4.", size=4)]], {"seed": 0, "compare": None})
    reader = Reader(page)
    said = reader.of("td", "say")
    assert "2 + 2 = 4." in said and "2 + 2 = 4" in said and "2␣=␣token 1" in said
    assert reader.of("summary") == ["settings", "prompt, 2 tokens"]
    assert {"0", "None"} <= set(reader.of("td"))
    assert "loss 1.500 → 0.500 nats per answer token in 1 steps" in " ".join(page.split())


def test_a_page_loads_nothing_and_fits_a_phone():
    page = explained_page([[heat_map(), heat_map()]], {"seed": 0})
    assert "default-src 'none'" in page and "width=device-width" in page
    assert "url(" not in page and "@import" not in page and "://" not in page
    assert "prefers-color-scheme: dark" in page and "content-visibility: auto" in page
    assert "minmax(min(100%, 24rem), 1fr)" in page


@pytest.mark.parametrize("theme", [heat.LIGHT, heat.DARK], ids=["light", "dark"])
def test_text_is_readable_on_every_colour_and_colour_never_stands_alone(theme):
    tints = [rgb(heat.tint(theme, step)) for step in range(-10, 11)]
    words = [rgb(theme[kind]) for kind in ("number", "symbol", "stop word")]
    assert min(contrast(rgb(theme["ink"]), colour) for colour in tints + words) >= 4.5
    assert len(set(map(tuple, tints))) == 21 and tints[10] == rgb(theme["page"])
    style = TEMPLATES.get_template("style.css").render()
    for step in range(1, 11):
        assert f".p{step} {{ background: {heat.tint(theme, step)} }}" in style
    for name, kind in (("wn", "number"), ("wy", "symbol"), ("ws", "stop word")):
        assert f".{name} {{ background: {theme[kind]} }}" in style
        assert re.search(rf"^\.{name} {{ (font|text)-", style, re.MULTILINE)
    below = ", ".join(f".n{step}" for step in range(1, 11))
    assert re.search(rf"{below}\s*{{ text-decoration: underline dotted }}", style)


def test_a_token_takes_little_markup():
    small, large = (
        len(explained_page([[heat_map("abc" * n)]], {})) for n in (100, 200)
    )  # fmt: skip
    assert (large - small) / 100 < 60


def test_a_name_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        TEMPLATES.from_string("{{ missing }}").render()
