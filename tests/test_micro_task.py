"""The micro task: its problems, its traces, and the parser that labels them.

python -m pytest tests/test_micro_task.py
"""

import hashlib
import itertools
import operator
import random
import re
import statistics
import time

import pytest

from data import micro_task
from data.micro_labels import (
    COMPUTING,
    DECORATING,
    EQUATION,
    UNRECOGNISED,
    label_characters,
    token_labels,
)
from data.micro_task import SPLITS, decoy_steps, generate, load, trace_pieces, write_trace
from data.micro_wordings import TASKS, read_wordings

THINGS_AND_MONEY = ("collecting", "stock", "money")


@pytest.fixture(scope="module")
def problems():
    return {split: list(load(split, 1000)) for split in SPLITS}


def token_count(text):
    return len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", text))


def number(text):
    return int(text.replace("$", "").replace(",", ""))


def is_true(equation):
    left, sign, right, equals, result = equation.split(" ")
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[sign]
    return equals == "=" and number(result) == apply(number(left), number(right))


@pytest.fixture(scope="module", params=TASKS)
def some(request):
    return [p for split in SPLITS for p in load(split, 500, request.param)]


def equations_of(text):
    """(operands, result) of each equation, as numbers."""
    sides = (equation.split(" = ") for equation in EQUATION.findall(text))
    return [
        ({number(n) for n in re.split(" [-+*/] ", left)}, number(right)) for left, right in sides
    ]


def computing_text(reasoning, answer):
    labels = label_characters(reasoning, answer)
    runs = "".join(
        c if label == COMPUTING else "|" for c, label in zip(reasoning, labels, strict=True)
    )
    return [run for run in re.split(r"\|+", runs) if run]


def is_recognised(reasoning, answer):
    labels = label_characters(reasoning, answer)
    return all(
        label != UNRECOGNISED or c.isspace() for c, label in zip(reasoning, labels, strict=True)
    )


# ------------------------------------------------------------------------------------ problems


def test_a_problem_depends_on_split_and_index_alone():
    assert generate("heldout", 7) == generate("heldout", 7)
    assert generate("heldout", 7) != generate("heldout", 8)
    assert list(load("hard", 5)) == [generate("hard", index) for index in range(5)]


def test_the_draws_stay_those_that_the_checkpoint_was_trained_on(problems):
    digest, rng = hashlib.sha256(), random.Random(0)
    for split in SPLITS:
        for n, p in enumerate(problems[split][:100]):
            trace = write_trace(p, rng, decoy=n % 2 == 1)
            digest.update(f"{p.question} {trace} {p.answer}\n".encode())
    assert digest.hexdigest() == (
        "cd9fe457e526f09da50c3747dde3a6cf6fd9ff92394049fafa53953d06c587cd"
    )


def test_sizes_of_the_splits(monkeypatch):
    monkeypatch.setattr(micro_task, "generate", lambda split, index, task: index)
    assert [len(load(split)) for split in SPLITS] == [10_000, 1000, 1000, 1000]


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'test'"):
        generate("test", 0)


def test_no_question_is_in_two_splits(problems):
    questions = [p.question for split in SPLITS for p in problems[split]]
    assert len(set(questions)) > 0.99 * len(questions)  # a short one may come twice in a split
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {p.question for p in problems[one]} & {p.question for p in problems[other]}


def test_short_problems_are_sums_of_small_numbers_and_longer_ones_have_every_kind_of_step(problems):
    for p in problems["train"] + problems["heldout"]:
        (step,) = p.steps
        assert step.sign in "+-" and step.groups is None and p.domain in THINGS_AND_MONEY
        assert max(step.before, step.amount) <= 20 and step.after >= 0
    for split in ("long", "hard"):
        steps = [step for p in problems[split] for step in p.steps]
        assert {len(p.steps) for p in problems[split]} == {2, 3}
        assert {step.sign for step in steps} == set("+-*/") and any(step.groups for step in steps)
        assert {p.domain for p in problems[split]} == set(read_wordings("micro").domains)


