"""Bootstrap intervals against closed forms; measures by question; arms compared, matched length."""

import math

import numpy as np
import pytest

from lab.measure import bootstrap
from lab.measure.bootstrap import interval
from lab.measure.compare import (
    Arm,
    compare_arms,
    first_correct,
    map_ratios,
    matched_traces,
    nearest_lengths,
    reliance_ratios,
    traces_to_map,
)
from lab.measure.table1 import load_spacy
from lab.show.tables import DIFFERENCE_HEADS, difference_rows, difference_table


def means(values):
    return {f"q{n}": (float(value), 1.0) for n, value in enumerate(values)}


def test_the_interval_of_a_mean_is_its_closed_form():
    rng = np.random.default_rng(0)
    for values in (rng.normal(3, 2, 400), rng.random(400) < 0.3):
        found = interval(means(values), draws=20000)
        half = 1.96 * np.std(values) / math.sqrt(400)
        assert found["value"] == pytest.approx(np.mean(values)) and found["questions"] == 400
        assert found["low"] == pytest.approx(np.mean(values) - half, abs=0.05 * half)
        assert found["high"] == pytest.approx(np.mean(values) + half, abs=0.05 * half)


def test_the_interval_covers_the_truth_in_about_19_of_20_samples():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        found = interval(means(rng.normal(0, 1, 60)), draws=500)
        covered += found["low"] <= 0 <= found["high"]
    assert 0.92 < covered / 400 < 0.98


def test_a_pooled_share_weighs_questions_by_their_size():
    found = interval({"a": (1, 10), "b": (80, 90)})
    assert found["value"] == pytest.approx(0.81)
    assert found["low"] == pytest.approx(0.1) and found["high"] == pytest.approx(8 / 9)


def test_a_paired_difference_is_the_interval_of_the_differences():
    """Arms that agree on what is hard: pairing takes the questions' own spread out."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, 300)
    before, after = hard + rng.normal(0, 1, 300), hard + 0.5 + rng.normal(0, 1, 300)
    found = interval(means(after), means(before), draws=20000)
    half = 1.96 * np.std(after - before) / math.sqrt(300)
    assert found["value"] == pytest.approx(np.mean(after - before))
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.05)
    apart = 1.96 * math.hypot(np.std(before), np.std(after)) / math.sqrt(300)
    assert found["high"] - found["low"] < 0.5 * 2 * apart


def test_a_difference_is_of_questions_that_both_have():
    found = interval({"b": (6, 1), "c": (100, 1)}, {"a": (1, 1), "b": (5, 1)})
    assert (found["value"], found["questions"], found["low"]) == (1.0, 1, None)
    assert interval({"b": (1, 1)}, {"a": (1, 1)})["value"] is None
    assert interval({})["value"] is None and interval({"a": (0, 0)})["value"] is None


@pytest.mark.filterwarnings("error")
def test_an_unknown_bound_is_none_and_never_nan(monkeypatch):
    ratios = {"a": (1, 2), "b": (0, 0), "c": (0, 0)}
    assert interval(ratios)["low"] == interval(ratios)["high"] == 0.5  # draws without "a" are left
    only = np.array([[0.0, 2.0, 1.0]] * 3)  # never "a"
    monkeypatch.setattr(bootstrap, "resamples", lambda *_: only)
    assert interval(ratios) == {"value": 0.5, "low": None, "high": None, "questions": 3}
    assert interval({"a": (math.nan, 1), "b": (1, 1)})["value"] is None
    assert interval({"a": (1, 0), "b": (1, 0)})["value"] is None


def test_reliance_by_question_by_hand():
    """A mean over a question's traces; what could not be measured is left out."""
    flat, late = [True] * 6, [False] * 5 + [True]
    rows = [
        {"id": "a", "same": flat, "necessity": 0.1, "direct": 0.3, "corruption": True},
        {"id": "a", "same": late, "necessity": 0.3, "direct": None, "corruption": False},
        {"id": "b", "same": None, "necessity": 0.6, "direct": 0.0, "corruption": None},
    ]
    ratios = reliance_ratios(rows)
    assert ratios["truncation"] == {"a": (pytest.approx(0.45), 1.0)}
    assert ratios["same answer at 80%"] == {"a": (0.5, 1.0)}
    assert ratios["necessity"] == {"a": (pytest.approx(0.2), 1.0), "b": (0.6, 1.0)}
    assert ratios["direct"] == {"a": (0.3, 1.0), "b": (0.0, 1.0)}
    assert ratios["corruption"] == {"a": (0.5, 1.0)}


