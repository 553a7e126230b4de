"""The micro task: its problems, its traces, and the parser that labels them.

python -m pytest tests/test_micro_task.py
"""

import hashlib
import random
import re
import statistics
import time

import pytest

from data import micro_task
from data import micro_wordings as wordings
from data.micro_labels import (
    COMPUTING,
    DECORATING,
    EQUATION,
    UNRECOGNISED,
    label_characters,
    token_labels,
)
from data.micro_task import SPLITS, generate, load, trace_pieces, write_trace


@pytest.fixture(scope="module")
def problems():
    return {
        split: list(load(split, count))
        for split, count in zip(SPLITS, (2000, 800, 400), strict=True)
    }


def token_count(text):
    return len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", text))


def number(text):
    return int(text.replace("$", "").replace(",", ""))


def is_true(equation):
    left, sign, right, equals, result = equation.split(" ")
    left, right = number(left), number(right)
    expected = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}
    return equals == "=" and number(result) == expected[sign]


@pytest.fixture(scope="module")
def some(problems):
    return [p for split in SPLITS for p in problems[split][:300]]


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
        for p in problems[split][:100]:
            digest.update(f"{p.question} {write_trace(p, rng)} {p.answer}\n".encode())
    assert digest.hexdigest() == (
        "7c0567bea91ea290d4fc6ca0a56c24372dfe9f036a9465c515c2d4a675438730"
    )


def test_sizes_of_the_splits(monkeypatch):
    monkeypatch.setattr(micro_task, "generate", lambda split, index: index)
    assert [len(load(split)) for split in SPLITS] == [10_000, 1000, 1000]


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'test'"):
        generate("test", 0)


def test_no_question_is_in_two_splits(problems):
    questions = {split: {p.question for p in problems[split]} for split in SPLITS}
    assert not questions["train"] & questions["heldout"]
    assert not (questions["train"] | questions["heldout"]) & questions["hard"]
    assert {len(p.steps) for p in problems["train"] + problems["heldout"]} == {1, 2, 3, 4}
    assert {len(p.steps) for p in problems["hard"]} == {5, 6}


def test_steps_lead_from_the_start_to_the_answer(problems):
    for p in [p for split in problems.values() for p in split]:
        for earlier, later in zip(p.steps, p.steps[1:], strict=False):
            assert earlier.after == later.before
        assert str(p.steps[-1].after) == p.answer
        assert all(fact in p.question for fact in [p.start, *(step.fact for step in p.steps)])
        assert p.question.endswith("?") and not re.search(r"[\[\]{}|]|  | \.", p.question)


def test_dollars_commas_and_negative_answers_occur_and_most_numbers_are_small(problems):
    train = problems["train"]
    count = len(train)
    assert 0.15 < sum("$" in p.question for p in train) / count < 0.25
    assert 0.02 < sum(bool(re.search(r"\d,\d{3}", p.question)) for p in train) / count < 0.06
    assert 0.02 < sum(p.answer.startswith("-") for p in train) / count < 0.07
    assert 0.4 < sum(bool(p.distractors) for p in train) / count < 0.6
    assert sum(abs(int(p.answer)) < 1000 for p in train) / count > 0.9
    assert all(re.fullmatch(r"-?\d+", p.answer) for p in train)
    debts = [p for p in train if p.domain == "balance" and p.answer.startswith("-")]
    assert any("-$" in write_trace(p, random.Random(0), 0) for p in debts)


def test_wordings_are_thousands_and_words_few(problems):
    names = "|".join(wordings.NAMES["She"] + wordings.NAMES["He"])
    masks = [
        (r"\d[\d,]*", "1"),
        (rf"\b({names})\b", "Mia"),
        (rf"\b({'|'.join(wordings.ITEMS)})\b", "pens"),
        (rf"\b({'|'.join(wordings.PLACES)})\b", "shop"),
        (r"\bHe\b", "She"),
        (r"\bhe\b", "she"),
    ]
    seen, words = set(), set()
    rng = random.Random(0)
    for i, p in enumerate(problems["train"]):
        words.update(re.findall(r"[A-Za-z]+", p.question))
        if i % 5 == 0:
            words.update(re.findall(r"[A-Za-z]+", write_trace(p, rng, 1)))
        wording = p.question
        for pattern, replacement in masks:
            wording = re.sub(pattern, replacement, wording)
        seen.add(wording)
    assert len(seen) > 0.95 * len(problems["train"])
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


@pytest.mark.parametrize("verbosity", [0, 0.3, 0.7, 1, None])
def test_parser_finds_what_the_writer_meant(some, verbosity):
    rng = random.Random(3)
    for p in some:
        pieces = trace_pieces(p, rng, verbosity)
        trace = "".join(text for text, _ in pieces)
        meant = [COMPUTING if wanted else DECORATING for text, wanted in pieces for _ in text]
        read = label_characters(trace, p.answer)
        differ = [c for a, b, c in zip(meant, read, trace, strict=True) if a != b and c != " "]
        assert not differ, (trace, p.answer)
        assert trace.endswith(".") and "\n" not in trace and "  " not in trace


def test_verbosity_lengthens_the_trace_of_the_same_question(problems):
    rng = random.Random(4)
    means = [
        statistics.mean(token_count(write_trace(p, rng, v)) for p in problems["train"])
        for v in (0, 0.5, 1)
    ]
    assert means[1] > 1.5 * means[0] and means[2] > 1.3 * means[1]
    everything = [token_count(write_trace(p, rng)) for p in problems["train"]]
    assert 45 < statistics.mean(everything) < 65 and max(everything) < 200


def test_length_without_decoration_varies_too(problems):
    def is_one_sum(p):  # of an amount that can be split
        first, *later = p.steps
        return not later and first.sign == "+" and not first.groups and 10 < first.amount < 20

    p = next(filter(is_one_sum, problems["train"]))
    traces = {write_trace(p, random.Random(seed), 0) for seed in range(20)}
    assert len(traces) == 2  # plain and careful
    assert all(is_recognised(trace, p.answer) for trace in traces)
    plain, careful = sorted(traces, key=len)
    assert token_count(careful) > 1.5 * token_count(plain)


def test_a_trace_repeats_with_its_seed():
    p = generate("train", 0)
    assert write_trace(p, random.Random(5)) == write_trace(p, random.Random(5))


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