def test_steps_lead_from_the_start_to_the_answer(problems):
    for p in [p for split in problems.values() for p in split]:
        for earlier, later in zip(p.steps, p.steps[1:], strict=False):
            assert earlier.after == later.before
        assert str(p.steps[-1].after) == p.answer
        assert all(fact in p.question for fact in [p.start, *(step.fact for step in p.steps)])
        assert p.question.endswith("?") and not re.search(r"[\[\]{}|]|  | \.", p.question)


def test_dollars_commas_and_negative_answers_occur_and_most_numbers_are_small(problems):
    def share(split, wanted):
        return sum(map(bool, map(wanted, problems[split]))) / len(problems[split])

    for split in SPLITS:
        assert 0.15 < share(split, lambda p: "$" in p.question) < 0.25
        assert share(split, lambda p: re.fullmatch(r"-?\d+", p.answer)) == 1
    for split in ("long", "hard"):
        assert 0.4 < share(split, lambda p: p.distractors) < 0.6
        assert 0.02 < share(split, lambda p: re.search(r"\d,\d{3}", p.question)) < 0.07
        assert 0.02 < share(split, lambda p: p.answer.startswith("-")) < 0.07
        assert share(split, lambda p: abs(int(p.answer)) < 1000) > 0.9
    debts = [p for p in problems["long"] if p.domain == "balance" and p.answer.startswith("-")]
    assert any("-$" in write_trace(p, random.Random(0), 0) for p in debts)


def test_wordings_are_thousands_and_words_few(problems):
    wordings = read_wordings("micro")
    names = "|".join(itertools.chain(*wordings.names.values()))
    masks = [
        (r"\d[\d,]*", "1"),
        (rf"\b({names})\b", "Mia"),
        (rf"\b({'|'.join(wordings.items)})\b", "pens"),
        (rf"\b({'|'.join(wordings.places)})\b", "shop"),
        (r"\bHe\b", "She"),
        (r"\bhe\b", "she"),
    ]
    seen, words = set(), set()
    rng = random.Random(0)
    everything = problems["train"] + problems["long"]
    for i, p in enumerate(everything):
        words.update(re.findall(r"[A-Za-z]+", p.question))
        if i % 5 == 0:
            words.update(re.findall(r"[A-Za-z]+", write_trace(p, rng, 1)))
        wording = p.question
        for pattern, replacement in masks:
            wording = re.sub(pattern, replacement, wording)
        seen.add(wording)
    assert len(seen) > 0.95 * len(everything)
    assert len(words) < 350


# -------------------------------------------------------------------------------------- traces


def test_needed_equations_are_true_and_end_in_the_answer(some):
    rng = random.Random(1)
    for p in some:
        needed = [text for text, wanted in trace_pieces(p, rng, None) if wanted]
        assert all(map(is_true, needed)), needed
        assert str(number(needed[-1].split(" ")[-1])) == p.answer


def test_irrelevant_equations_are_true_and_occur(some):
    rng = random.Random(2)
    irrelevant = []
    for p in some:
        for text, wanted in trace_pieces(p, rng, 1):
            irrelevant += [] if wanted else EQUATION.findall(text)
    assert all(map(is_true, irrelevant))
    assert len(irrelevant) > 0.7 * len(some)


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("verbosity", [0, 0.5, 1, None])
def test_parser_finds_what_the_writer_meant(some, verbosity, decoy):
    rng = random.Random(3)
    for p in some:
        pieces = trace_pieces(p, rng, verbosity, decoy)
        trace = "".join(text for text, _ in pieces)
        meant = [COMPUTING if wanted else DECORATING for text, wanted in pieces for _ in text]
        read = label_characters(trace, p.answer)
        differ = [c for a, b, c in zip(meant, read, trace, strict=True) if a != b and c != " "]
        assert not differ, (trace, p.answer)
        assert (COMPUTING in read) != decoy
        assert trace.endswith(".") and "\n" not in trace and "  " not in trace


