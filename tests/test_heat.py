"""Heat maps: sums by hand, the fixed scale, and untrusted text in a terminal and in JSON."""

import json
import math
import re
import unicodedata

import pytest

from lab.show import heat, terminal
from lab.show.heat import HeatMap, Piece, equation_spans, level, sentence_spans
from lab.show.text import columns_of, visible

OUR_CODES = re.compile(r"\x1b\[(?:0|1|2|38;5;\d+;48;5;\d+(?:;4)?)m")

HOSTILE = {
    "markup": "<script>alert(\"1\")</script><img src=x onerror='y'> &amp; </div></style> ]]> -->",
    "quotes": "\"'` onmouseover=\"x\" class='p9'",
    "right to left": "שלום 5 + 3 = 8\nمرحبا \u202e evil \u2066 more \u200f\u061c",
    "emoji": "👩‍👩‍👧 ❤️ 🇩🇪 e\u0301\u0301\u0301 日本語テスト",
    "escapes": "\x1b[31mred\x1b]0;title\x07 \x9b5m \x00\x08\x7f\r over\r\n\ttab \x85\u2028\u2029",
    "invisible": "\u200b\ufeff\xad\U000e0041 \ue000 \U000fffff \ud800",
    "long": "\n".join(f"line {n} = {n}." for n in range(1000)),
    "nothing": "",
    "blank": " \n\n\t ",
}


def pieces(text, size=3):
    """Tokens of `size` characters."""
    return [Piece(n, text[n : n + size]) for n in range(0, len(text), size)]


def heat_map(reasoning="5 + 3 = 8. So 8.", saliency=None, kind="mask", size=3, **changes):
    tokens = pieces(reasoning, size) if isinstance(reasoning, str) else reasoning
    if saliency is None:
        saliency = [math.sin(n) for n in range(len(tokens))]
    values = {
        "label": "model",
        "question": "How many?",
        "kind": kind,
        "prompt": [Piece(1, "<|begin|>", True), Piece(2, "How many?")],
        "reasoning": tokens,
        "delimiter": [Piece(3, "#####\n")],
        "answer": [Piece(4, "8")],
        "rest": [Piece(5, "<|end|>", True)],
        "source": "the gold answer",
        "saliency": saliency,
        "probabilities": {"suppressed": 0.25, "restored": 0.75, "unmasked": 1.0},
        "losses": [1.5, 0.5],
        "notes": [],
    }
    return HeatMap(**values | changes)


def hostile(text):
    """The text in every place where text can stand, a long one in most."""
    token = [Piece(9, text, True)] if text else []
    short = token if len(text) < 1000 else []
    return heat_map(text, label=text[:1000], question=text, source=text[:1000], notes=[text[:1000]],
                    answer=token, prompt=short, rest=short)  # fmt: skip


# ------------------------------------------------------------------------------------- aggregation


def test_sentences_tile_the_text_and_end_where_they_should():
    text = 'She has 3.5 l. "Why?" Now!\n1. First.  2 ... so\n\n\nend'
    spans = sentence_spans(text)
    assert [text[a:b] for a, b in spans] == [
        "She has 3.5 l. ", '"Why?" ', "Now!\n", "1. First.  ", "2 ... ", "so\n\n\n", "end",
    ]  # fmt: skip
    assert sentence_spans("") == []
    assert sentence_spans(" \n ") == [(0, 3)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So 5 + 3 = 8. Then", ["5 + 3 = 8"]),
        ("$1,200 - $5 = $1,195.", ["$1,200 - $5 = $1,195"]),
        ("(2 + 3) x 4=20, and 5 - 9 = -4!", ["(2 + 3) x 4=20", "5 - 9 = -4"]),
        ("<<48/2=24>>24 clips; 0.5*50% = .25", ["48/2=24"]),
        ("5 + 3\n= 8; total = 8; 5 + 3", []),
        ("2 + 2 = 4 = 8 / 2", ["2 + 2 = 4 = 8 / 2"]),
    ],
)
def test_equations_are_runs_of_numbers_with_an_equals_sign(text, expected):
    assert [text[a:b] for a, b in equation_spans(text)] == expected


def test_looping_text_takes_no_time():
    """Patterns that backtrack would take minutes for these."""
    for loop in ("1,", "1+", "-", ".", "?!\"')", "(", "=", "5 ", "$", " \t", "1.1"):
        sentence_spans(loop * 10000)
        equation_spans("5" + loop * 10000)


