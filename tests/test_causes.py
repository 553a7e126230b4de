"""Why samples have no answer: each cause by samples written for it, and no advice that misses."""

import random
from types import SimpleNamespace

import pytest

from data import load_problems
from data.micro_task import write_trace
from lab.run.causes import causes, in_circles, no_delimiter


def settings(**changes):
    return SimpleNamespace(**{"dataset": "gsm8k", "shots": 0, "delimiter": "#####"} | changes)


def said(*texts, cut=False, delimiter=False):
    return [{"text": t, "truncated": cut, "no_delimiter": not delimiter} for t in texts]


GOOD = said("She sold 48 + 24 = 72.", delimiter=True)
SHOTS, WARM, HIGHER = "--shots 4", "lab.study.warm_start", "a higher --max-new-tokens than 200"
CIRCLES = [
    "".join(f"Step {n}: she sold {n * n}.\n" for n in range(30)),
    "It is $3. " * 60,
]
PROSE = "Natalia sold half as many clips in May, so we divide the 48 of April by two and get 24,"


@pytest.mark.parametrize(
    ("texts", "cut", "kind", "mark"),
    [
        (["72 it is.\n#### 72", "So.\n\n#### $1,200.50", "####-3", "#### 72 clips", "#### **72**"],
         False, "wrote #### before the answer", "####"),
        (["So\n### 72", "### 5 apples left.", "So\n### 72\n\nQuestion: How many?\nAnswer: 7",
          "So\n### 72\n### 72\n### 7"], False, "wrote ### before the answer", "###"),
        (["The choice:\n#### B", "####(C)"], True, "wrote #### before the answer", "####"),
        (["It is ###### 72"], False, "wrote ###### before the answer", "######"),
        ([r"Hence $\boxed{72}$.", "\\[\\boxed{5}\\]"], False, r"wrote \boxed{", ""),
        (["The answer is 72.", "so the answer is: 5", "Answer: 72", "The final answer is 9"],
         False, 'wrote "the answer is"', ""),
        ([PROSE, "The answer is that next.", "", "### Step 1: divide\n24", "#### 1. Add the clips",
          "## A good plan", "# 72", "## 1 First\nWe add.\n\n## 2 Then\nWe halve, which is all.",
          "### 3\n\n" + PROSE], False, "ended without marking an answer", ""),
        (CIRCLES, True, "went in circles until cut", ""),
        ([PROSE, "She"], True, "ran into --max-new-tokens", ""),
    ],
)  # fmt: skip
def test_each_kind_is_named_and_gets_the_advice_that_fits(texts, cut, kind, mark):
    for text in texts:  # alone, as atman.py has them
        what, helps = no_delimiter(said(text, cut=cut), settings(), 200)
        assert what == f"it {kind}", text
        advised = [advice in helps for advice in ("--delimiter", SHOTS, WARM, HIGHER)]
        assert advised == [bool(mark), True, True, kind.startswith("ran into")], text
        assert not mark or f'--delimiter "{mark}"' in helps
        assert "--seed" not in helps


def test_shares_examples_and_advice_of_many():
    samples = said("one #### 1", "two #### 2", "three #### 3") + said("four\x1b[31m\u202e") + GOOD
    share, examples, helps = causes(samples, settings(), 200)
    assert share == (
        "80% of 5 samples have no delimiter ##### and count as wrong: "
        "75% wrote #### before the answer, 25% ended without marking an answer"
    )
    assert examples == r"they end like 'one #### 1' and 'four\x1b[31m\u202e'"
    assert helps.startswith('what helps: --delimiter "####", which takes what it writes; --shots 4')
    long = said("x" * 500 + "\nend")
    assert causes(long, settings(), 200)[1] == f"they end like '{'x' * 56}\\nend'"


def test_no_advice_that_does_not_fit():
    def advice(samples, **changes):
        return causes(samples, settings(**changes), 200)[-1]

    # Another delimiter than most obey is none to ask for.
    mixed = GOOD * 3 + said("#### 1", "#### 2", "nothing")
    assert "--delimiter" not in advice(mixed) and SHOTS in advice(mixed)
    assert '--delimiter "#####"' in advice(said("##### 1"), delimiter="<answer>")
    assert "--shots" not in advice(said("no"), shots=4) and WARM in advice(said("no"), shots=4)
    assert WARM not in advice(said("no"), dataset="mmlu")
    assert "a model that follows" in advice(said("no"), dataset="mmlu", shots=8)
    # A higher limit is for those alone who would go on to an answer.
    assert HIGHER in advice(said(PROSE, "She", cut=True) + said("no"))
    assert HIGHER not in advice(said(PROSE, cut=True) + said("no"))
    assert HIGHER not in advice(said(*CIRCLES, PROSE, cut=True))
    # Who rambles where reference solutions have long ended would ramble on.
    assert "--max-new-tokens than" not in causes(said(PROSE, "She", cut=True), settings(), 1024)[-1]


def test_who_obeys_hears_of_the_limit_only_where_many_are_cut():
    ends = said(PROSE, "She", cut=True)
    assert causes(GOOD * 20 + ends, settings(), 200) == []
    assert causes(GOOD * 8 + ends, settings(), 200) == [
        "20% of 10 samples are cut at --max-new-tokens 200 and count as wrong; raise it"
    ]
    # Nor is a limit raised that the data set's solutions do not reach, or by an endless answer.
    (longer,) = causes(GOOD * 8 + ends, settings(), 1024)
    assert longer.endswith("count as wrong; the solutions of gsm8k are shorter")
    (answer,) = causes(GOOD * 8 + said("#####", "#####", cut=True, delimiter=True), settings(), 200)
    assert answer.endswith("most of these have the delimiter, and no answer that ends")
    (circles,) = causes(GOOD * 8 + said(*CIRCLES, cut=True), settings(), 200)
    assert "20% of 10 samples" in circles and "a higher limit would not end" in circles
    assert causes(GOOD * 6 + ends + said("no", "no"), settings(), 200) == []  # most were not cut
    assert causes(GOOD, settings(), 200) == causes([], settings(), 200) == []


def test_ordinary_traces_do_not_go_in_circles():
    hard = load_problems("micro", "hard", limit=50)
    texts = [write_trace(problem, random.Random(0)) for problem in hard]
    assert not any(in_circles({"text": text}) for text in [*texts, PROSE, "", "a" * 9])
    assert all(in_circles({"text": PROSE + text}) for text in CIRCLES)