def test_decoys_take_the_same_steps_with_other_numbers_that_are_as_long(some):
    def form(steps):
        return [(step.sign, bool(step.groups)) for step in steps]

    def lengths(steps):
        return [len(str(n)) for step in steps for n in (step.before, step.after)]

    rng, unlike = random.Random(6), 0
    for p in some:
        steps = decoy_steps(p, rng)
        assert form(steps) == form(p.steps)
        assert all(a.after == b.before for a, b in itertools.pairwise(steps))
        own = {p.steps[0].before, *(step.after for step in p.steps)}
        assert not own & {steps[0].before, *(step.after for step in steps)}
        as_long = lengths(steps) == lengths(p.steps)
        assert as_long or len(steps) > 1
        unlike += not as_long
    assert 0 < unlike < 0.05 * len(some)  # where 200 tries find none: 0 / 2 = 0


def test_a_decoy_is_true_and_does_not_result_in_the_answer(some):
    rng, operands = random.Random(7), 0
    for p in some:
        trace, answer = write_trace(p, rng, decoy=True), int(p.answer)
        assert all(map(is_true, EQUATION.findall(trace)))
        equations = equations_of(trace)
        assert answer not in [result for _, result in equations]
        operands += any(answer in numbers for numbers, _ in equations)
    # By chance: the tens of an amount that is taken apart, a distractor's number.
    assert operands < 0.03 * len(some)


def test_a_bare_decoy_looks_like_a_bare_computing_trace(problems):
    for p in problems["train"]:
        plain = [write_trace(p, random.Random(0), 0, decoy) for decoy in (False, True)]
        computing, decoy = (re.sub(r"\d", "1", trace) for trace in plain)
        assert computing == decoy and plain[0] != plain[1]


@pytest.mark.parametrize("split", SPLITS)
def test_generation_is_quick(split):
    start, slowest = time.process_time(), 0
    for index in range(2000):
        problem = generate(split, index)
        before = time.process_time()
        write_trace(problem, random.Random(index), decoy=True)
        slowest = max(slowest, time.process_time() - before)
    assert slowest < 0.05 and time.process_time() - start < 30


def test_verbosity_lengthens_the_trace_of_the_same_question(problems):
    rng = random.Random(4)
    for split, longest in (("train", 100), ("long", 200)):
        bare, half, full = (
            statistics.mean(token_count(write_trace(p, rng, v)) for p in problems[split])
            for v in (0, 0.5, 1)
        )
        assert half > 1.5 * bare and full > 1.3 * half
        computing, decoys = (
            [token_count(write_trace(p, rng, decoy=decoy)) for p in problems[split]]
            for decoy in (False, True)
        )
        assert statistics.mean(decoys) == pytest.approx(statistics.mean(computing), rel=0.08)
        assert max(computing + decoys) < longest


def test_length_without_decoration_varies_too(problems):
    p = next(p for p in problems["train"] if 10 < p.steps[0].amount < 20)  # can be split
    traces = {write_trace(p, random.Random(seed), 0) for seed in range(20)}
    assert len(traces) == 2  # plain and careful
    assert all(is_recognised(trace, p.answer) for trace in traces)
    plain, careful = sorted(traces, key=len)
    assert token_count(careful) > 1.5 * token_count(plain)


# -------------------------------------------------------------------------------------- labels


def test_an_equation_after_its_use_or_beside_it_does_not_compute():
    assert computing_text("2 + 3 = 5. 5 + 4 = 9.", "9") == ["2 + 3 = 5", "5 + 4 = 9"]
    assert computing_text("5 + 4 = 9. 2 + 3 = 5.", "9") == ["5 + 4 = 9"]
    assert computing_text("2 + 3 = 5. 5 + 4 = 9. 9 - 4 = 5.", "9") == ["2 + 3 = 5", "5 + 4 = 9"]
    assert computing_text("1 + 1 = 2. 5 + 4 = 9.", "9") == ["5 + 4 = 9"]
    assert computing_text("2 + 3 = 5. 5 + 4 = 9.", "10") == []