def test_sums_and_means_by_hand():
    tokens = [Piece(0, "Now"), Piece(1, " 1"), Piece(2, "+1"), Piece(3, "=2"), Piece(4, "."),
              Piece(5, "<|x|>", True), Piece(6, " Yes"), Piece(7, "")]  # fmt: skip
    values = [0.5, 0.25, -0.125, 1.0, 0.0, 0.0625, 2.0, -1.0]
    summed = heat_map(tokens, values, "attribution")
    # The special token stands with the full stop before it, the one without text with "Yes".
    sentences, equations = heat.stretches(summed).values()
    assert [(u.text, u.tokens, u.saliency) for u in sentences] == [
        ("Now 1+1=2. ", [0, 1, 2, 3, 4, 5], 1.6875),
        ("Yes", [6, 7], 1.0),
    ]
    assert [(u.text, u.tokens, u.saliency) for u in equations] == [("1+1=2", [1, 2, 3], 1.125)]
    assert sum(unit.saliency for unit in sentences) == sum(values)
    mean = heat_map(tokens, values, "mask")
    sentences, equations = heat.stretches(mean).values()
    assert [unit.saliency for unit in sentences] == [0.28125, 0.5]
    assert [unit.saliency for unit in equations] == [0.375]
    assert heat.strongest(mean) == ([6, 3, 0, 1, 5], [7, 2])


def test_a_sentence_in_which_no_token_begins_has_no_number():
    sentences = heat.stretches(heat_map([Piece(0, "A.\nB.")], [0.5]))["sentences"]
    assert sentences[0].saliency == 0.5 and math.isnan(sentences[1].saliency)
    assert heat.as_dict(heat_map([Piece(0, "A.\nB.")], [0.5]))["sentences"][1]["saliency"] is None


# ------------------------------------------------------------------------------------------- scale


def test_levels_are_a_fixed_scale_of_squares():
    assert [level(v, "mask") for v in (0, 0.01, 0.04, 0.25, 0.81, 1, 7)] == [0, 1, 2, 5, 9, 10, 10]
    assert [level(v, "attribution") for v in (0.02, 0.5, 2, 3)] == [1, 5, 10, 10]
    assert level(-0.25, "mask") == -5 and level(math.nan, "mask") == 0
    assert level(-math.inf, "mask") == -10
    for kind in heat.LIMIT:
        for step in range(-10, 11):
            assert level(heat.at_level(step, kind), kind) == step


def test_the_same_value_looks_the_same_in_any_company():
    trace = heat_map([Piece(0, "seen"), Piece(1, " tiny")], [0.25, 1e-9])
    beside = heat_map([Piece(0, "huge"), Piece(1, "seen")], [-5.0, 0.25])
    for form in (
        lambda heats: re.findall(r"\x1b\[[\d;]+mseen", terminal.draw([heats], colour=True)),
        lambda heats: [t["level"] for t in heat.as_dict(heats)["reasoning"] if t["text"] == "seen"],
    ):
        assert form(trace)[0] == form(beside)[0]


