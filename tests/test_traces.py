import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Problem, micro_task
from data.tokenizer import Tokenizer
from data.traces import (
    LETTERS,
    Rollout,
    answer_end,
    gold_number,
    gold_tail,
    parse_letter,
    parse_number,
    reasoning_spans,
    said_answer,
    same_number,
    split_trace,
)
from tests.llama_tokenizer import build_tokenizer

# What stands here often becomes one token, so that the delimiter comes in Llama 3's spellings.
TEXTS = [
    "It is 13.\n##### 13",
    "eggs #####\n 18 and #####\n\n18",
    "so #####$ 5 or ##### $5 or ##### -5",
    "###### four #### and ## and ###",
    "caf\u00e9 \u4e2d\u6587 \U0001f642 The",
    "##### B or ##### (C) or #####\n(B",
] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_directory(build_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEXTS))


def ids_of(tokenizer, *pieces):
    """One id for each piece that is a token, the ids of its bytes for any other; None is EOS."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = []
    for piece in pieces:
        if piece is None:
            ids.append(tokenizer.eos_ids[-1])
            continue
        raw = piece.encode() if isinstance(piece, str) else piece
        ids += [by_bytes[raw]] if raw in by_bytes else [by_bytes[bytes([b])] for b in raw]
    return ids


def parts(tokenizer, trace):
    return tuple(
        b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
        for ids in (trace.reasoning, trace.delimiter, trace.answer)
    )


SPELLINGS = [
    # pieces, (reasoning, delimiter, answer), number
    (["It", " is", "#####", " ", "13", None], ("It is", "##### ", "13"), "13"),
    (["It", " #####", "13", None], ("It", " #####", "13"), "13"),
    (["It", " #####\n", "18", None], ("It", " #####\n", "18"), "18"),
    (["It", " #####\n\n", "18", None], ("It", " #####\n\n", "18"), "18"),
    (["It", "#####", "\n\n", "18", None], ("It", "#####\n\n", "18"), "18"),
    (["It", ".\n", "#####", "18", None], ("It.\n", "#####", "18"), "18"),
    (["It", "##", "###", "18", None], ("It", "#####", "18"), "18"),
    (["It", "#", "#", "###", "18", None], ("It", "#####", "18"), "18"),
    (["It", "##", "##", "#", " ", " ", "1", "8"], ("It", "#####  ", "18"), "18"),
    (["It", " #####", " $", "5", None], ("It", " #####", " $5"), "5"),
    (["It", " #####", " -", "5", None], ("It", " #####", " -5"), "-5"),
    (["It", " #####$", " ", "5", None], ("It", " #####$", " 5"), "5"),
    (["It", "#####", None], ("It", "#####", ""), None),
    (["#####", "18", None], ("", "#####", "18"), "18"),
    (["\U0001f642", "#####", "\u4e2d", "7", None], ("\U0001f642", "#####", "\u4e2d7"), "7"),
    (["It", "######", "1", "#####", "2"], ("It######1", "#####", "2"), "2"),
    (["It", "#####", "#", "18", None], ("It######18", "", ""), None),
    (["#", "####", "18", "#####", "3"], ("", "#####", "18#####3"), "18"),
    (["It", " is", "18", None], ("It is18", "", ""), None),
    (["It", "####", " ", "18"], ("It#### 18", "", ""), None),
    ([None], ("", "", ""), None),
    ([], ("", "", ""), None),
]


@pytest.mark.parametrize(("pieces", "expected", "number"), SPELLINGS)
def test_split(tokenizer, pieces, expected, number):
    ids = ids_of(tokenizer, *pieces)
    trace = split_trace(ids, tokenizer)
    assert parts(tokenizer, trace) == expected
    assert trace.number == number
    assert trace.reasoning + trace.delimiter + trace.answer == ids
    assert trace.text == tokenizer.decode(ids)
    ended = bool(pieces) and pieces[-1] is None
    assert trace.truncated is (not ended and pieces != ["#", "####", "18", "#####", "3"])
    assert trace.valid is (ended and bool(expected[0]) and bool(expected[1]))
    assert not ended or trace.answer[-1] == tokenizer.eos_ids[-1]


def test_the_spellings_above_are_single_tokens(tokenizer):
    pieces = [" #####", " #####\n", " #####\n\n", ".\n", "######", " #####$", " $", " -"]
    pieces += [" B", " (", "(B"]
    assert all(len(ids_of(tokenizer, piece)) == 1 for piece in pieces)


def test_delimiters_are_counted(tokenizer):
    text = "##### 1 ##### 2 ###### 3 #### 4 #####"
    assert split_trace(tokenizer.encode(text), tokenizer).delimiter_count == 3


def test_split_amid_broken_characters(tokenizer):
    # half a character on each side of the hashes: not text, but no reason to miss them
    ids = ids_of(tokenizer, b"\xf0\x9f", "#####", b"\x99", "5", None)
    trace = split_trace(ids, tokenizer)
    assert parts(tokenizer, trace) == ("\ufffd", "#####", "\ufffd5")
    assert trace.number == "5" and trace.text == "\ufffd#####\ufffd5"


def test_every_eos_ends_a_completion(tokenizer):
    ids = ids_of(tokenizer, "It", " #####", "5")
    for eos in tokenizer.eos_ids:
        assert not split_trace([*ids, eos], tokenizer).truncated
    assert split_trace([*ids, tokenizer.pad_id], tokenizer).truncated


ANSWERS = [
    # pieces, gold, how many of them the answer takes; None: it is not complete
    (["It", " #####", "18", "\n", "So"], "18", 4),
    (["It", " #####\n", "18", "\n", "\n", "#####", "2"], "18", 4),
    (["It", "#####", "\n", " ", "\n", "18", ".\n"], "18", 7),
    (["It", "##", "###", "18", "\n"], "18", 5),
    (["It", " #####", "what", "\n", "18", "\n"], "18", 6),  # a line without a number ends none
    (["It", " #####", "Answer:", "\n", "\n", " ", "\n", "18", "\n"], "18", 9),
    (["It", "#####", "**Final answer**", "\n", "**18**", "\n"], "18", 6),
    (["It", "#####", "\\[", "\n", "\\boxed{18}", "\n", "\\]"], "18", 6),
    (["It", "#####", "a", "\n", "b", "\n", "c", "\n", "18", "\n"], "18", 8),  # but three do
    (["It", "#####", "a", "\n", "b", "\n", "18", "\n"], "18", 8),
    (["It", " #####", "a", "\n", "B", ".", " So"], "B", 6),
    (["It", " #####", "18", "\n", "B", "\n"], "B", 6),
    (["It", " #####", "B", "\n"], "", 4),  # an unknown answer may be either
    (["It", " #####", "what", "\n", "18", "\n"], "", 6),
    (["It", " #####", " ", "\u00bd", "\n"], "18", 5),
    (["It", " #####", "\n", "#####", "\n", "1"], "18", None),
    (["It", "#####", "1", "#####", "2"], "18", 5),  # '1#####' might go on as six hashes
    (["It", "#####", "1", " #####", "\n", "2"], "18", 5),
    (["It", "#####", "1", " ", "##", "###", " ", "2"], "18", 7),
    (["It", "#####", "1", " ", "##", "##", " ", "2"], "18", None),
    (["It", "#####", "1", " #####"], "18", None),
    (["It", "#####", "1", " #####", "#", "2", "\n"], "18", 7),
    (["It", "#####", "The", "#####", "2", "#####", "3"], "18", 7),
    (["It", " #####", "\n", "#####", "B", "."], "B", 6),
    (["It", "#####", "#", "18", "\n", "#####", "1", "\n"], "18", 8),  # six hashes are none
    (["It", " #####", "18"], "18", None),  # '1800' is another answer
    (["It", " #####", "18", None], "18", None),  # generate knows its EOS
    (["It", " #####", "\n\n"], "18", None),
    (["It", "\n", "18", "\n"], "18", None),
    ([], "18", None),
    (["It", " #####", " B", ".", " So"], "B", 4),
    (["It", " #####", " B", " ", "So"], "D", 4),
    (["It", " #####", " (", "B", ")", "1"], "B", 5),
    (["It", " #####", " B"], "B", None),  # 'Both'
    (["It", " #####", " B", "'", "s", "\n"], "B", None),
    (["It", " #####", " B", b"\xc3", b"\xa9", "."], "B", None),
    (["It", " #####", " A", " "], "A", None),
    (["It", " #####", " A", " ", "good", " one"], "A", None),
    (["It", " #####", " A", " ", "is", " ", "r"], "A", 6),
    (["It", " #####", " A", "\n"], "A", 4),
    (["It", " #####", " B", ".", " So"], "18", None),  # where numbers are asked for
]


@pytest.mark.parametrize(("pieces", "gold", "count"), ANSWERS)
def test_where_an_answer_is_complete(tokenizer, pieces, gold, count):
    ids = ids_of(tokenizer, *pieces)
    kept = None if count is None else len(ids_of(tokenizer, *pieces[:count]))
    assert answer_end(ids, tokenizer, "#####", gold) == kept
    # It stays so whatever follows, and until then it is not.
    longer = [[*ids, *tokenizer.encode(more)] for more in ("\n2\n", " and ##### 2", "x")]
    if kept:
        assert all(answer_end(more, tokenizer, "#####", gold) == kept for more in longer)
        assert answer_end(ids[: kept - 1], tokenizer, "#####", gold) is None
        cut, whole = split_trace(ids[:kept], tokenizer, gold=gold), split_trace(ids, tokenizer)
        assert not cut.truncated and cut.parsed(gold) == whole.parsed(gold)
    ended = bool(pieces) and pieces[-1] is None
    assert split_trace(ids, tokenizer, gold=gold).truncated == (kept is None and not ended)


@pytest.mark.parametrize("mark", ["####", "<answer>", "答:"])
def test_another_delimiter(tokenizer, mark):
    ids = tokenizer.encode(f"It is. ##### 1 ### <answer {mark} 18\nSo {mark} 2\n")
    trace = split_trace(ids, tokenizer, mark, "18")
    assert trace.reasoning_text.rstrip() == "It is. ##### 1 ### <answer" and trace.number == "18"
    assert trace.delimiter_count == 2 and trace.valid and trace.correct("18")
    end = answer_end(ids, tokenizer, mark, "18")
    assert tokenizer.decode(ids[:end]).endswith(f"{mark} 18\n")
    delimiter, answer = gold_tail(trace, "5", tokenizer)
    assert tokenizer.decode(delimiter).strip() == mark and tokenizer.decode(answer) == "5"
    # joined to what follows
    ids = tokenizer.encode(f"It is {mark}$18")
    delimiter, answer = gold_tail(split_trace(ids, tokenizer, mark), "5", tokenizer)
    assert tokenizer.decode(delimiter).strip() == mark and tokenizer.decode(answer) == "5"


def test_what_ends_an_answer_is_no_part_of_it(tokenizer):
    for end in ([None], ["\n"], [" ", "\n\n"], ["\n", None], []):
        trace = split_trace(ids_of(tokenizer, "It", "#####", " ", "18", ".", *end), tokenizer)
        assert tokenizer.decode(said_answer(trace, tokenizer)) == "18."
    assert said_answer(split_trace(ids_of(tokenizer, "#####", None), tokenizer), tokenizer) == []
    for again in (
        ["#####", "2"],
        [" #####", "\n"],
        ["\n", "##", "###", " "],
        ["\n", "#####", None],
    ):
        trace = split_trace(ids_of(tokenizer, "It", "#####", "18", ".", *again), tokenizer)
        assert tokenizer.decode(said_answer(trace, tokenizer)) == "18."
    trace = split_trace(ids_of(tokenizer, "It", "#####", "\n", "#####", "1"), tokenizer)
    assert tokenizer.decode(said_answer(trace, tokenizer)) == "#####1"


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (["It", " #####", "13", None], [" #####"]),
        (["It", "##", "###", "13", None], ["##", "###"]),  # ids as sampled, not as encoded
        (["It", "#####", " ", "13", None], ["#####", " "]),
        (["It", "#####", "\n\n", " ", "13"], ["#####", "\n\n", " "]),
        (["It", " #####", " $", "5", None], [" #####", " "]),
        (["It", " #####", " ", " -", "5", None], [" #####", " ", " "]),
        (["It", " #####", " The", None], [" #####", " "]),
        (["It", " #####$", "5", None], [" #####"]),
        (["It", " #####$", " ", "5", None], [" #####"]),
        (["It", " #####", "$", "5", None], [" #####"]),
        (["It", "#####", None], ["#####"]),
        (["It", "#####"], ["#####"]),
    ],
)
def test_gold_tail(tokenizer, pieces, kept):
    trace = split_trace(ids_of(tokenizer, *pieces), tokenizer)
    delimiter, answer = gold_tail(trace, "-1,200", tokenizer)
    assert delimiter == ids_of(tokenizer, *kept)
    assert answer == tokenizer.encode("-1200")
    assert trace.reasoning + trace.delimiter + trace.answer == ids_of(tokenizer, *pieces)


@pytest.mark.parametrize(
    ("pieces", "kept", "answer"),
    [
        (["It", "#####", " B", None], ["#####"], [" B"]),
        (["It", " #####", " ", " B", None], [" #####", " "], [" B"]),
        (["It", " #####\n", "B", None], [" #####\n"], ["B"]),
        (["It", "##", "###", "B", None], ["##", "###"], ["B"]),  # ids as sampled, not as encoded
        (["It", "##", "###", " (", "B", ")", None], ["##", "###"], [" B"]),
        (["It", "#####", "\n", "(B", ")", None], ["#####", "\n"], ["B"]),
        (["It", " #####", " The", " B", None], [" #####"], [" B"]),
        (["It", " #####$", "B", None], [" #####"], ["B"]),
        (["It", " #####$", " B", None], [" #####"], ["B"]),
        (["It", "#####", " ", None], ["#####", " "], ["B"]),
        (["It", "#####", None], ["#####"], ["B"]),
        (["It", "#####"], ["#####"], ["B"]),
    ],
)
def test_gold_tail_of_a_letter(tokenizer, pieces, kept, answer):
    trace = split_trace(ids_of(tokenizer, *pieces), tokenizer)
    assert gold_tail(trace, "B", tokenizer) == (
        ids_of(tokenizer, *kept),
        ids_of(tokenizer, *answer),
    )


def test_gold_tail_of_a_token_with_hashes_white_space_and_more(tokenizer, monkeypatch):
    ids = ids_of(tokenizer, "It", "The", "5", None)
    table = list(tokenizer._token_bytes)
    table[ids[1]] = b"##### $"  # Llama's pre-tokenizer makes no such token
    monkeypatch.setattr(tokenizer, "_token_bytes", table)
    trace = split_trace(ids, tokenizer)
    assert gold_tail(trace, "5", tokenizer)[0] == tokenizer.encode("##### ")
    delimiter, answer = gold_tail(trace, "B", tokenizer)
    assert (delimiter, answer) == (tokenizer.encode("#####"), tokenizer.encode(" B"))


def test_gold_tail_of_a_token_that_begins_inside_a_character(tokenizer, monkeypatch):
    ids = ids_of(tokenizer, b"\xc3", "The", "5", None)
    table = list(tokenizer._token_bytes)
    table[ids[1]] = b"\xa9#####$"  # no text we can train on makes such a token
    monkeypatch.setattr(tokenizer, "_token_bytes", table)
    trace = split_trace(ids, tokenizer)
    assert (trace.reasoning, trace.delimiter) == (ids[:1], ids[1:2])
    assert gold_tail(trace, "5", tokenizer)[0] == tokenizer.encode("#####")


def test_gold_tail_needs_a_delimiter_and_an_answer(tokenizer):
    with pytest.raises(ValueError, match="delimiter"):
        gold_tail(split_trace(ids_of(tokenizer, "It", None), tokenizer), "5", tokenizer)
    with pytest.raises(ValueError, match="answer"):
        gold_tail(split_trace(ids_of(tokenizer, "#####", None), tokenizer), " ,", tokenizer)


DOCS = Path(__file__).parents[1] / "docs/running.md"


def documented_answers():
    """(what stands after the delimiter, what it is read as) of the table in the docs."""
    table = DOCS.read_text(encoding="utf-8").partition("| after the delimiter |")[2]
    for row in table.partition("\n\n")[0].splitlines()[2:]:
        _, forms, reading, _ = row.split("|")
        forms = re.sub("(?<=`): .*", "", forms)  # what is said of them
        value = None if reading.strip() == "none" else reading.strip(" `")
        yield from ((form, value) for form in re.findall("`(.+?)`", forms))


@pytest.mark.parametrize(("text", "value"), list(documented_answers()))
def test_the_documented_answers(tokenizer, text, value):
    if value in LETTERS:
        assert parse_letter(text) == value
    elif value is None:
        assert parse_number(text) is None and parse_letter(text) is None
    else:
        assert parse_number(text) == value == parse_number(value)
    ids = tokenizer.encode(f"It is.\n##### {text}\n")
    for gold in ("18", "B", value) if value else ("18", "B"):
        trace = split_trace(ids, tokenizer, gold=gold)
        assert trace.correct(gold) == (gold == value)
        assert trace.parsed(gold) == value or (gold in LETTERS) != (value in LETTERS)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 18.", "18"),
        ("18.50", "18.5"),
        (" $1,200.", "1200"),
        ("1,234,567.80", "1234567.8"),
        ("\u20ac\u22125", "-5"),
        ("x=-5", "-5"),
        ("-0", "0"),
        ("-0.00", "0"),
        ("007", "7"),
        ("100", "100"),
        ("100.00", "100"),
        ("-.5", "-0.5"),
        ("so...5", "5"),
        ("0.00000000001", "0.00000000001"),
        ("-\u00a35", "-5"),
        ("**18** apples, not 20", "18"),
        ("\\boxed{-3}", "-3"),
        ("##### 7", "7"),
        ("Answer -> 5", "5"),
        ("5-year-old", "5"),
        ("18 eggs, since 9 + 9 = 18", "18"),
        ("So\n\n18\n20", "18"),
        ("1" * 40, "1" * 40),
        ("1" * 41, None),
        ("9" * 100_000, None),
        ("0." + "1" * 40, None),
        ("\u0661\u0662", None),  # digits, but not those that the gold answers are written in
        ("\u0661 or 2", None),
        ("none", None),
        ("-", None),
        ("$", None),
        ("", None),
        # lost signs
        ("-**5**", "-5"),
        ("-`5`", "-5"),
        ("--5", "-5"),
        ("The answer is - 5", "-5"),
        ("equals -\u00bd", "-0.5"),
        ("-\\boxed{5}", "-5"),
        ("-USD 5", "-5"),
        ("\u2014 5", "-5"),
        ("-\\frac12", "-0.5"),
        ("-1 1/2", "-1.5"),
        # parts of a number
        ("**1**/2", None),
        ("1\u00a0000", None),
        ("1_000", None),
        ("1{,}200", "1200"),
        ("1,\\!080", "1080"),
        ("1{,}20", None),
        ("18 hours 30 minutes", None),
        ("5 divided by 3", None),
        ("1 third of 6", None),
        ("2 thirds", None),
        ("2 thirds cup", None),
        ("2 halves make one", None),
        ("18 half dollars", "18"),
        ("5 and 6", "5"),
        ("18 m^2", "18"),
        ("18 cm\u00b2", "18"),
        ("\u00bd and a half", None),
        ("two thirds of 18", None),
        ("2 and a half hours", None),
        ("2 and three quarters", None),
        ("2 and three hundredths", None),
        ("18 eggs \u2014 3 eggs", None),
        # what stands beside a number and leaves it whole
        ("18 eggs for 2 days", "18"),
        ("18 miles in 2 hours", "18"),
        ("18 tenth graders", "18"),
        ("18 eggs because x - 9 = 9", "18"),
        ("cost\u201418", "18"),
        ("Answer -- 18", "18"),
        ("- Total: 18", "18"),
        ("1,2345", None),
        ("5E+3", None),
        ("5\u00b73", None),
        ("5 hundredths", None),
        ("5\\text{ million}", None),
        ("5 and 1/2", None),
        ("5 eggs and three = 8", None),
        ("n/5", None),
        ("1,000/4", "250"),
        ("10/4", "2.5"),
        ("-1/3", "-1/3"),
        ("5\u0663", None),
        ("5\u200b6", None),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == number
    assert number is None or parse_number(number) == number


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("1/2", "1"),
        ("2 2/3", "2"),
        ("2\u00bd", "2"),
        ("1e309", "1"),
        ("1.5e3", "1.5"),
        ("2^3", "2"),
        ("3 thousand", "3"),
        ("1 000", "1"),
        ("10,00,000", "10"),
        ("\u2013 5", "5"),
        ("- 5", "5"),
        ("minus 5", "5"),
        ("5 * 3 = 15", "5"),
    ],
)
def test_a_part_of_a_number_is_not_the_answer(tokenizer, text, gold):
    for end in ([], [tokenizer.eos_ids[0]], tokenizer.encode("\n")):
        ids = [*tokenizer.encode(f"It is.\n##### {text}"), *end]
        assert not split_trace(ids, tokenizer, gold=gold).correct(gold)
    assert not same_number(text, gold)


@pytest.mark.parametrize(
    "text",
    ["5" * 90_000, "1 " * 50_000, "-(" * 50_000 + "5", "5" + " ab" * 30_000, "5" + "a" * 90_000]
    + ["5" + "*" * 90_000, "-" * 90_000 + "5", "minus " * 20_000, "/(" * 40_000 + "5"]
    + [
        "1/" * 50_000,
        "5" + "\\frac" * 20_000,
        "-" + " " * 90_000 + "x5",
        "5" + " a" * 50_000 + "=",
        *("- " * 45_000 + "x5", "-\\a" * 30_000, "not " * 20_000 + "5", "root of " * 11_000 + "5"),
        *("-" + "$" * 90_000, "5" + " as" * 30_000, "5{,}" * 22_000, "Answer - " * 10_000 + "5"),
    ],
)
def test_a_trace_that_loops_is_read_all_the_same(text):
    assert parse_number(text) in (None, "5", "-5")


@pytest.mark.parametrize(
    ("text", "gold"),
    [("18", "18"), (" -3\n", "-3"), ("1,200.50", "1200.5"), ("$5", "5"), ("-$5", "-5")]
    + [(text, None) for text in ("", "18 eggs", "1/2", "- 5", "10,00", "1.2.3", "B", "1 000", ",")],
)
def test_gold_number(text, gold):
    assert gold_number(text) == gold


def test_same_number():
    assert same_number("18.0", "18") and same_number("$1,200", "1200") and same_number("-0", "0")
    assert not same_number("18", "-18")
    assert not same_number("18", "18.5")
    assert not any(
        same_number(*pair) for pair in [(None, None), ("18", None), ("", ""), (None, "1")]
    )


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" A\n", "A"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("_B_", "B"),
        ("'B'", "B"),
        ("B) 12", "B"),
        ("B. Baltic", "B"),
        ("B, C", "B"),
        ("B because it is", "B"),
        ("A because it is", "A"),
        ("A is correct", "A"),
        ("Answer: A is right", "A"),
        ("A or B", "A"),
        ("A assumption", None),
        ("A by-product", None),
        ("A for-profit company", None),
        ("A good answer", None),
        ("A  good answer", None),
        ("A", "A"),
        ("A.", "A"),
        ("A Good Answer", "A"),
        ("A\nbecause", "A"),
        ("answer: B", "B"),
        ("ANSWER IS B", "B"),
        ("**Answer:** B", "B"),
        ("The answer is (B).", "B"),
        ("The correct answer is option D", "D"),
        ("The final answer is: $\\boxed{\\text{(C)}}$.", "C"),
        ("the answer is A", "A"),
        ("The answer is A good one", None),
        ("Option C", "C"),
        ("choice (A)", "A"),
        ("letter B", "B"),
        ("\\boxed{B}", "B"),
        ("\\boxedB", None),
        ("$B$", "B"),
        ("##### B", "B"),
        ("a", None),
        ("b", None),
        ("option a", None),
        ("E", None),
        ("AB", None),
        ("B2", None),
        ("2B", None),
        ("2 B", None),
        ("Baltic", None),
        ("B's", None),
        ("D\u2019Artagnan", None),
        ("A's", None),
        ("\u00c4", None),
        ("I choose B", None),
        ("It is B", None),
        ("not B", None),
        ("The answer is not B", None),
        ("optionB", None),
        ("18", None),
        ("", None),
        ("the " * 20_000, None),
        ("\\" * 20_000, None),
        ("\\the" * 20_000, None),
        ("the_" * 20_000, None),
        ("*" * 100_000 + "?", None),
    ],
)
def test_parse_letter(text, letter):
    assert parse_letter(text) == letter


@pytest.mark.parametrize(
    ("pieces", "gold", "correct"),
    [
        (["It", " #####", " B", None], "B", True),
        (["It", " #####", " B", None], "C", False),
        (["It", " #####", " B", None], "5", False),
        (["It", " #####", "5", None], "5", True),
        (["It", " #####", "5", None], "B", False),
        (["It", " #####", " B", " ", "5", None], "B", True),
        (["It", " #####", " B", " ", "5", None], "5", True),  # a number is looked for further on
        (["It", " #####", " ", "5", " B", None], "B", False),
        (["It", " B", " #####", None], "B", False),
        (["It", " #####", " B"], "B", False),  # cut at the limit
        ([" #####", " B", None], "B", False),  # no reasoning
        (["It", " B", None], "B", False),
    ],
)
def test_an_answer_is_read_in_the_gold_ones_kind(tokenizer, pieces, gold, correct):
    trace = split_trace(ids_of(tokenizer, *pieces), tokenizer)
    assert trace.correct(gold) is correct
    assert trace.parsed("A") == trace.letter and trace.parsed("-3") == trace.number


def rollout_of(tokenizer, pieces, subject="", **measured):
    ids = ids_of(tokenizer, *pieces)
    problem = Problem("p/0", "How many?", "18", subject=subject)
    return Rollout(problem, [3, 4], ids, split_trace(ids, tokenizer), **measured)


RIGHT, WRONG = ["It", " #####", "18", None], ["It", " #####", "13", None]


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [(RIGHT, 0), (WRONG, -1), (RIGHT[:-1], -1), (RIGHT[1:], -1), (["It", "18", None], -1)],
)
def test_a_right_answer_costs_nothing(tokenizer, pieces, outcome):
    rollout = rollout_of(tokenizer, pieces)
    assert rollout.outcome == rollout.facts()["outcome"] == outcome
    assert rollout.record(0)["correct"] is (outcome == 0)


@pytest.mark.parametrize(
    ("saliency", "losses", "measured", "broken"),
    [
        (0.5, [2.0, 1.0, 3.0], True, False),
        (0.5, None, True, False),  # by a saliency that learns no mask
        (math.nan, None, False, False),  # there was nothing to measure
        (math.inf, [2.0, 1.0, 3.0], False, True),
        (0.5, [2.0, math.nan, 3.0], False, True),
    ],
)
def test_facts_tell_what_was_not_measured_from_what_broke(
    tokenizer, saliency, losses, measured, broken
):
    facts = rollout_of(tokenizer, RIGHT, saliency=saliency, mask_losses=losses).facts()
    assert (facts["measured"], facts["broken"]) == (measured, broken)
    assert facts["saliency"] == saliency if measured else math.isnan(facts["saliency"])
    assert facts["mask_losses"] == (losses if measured else None)


def test_facts_and_record_hold_the_trace_and_go_through_json(tokenizer):
    rollout = rollout_of(tokenizer, ["It", " ", " #####", "13", None], "anatomy", saliency=1.0)
    facts, record = rollout.facts(), rollout.record(sample=2)
    assert facts["text"] == "It  #####13" and record["text"] == "It "
    assert (facts["length"], facts["tokens"]) == (2, 5)
    assert (
        record["reasoning"] + rollout.trace.delimiter + rollout.trace.answer
        == (record["completion"])
    )
    assert facts["number"] == record["number"] == "13" and facts["gold"] == record["gold"] == "18"
    assert (record["sample"], record["subject"], record["no_delimiter"]) == (2, "anatomy", False)
    assert "subject" not in rollout_of(tokenizer, RIGHT).record(0)
    assert json.loads(json.dumps([facts, record])) == [facts, record]


class Labelled(Problem):
    labelled = True


@pytest.mark.parametrize(
    ("text", "computing"),
    [
        ("9 + 9 = 18. So.\n##### 18", True),
        ("5 + 4 = 9. Then 9 * 2 = 18.\n##### 18", True),
        ("9 + 9 = 18. So.\n##### 19", False),  # the answer rests on nothing
        ("3 + 4 = 7. So.\n##### 18", False),  # true, about something else
        ("8 + 8 = 1,800. So.\n##### $1,800", True),  # wrong, and followed
        ("We go on to 18.\n##### 18", False),
        ("9 + 9 = 18.\n##### none", False),
        ("9 + 9 = 18. So 18", None),  # no delimiter
        ("##### 18", None),  # no reasoning
    ],
)
def test_a_trace_computes_where_its_own_answer_rests_on_an_equation(tokenizer, text, computing):
    ids = [*tokenizer.encode(text), tokenizer.eos_ids[0]]
    trace = split_trace(ids, tokenizer)
    rollout = Rollout(Labelled("p/0", "How many?", "18"), [3], ids, trace)
    assert rollout.facts()["computing"] is rollout.record(0)["computing"] is computing
    cut = Rollout(Labelled("p/0", "How many?", "18"), [3], ids, split_trace(ids[:-1], tokenizer))
    unlabelled = Rollout(Problem("p/0", "How many?", "18"), [3], ids, trace)
    assert cut.computing is unlabelled.computing is None


def test_problems_of_the_micro_task_alone_have_labels():
    assert (
        micro_task.load("heldout", 1)[0].labelled and not Problem("p/0", "How many?", "18").labelled
    )


def test_reliance_that_is_not_finite_is_broken(tokenizer):
    facts = rollout_of(tokenizer, RIGHT, saliency=0.5, reliance=[0.9, 0.1, 0.5]).facts()
    assert (facts["measured"], facts["broken"], facts["reliance"]) == (True, False, [0.9, 0.1, 0.5])
    facts = rollout_of(tokenizer, RIGHT, saliency=0.5, reliance=[0.9, math.nan, 0.5]).facts()
    assert (facts["measured"], facts["broken"], facts["reliance"]) == (False, True, None)


def test_the_mask_is_learned_on_the_gold_answer(tokenizer):
    rollout = rollout_of(tokenizer, WRONG)
    delimiter, answer = gold_tail(rollout.trace, "18", tokenizer)
    assert rollout.masked_parts(tokenizer) == ([3, 4], ids_of(tokenizer, "It"), delimiter, answer)
    assert answer == tokenizer.encode("18") and answer != rollout.trace.answer[:-1]


def test_spans_of_split_characters(tokenizer):
    # "é" over two tokens, special token, a lone first byte before "a", a lone later byte
    ids = ids_of(tokenizer, "It", b"\xc3", b"\xa9", None, b"\xe4\xb8", "a", b"\x80")
    text, spans = reasoning_spans(ids, tokenizer)
    assert text == "It\u00e9\ufffda\ufffd"
    assert spans == [(0, 2), (2, 3), (3, 3), (3, 3), (3, 4), (4, 4), (4, 5), (5, 6)]
    assert reasoning_spans([], tokenizer) == ("", [])


def test_spans_follow_words(tokenizer):
    text, spans = reasoning_spans(tokenizer.encode("It is caf\u00e9 \u4e2d\u6587 13"), tokenizer)
    words = [text[start:end] for start, end in spans]
    assert words[:2] == ["It", " is"] and words[-2:] == [" ", "13"]


HASHES = ["#####", "##", "###", "#", " #####", " #####$", "######", " ", "$", " -", "5", None]
HASHES += [" B", " (", "(B", "B", "\n", "C"]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids(tokenizer, data):
    """Split and spans lose and repeat nothing, whatever is sampled."""
    common = st.sampled_from([ids_of(tokenizer, piece)[0] for piece in HASHES])
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(st.one_of(common, any_id), max_size=30))
    trace = split_trace(ids, tokenizer)
    assert trace.reasoning + trace.delimiter + trace.answer == ids
    assert bool(trace.delimiter) == (trace.delimiter_count > 0)

    # an independent reading of the text, which does not know tokens
    runs = [run for run in re.split("[^#]", trace.text) if run == "#####"]
    assert trace.delimiter_count == len(runs)
    if runs:
        delimiter, answer = gold_tail(trace, "18", tokenizer)
        assert tokenizer.decode(delimiter).rstrip().endswith("#####")
        assert answer == tokenizer.encode("18")
        check_gold_letter(trace, data.draw(st.sampled_from(LETTERS)), tokenizer)

    text, spans = reasoning_spans(ids, tokenizer)
    assert text == tokenizer.decode(ids)
    assert "".join(text[start:end] for start, end in spans) == text
    assert len(spans) == len(ids) and all(
        left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False)
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_answer_ends_at_the_same_token_however_it_arrives(tokenizer, data):
    """At whatever length a row is looked at, and what is read there is what the whole row says."""
    pieces = [*HASHES, "1", "A", "a", ".", "Both", "So", b"\xc3", b"\xa9", "\u00bd", "\n"]
    drawn = data.draw(st.lists(st.sampled_from([p for p in pieces if p]), max_size=16))
    ids = ids_of(tokenizer, "It", " ", "#####", *drawn)
    for gold in ("18", "B", ""):
        end = answer_end(ids, tokenizer, gold=gold)
        for count in range(len(ids)):
            early = answer_end(ids[:count], tokenizer, gold=gold)
            assert early == (end if end is not None and end <= count else None)
        if end is not None and gold:
            cut, whole = (split_trace(row, tokenizer, gold=gold) for row in (ids[:end], ids))
            assert cut.parsed(gold) == whole.parsed(gold) and not cut.truncated


def check_gold_letter(trace, gold, tokenizer):
    """The gold letter stands in the sampled one's place, and the ids before it are as sampled."""
    delimiter, answer = gold_tail(trace, gold, tokenizer)
    text = tokenizer.decode(trace.reasoning + delimiter + answer)
    assert text.endswith(gold) and text[:-1].rstrip(" \n\t\r\v\f").endswith("#####")
    assert answer in (tokenizer.encode(gold), tokenizer.encode(tokenizer.decode(answer)))
    assert tokenizer.decode(answer).strip() == gold
    if tokenizer.decode(trace.delimiter).rstrip().endswith("#"):  # no '#####$'
        assert delimiter == trace.delimiter
        sampled = tokenizer.token_bytes(trace.answer[0]) if trace.answer else b""
        white_space = sampled[: len(sampled) - len(sampled.lstrip())].decode()
        assert tokenizer.decode(answer) == white_space + gold
    full = [*trace.reasoning, *delimiter, *answer, tokenizer.eos_ids[0]]
    if trace.reasoning_text.strip():
        assert split_trace(full, tokenizer).correct(gold)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_decode_is_the_tokenizer_library_s(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=True)