def test_aopc_is_the_mean_over_shares():
    row = {
        "id": "a",
        "comprehensiveness": {"mask": [0.1, 0.2, 0.3, 0.4, 1.0]},
        "sufficiency": {"mask": [0.5, 0.4, 0.3, 0.2, 0.1]},
        "auroc": {"all tokens": {"mask": 0.7}, "no punctuation": {"mask": None}},
        "unlabelled": [3, 60],
        "overshoot": 0.25,
    }
    ratios = map_ratios([row, row | {"id": "b", "overshoot": 0.0}])
    assert ratios["overshoot"] == {"a": (0.25, 1.0), "b": (0.0, 1.0)}
    assert ratios["overshot"] == {"a": (1.0, 1.0), "b": (0.0, 1.0)}
    assert ratios["unlabelled"] == {"a": (3.0, 60.0), "b": (3.0, 60.0)}
    assert ratios["comprehensiveness/mask"]["a"] == (pytest.approx(0.4), 1.0)
    assert ratios["sufficiency/mask"]["a"] == (pytest.approx(0.3), 1.0)
    assert ratios["comprehensiveness 20%/mask"]["a"] == (0.4, 1.0)
    assert ratios["auroc/mask"]["a"] == (0.7, 1.0) and "auroc no punctuation/mask" not in ratios


def test_matched_pairs_are_the_nearest_in_length():
    def rows(lengths):
        return [
            {"id": name, "sample": n, "reasoning": [0] * length}
            for name, row in lengths.items()
            for n, length in enumerate(row)
        ]

    before = rows({"a": [10, 50], "b": [100], "c": [10], "d": [5]})
    after = rows({"a": [80, 54, 12], "b": [89, 111], "c": [14], "e": [5]})
    # a: 10 and 12 are nearest; b: 100 to 111 is within a tenth of 111, 89 further than of 100
    assert nearest_lengths(before, after, 0.1) == [("a", 0, 2), ("b", 0, 1)]
    assert nearest_lengths(before, after, 0.0) == [("a", 0, 2)]  # 3 tokens always pass
    assert ("c", 0, 0) in nearest_lengths(before, after, 0.3)


def arm_of(traces):
    """(question, sample, length, correct, necessity, comprehensiveness of the mask) of each."""
    records, words = [], []
    arm = Arm(records, words)
    for problem, sample, length, correct, necessity, lost in traces:
        row = {"id": problem, "sample": sample, "length": length}
        records.append(row | {"correct": correct, "valid": True, "reasoning": [0] * length,
                              "truncated": False, "no_delimiter": False})  # fmt: skip
        words.append({"tokens": 10, "numbers": sample, "stop_words": 0, "symbols": 0})
        arm.reliance[problem, sample] = row | {"same": None, "necessity": necessity,
                                               "direct": None, "corruption": None}  # fmt: skip
        arm.maps[problem, sample] = row | {"comprehensiveness": {"mask": [lost] * 5},
                                          "sufficiency": {"mask": [0.0] * 5},
                                          "overshoot": 0.0}  # fmt: skip
    return arm