def luminance(red, green, blue):
    parts = [c / 255 for c in (red, green, blue)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(ink, ground):
    light, dark = sorted((luminance(*ink), luminance(*ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def rgb(colour):
    return [int(colour[n : n + 2], 16) for n in (1, 3, 5)]


def of_256(number):
    """Colour 16 to 231 of xterm's cube."""
    steps = (0, 95, 135, 175, 215, 255)
    number -= 16
    return [steps[number // 36], steps[number // 6 % 6], steps[number % 6]]


def test_text_is_readable_on_every_colour_and_colours_grow_stronger():
    for ramp in (1, -1):
        codes = [terminal.paint("x", ramp * n) for n in range(1, 11)]
        inks, grounds = zip(
            *(map(int, re.search(r"38;5;(\d+);48;5;(\d+)", code).groups()) for code in codes),
            strict=True,
        )
        for ink, ground in zip(inks, grounds, strict=True):
            assert contrast(of_256(ink), of_256(ground)) >= 4.5
        brightness = [luminance(*of_256(ground)) for ground in grounds]
        assert brightness == sorted(brightness, reverse=True) and len(set(grounds)) == 10
    assert all(
        ";4m" in terminal.paint("x", -n) and ";4m" not in terminal.paint("x", n) for n in (1, 10)
    )


# --------------------------------------------------------------------------------- untrusted text


def acts(character):
    """Whether a character is a control, has no shape or changes the direction."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("width", [40, 160])
def test_a_terminal_gets_no_control_character_of_the_text(text, width):
    heats = [hostile(text), hostile(text)]
    plain = terminal.draw(heats, width)
    assert not any(map(acts, set(plain) - {"\n"}))
    coloured = OUR_CODES.sub("", terminal.draw(heats, width, colour=True))
    assert not any(map(acts, set(coloured) - {"\n"}))
    for line in plain.split("\n"):
        assert sum(columns_of(c) for c in line) <= width
    plain.encode()  # no lone surrogate either


def test_visible_text_can_be_read_back():
    text = "plain 👍 text\x1b[0m \u202e\n"
    assert visible(text) == "plain 👍 text‹U+001B›[0m ‹U+202E›⏎\n"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_json_gives_the_text_back(text):
    trace = hostile(text)
    written = json.dumps(heat.as_dict(trace), allow_nan=False)
    assert written.isascii() and written.isprintable()
    read = json.loads(written)
    assert "".join(token["text"] for token in read["reasoning"]) == text
    assert read["question"] == text and read["label"] == read["notes"][0] == text[:1000]
    assert [token["saliency"] for token in read["reasoning"]] == trace.saliency
    for unit in read["sentences"] + read["equations"]:
        assert text[unit["start"] : unit["end"]] == unit["text"]


def test_numbers_that_are_none_do_not_break_a_form():
    trace = heat_map("abc", [math.nan], losses=[math.inf, math.nan],
                   probabilities={"restored": math.nan})  # fmt: skip
    assert "n/a" in terminal.draw([trace])
    read = json.loads(json.dumps(heat.as_dict(trace), allow_nan=False))
    assert read["reasoning"][0]["saliency"] is None and read["losses"] == [None, None]


# ---------------------------------------------------------------------------------------- terminal


def test_a_plain_terminal_shows_levels_as_marks_under_the_text():
    trace = heat_map([Piece(0, "ab"), Piece(1, "日"), Piece(2, "c\nd")], [0.25, -1.0, 1.0])
    lines = terminal.draw([trace]).split("\n")
    row = next(n for n, line in enumerate(lines) if line.startswith("reasoning"))
    assert lines[row : row + 4] == [
        "reasoning  ab日c⏎",
        "           55jjXX",
        "           d",
        "           X",
    ]


def test_colour_tells_both_directions_and_special_tokens_are_named():
    trace = heat_map(
        [Piece(0, "up"), Piece(1, "down"), Piece(2, "<|odd|>", True)], [1.0, -1.0, 0.0]
    )
    text = terminal.draw([trace], colour=True)
    assert "\x1b[38;5;231;48;5;26mup\x1b[0m" in text
    assert "\x1b[38;5;231;48;5;130;4mdown\x1b[0m" in text
    assert "<|odd|>" in text and "<|begin|>" in text and "<|end|>" in text
    assert "most re-enabled" in text and "most over-suppressed" in text
    assert "suppressed 25.0%  restored 75.0%  unmasked 100.0%" in terminal.draw([trace])


def test_two_maps_stand_side_by_side_where_they_fit():
    left, right = heat_map(label="left"), heat_map(label="right", notes=["one line more"])
    wide = terminal.draw([left, right], width=120)
    assert re.search(r"checkpoint left +│ checkpoint right\n", wide)
    columns = {line.index("│") for line in wide.split("\n")[2:-1]}
    assert len(columns) == 1
    for stacked in (
        terminal.draw([left, right], width=80),
        # a terminal that turns right-to-left text around would mix the columns
        terminal.draw([left, heat_map("שלום", label="right")], width=120),
    ):
        assert "│" not in stacked
        assert stacked.index("checkpoint left") < stacked.index("checkpoint right")


def test_long_traces_name_their_strongest_sentences():
    trace = heat_map(HOSTILE["long"], size=8)
    text = terminal.draw([trace])
    assert f"the {terminal.LISTED} strongest of 1000" in text
    assert "line 999 = 999." in text


def test_a_trace_without_a_map_says_why():
    trace = heat_map(saliency=[], losses=[], probabilities={}, failure="no delimiter")
    assert "no map     no delimiter" in terminal.draw([trace])
    assert "P(answer)" not in terminal.draw([trace])
    assert heat.as_dict(trace)["failure"] == "no delimiter"
    assert heat.as_dict(trace)["sentences"] == []


def test_probabilities_near_0_and_1_are_told_from_them():
    shown = [heat.probability(p) for p in (0, 1e-9, 0.5, 0.99999, 1.0)]
    assert shown == ["0.0%", "1.0e-07%", "50.0%", ">99.9%", "100.0%"]