def test_each_earlier_equation_with_the_wanted_result_computes():
    assert computing_text("2 + 3 = 5. 1 + 4 = 5. 5 + 4 = 9.", "9") == [
        "2 + 3 = 5",
        "1 + 4 = 5",
        "5 + 4 = 9",
    ]


def test_wrong_arithmetic_computes_all_the_same():
    assert computing_text("2 + 3 = 6. 6 + 4 = 11.", "11") == ["2 + 3 = 6", "6 + 4 = 11"]


def test_numbers_are_compared_whatever_their_style():
    trace = "$1,000 + $200 = $1,200. $1200 - $1,300 = -$100."
    assert len(computing_text(trace, "-100")) == 2
    assert computing_text("27-4=23. 4 + 1 = 4.", "23") == ["27-4=23"]
    assert computing_text("1 + 3 = 4. 27-4=23.", "23") == ["1 + 3 = 4", "27-4=23"]
    assert computing_text("1.5 + 1.5 = 3.0. 3 * 2 = 6.", "6") == ["1.5 + 1.5 = 3.0", "3 * 2 = 6"]


def test_long_and_run_on_equations():
    assert computing_text("5 + 7 - 3 = 9", "9") == ["5 + 7 - 3 = 9"]
    assert computing_text("1 + 4 = 5. 5 + 7 = 12 - 3 = 9", "9") == [
        "1 + 4 = 5",
        "5 + 7 = 12 - 3 = 9",
    ]
    assert computing_text("5 + 7 = 12 - 3", "12") == ["5 + 7 = 12"]


GARBAGE = ["", "   ", "\n", "été ∑ 数 ٣", "5 + = 7", "= 9", "12 +", "9"]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_computes_nothing(garbage):
    labels = label_characters(garbage, "9")
    assert len(labels) == len(garbage)
    assert set(labels) <= {UNRECOGNISED}


@pytest.mark.parametrize("answer", ["", "nine", "∞", "1e3", "9" * 500])
def test_an_answer_that_no_equation_has_leaves_nothing_computing(answer):
    assert COMPUTING not in label_characters("4 + 5 = 9. So we are done.", answer)


def test_an_unknown_sentence_keeps_its_equation_only():
    trace = "Mia flies 4 + 5 = 9 moons. So we are done."
    labels = label_characters(trace, "9")
    assert computing_text(trace, "9") == ["4 + 5 = 9"]
    assert set(labels[:9] + labels[20:26]) == {UNRECOGNISED}
    assert set(labels[27:]) == {DECORATING}


def test_a_cut_trace_is_labelled_up_to_the_cut():
    labels = label_characters("4 + 5 = 9. So we are", "9")
    assert labels[:10] == [COMPUTING] * 9 + [DECORATING]
    assert set(labels[11:]) == {UNRECOGNISED}


@pytest.mark.parametrize("text", ["1 + " * 1500, "1" * 6000, "1 + 1 = " * 800, "- " * 3000])
def test_repetitive_samples_are_labelled_soon(text):
    start = time.process_time()
    label_characters(text, "1")
    assert time.process_time() - start < 2


def test_a_token_takes_the_label_of_most_of_its_characters():
    trace = "4 + 5 = 9. So we are done. Blah"
    spans = [(0, 1), (1, 3), (6, 10), (7, 10), (9, 10), (10, 11), (10, 13), (22, 29), (5, 5)]
    assert token_labels(trace, "9", spans) == [
        COMPUTING,
        COMPUTING,
        COMPUTING,  # "= 9.": two against one
        DECORATING,  # " 9.": one each
        DECORATING,
        UNRECOGNISED,  # white space alone
        DECORATING,
        DECORATING,
        UNRECOGNISED,  # no characters
    ]