@pytest.fixture
def unlike():
    """Two arms by hand. The first samples are valid and wrong, the numbers differ by side."""
    before = arm_of([
        ("a", 0, 90, False, 0.1, 0.9),
        ("a", 1, 40, True, 0.2, 0.3),
        ("b", 0, 100, True, 0.4, 0.5),
        ("b", 1, 20, False, 0.6, 0.9),
        ("c", 0, 60, False, 0.5, 0.9),
        ("c", 1, 60, False, 0.5, 0.9),
    ])  # fmt: skip
    after = arm_of([
        ("a", 0, 9, False, 0.7, 0.8),
        ("a", 1, 10, True, 0.9, 0.7),
        ("a", 2, 41, True, 0.3, 0.4),
        ("b", 0, 20, False, 0.5, 0.8),
        ("b", 2, 30, True, 0.9, 0.6),
    ])  # fmt: skip
    return before, after


def test_the_first_correct_trace_is_correct_and_the_first(unlike):
    before, after = unlike
    assert first_correct(before.records) == [("a", 1), ("b", 0)]
    assert first_correct(after.records) == [("a", 1), ("b", 2)]
    mapped = after.own()["comprehensiveness/mask"]
    assert {q: top for q, (top, _) in mapped.items()} == pytest.approx({"a": 0.7, "b": 0.6})


def test_a_pair_of_arms_by_hand(unlike):
    """after - before, question by question, at own lengths and on the matched traces."""
    before, after = unlike
    traces = matched_traces(before, after, 0.1)
    # a: 40 and 41; b: of the valid 20 and 20, of the correct 100 and 30, which are too far apart
    result = compare_arms(before, after, traces, 100, 0)
    own, matched = result["own"], result["matched"]
    assert matched["traces"] == traces["traces"] == [("a", 1, 2), ("b", 1, 0)]
    assert matched["map_traces"] == [("a", 1, 2)]
    values = {
        # a: means (0.7 + 0.9 + 0.3) / 3 and 0.15; b: 0.7 and 0.5
        "necessity": (own, ((1.9 / 3 - 0.15) + (0.7 - 0.5)) / 2, 2),
        "comprehensiveness/mask": (own, ((0.7 - 0.3) + (0.6 - 0.5)) / 2, 2),
        "tokens": (own, (60 + 50) / 5 - (130 + 120) / 4, 2),  # a mean over samples
    }
    for key, (found, value, questions) in values.items():
        assert found[key]["value"] == pytest.approx(value), key
        assert found[key]["questions"] == questions, key
    found = matched["differences"]
    assert found["necessity"]["value"] == pytest.approx(((0.3 - 0.2) + (0.5 - 0.6)) / 2)
    assert found["tokens"]["value"] == pytest.approx((1 + 0) / 2)
    assert found["comprehensiveness/mask"]["value"] == pytest.approx(0.4 - 0.3)
    assert found["comprehensiveness/mask"]["questions"] == 1
    assert [matched[side]["tokens"]["value"] for side in ("before", "after")] == [30, 30.5]
    assert [matched[side]["necessity"]["value"] for side in ("before", "after")] == [
        pytest.approx(0.4),
        pytest.approx(0.4),
    ]

    rows = dict(difference_rows(result))
    cells = rows["map: comprehensiveness, mask"]
    assert cells[0].startswith("+0.250 [") and cells[1:] == ["+0.100", "1"]
    cells = rows["knockout: reasoning hidden (nats)"]
    assert cells[0].startswith("+0.342 [") and cells[1].startswith("+0.000 [") and cells[2] == "2"
    printed = difference_table("one", "two", result, load_spacy(None)).split("\n")
    assert "blank English" in printed[0] and printed[1].startswith("two - one ")
    places = [printed[1].index(head) for head in DIFFERENCE_HEADS]
    assert places == sorted(places)
    back = compare_arms(after, before, matched_traces(after, before, 0.1), 100, 0)
    assert back["own"]["necessity"]["value"] == pytest.approx(-own["necessity"]["value"])


def test_maps_are_tested_of_first_correct_traces_and_of_matched_ones(unlike):
    before, after = unlike
    pairs = [("one", "two", matched_traces(before, after, 0.1)), ("x", "y", None)]
    assert traces_to_map("one", before, pairs) == {("a", 1), ("b", 0)}
    assert traces_to_map("two", after, pairs) == {("a", 1), ("b", 2), ("a", 2)}
