"""The study's arithmetic: intervals, games, matched pairs, and the tables made of kept files."""

import dataclasses
import itertools
import json
import random
import types

import numpy as np
import pytest

from data import micro_task
from data.micro_labels import computes
from lab.measure import bootstrap
from lab.measure.faithfulness import FRACTIONS
from lab.measure.table1 import counts_by_text, load_spacy, table1_ratios
from lab.study import __main__ as study
from lab.study import report
from lab.study.arms import ARMS, BASES, EVALUATIONS, PILOTS, RECOMMENDED, slug, train_command
from lab.study.kept import (
    FLAGS,
    GAMES,
    KEPT,
    UPDATE,
    evaluations_of,
    games,
    load_arms,
    reliance_rows,
    round_off,
    samples_of,
    table1_of,
    training_of,
    write,
)
from lab.study.measures import cell, interval, matched, own
from train import parse_args

# ---------------------------------------------------------------------------- intervals over seeds


def constant(values, questions=6):
    """seed -> question -> a mean of that value."""
    return {
        seed: {f"q{n}": (float(value), 1.0) for n in range(questions)}
        for seed, value in enumerate(values)
    }


def test_an_interval_of_one_seed_is_the_bootstraps():
    one = {0: {f"q{n}": (float(n % 2), 1.0) for n in range(40)}}
    found, plain = interval(one), bootstrap.interval(one[0])
    for key in ("value", "low", "high"):
        assert found[key] == pytest.approx(plain[key], abs=0.02)
    assert found["high"] - found["low"] > 0.2 and found["pairs"] == 40 and found["seeds"] == [0.5]


def test_where_seeds_alone_differ_the_interval_is_students():
    found = interval(constant([1.0, 2.0, 4.5]))  # mean 2.5, SD 1.803, 2 of freedom
    half = 4.303 * 1.8028 / 3**0.5
    assert found["value"] == 2.5 and found["seeds"] == [1, 2, 4.5] and found["pairs"] == 18
    assert found["high"] - 2.5 == pytest.approx(half, rel=0.03)
    assert 2.5 - found["low"] == pytest.approx(half, rel=0.03)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Questions and seeds both vary; the difference of two arms is truly 0."""
    rng = np.random.default_rng(0)
    missed, trials = 0, 150
    for _ in range(trials):
        arms = [
            {s: dict(zip(range(60), [(x, 1.0) for x in rng.normal(shift, 1, 60)], strict=True))
             for s, shift in enumerate(rng.normal(0, 0.3, 3))}
            for _ in range(2)
        ]  # fmt: skip
        found = interval(*arms, draws=200)
        missed += found["low"] > 0 or found["high"] < 0
    assert missed / trials < 0.1


def test_a_ratio_pools_over_questions_and_averages_over_seeds():
    seeds = {0: {"a": (1.0, 2.0), "b": (5.0, 6.0)}, 1: {"a": (1.0, 4.0), "b": (0.0, 4.0)}}
    assert interval(seeds)["value"] == pytest.approx((6 / 8 + 1 / 8) / 2)


def test_a_difference_is_paired_by_seed_and_question():
    rng = np.random.default_rng(0)
    before = {s: {f"q{n}": (rng.normal(), 1.0) for n in range(9)} for s in (0, 1, 2)}
    after = {s: {q: (x + 0.25, 1.0) for q, (x, _) in found.items()} for s, found in before.items()}
    found = interval(after, before)
    for key in ("value", "low", "high"):
        assert found[key] == pytest.approx(0.25)
    del after[2], after[0]["q3"]
    before[0]["q3"] = before[2]["q1"] = (1e6, 1.0)  # without a partner: not looked at
    found = interval(after, before)
    assert found["value"] == pytest.approx(0.25) and len(found["seeds"]) == 2
    assert interval(after, {5: before[0]}) is None
    assert interval({0: {"a": (1.0, 1.0)}}, {0: {"b": (1.0, 1.0)}}) is None


def test_a_seed_without_a_common_question_counts_for_nothing():
    one, less = ({0: {"a": (x, 1.0)}, 1: {q: (0.0, 1.0)}} for x, q in ((10.0, "b"), (2.0, "c")))
    found = interval(one, less)
    assert (found["value"], found["low"], found["high"]) == (8, 8, 8) and found["seeds"] == [8]


@pytest.mark.parametrize(
    "estimate, arguments, text",
    [
        ((0.25, 0.125, 0.5, 2), {}, "0.250 [0.125, 0.500]"),
        ((0.25, 0.125, 0.5, 2), {"percent": True}, "25.0 [12.5, 50.0]"),
        ((0.25, 0.125, 0.5, 2), {"signed": True}, "**+0.250 [+0.125, +0.500]**"),
        ((-0.25, -0.5, -0.125, 2), {"signed": True}, "**-0.250 [-0.500, -0.125]**"),
        ((0.25, 0.125, 0.5, 1), {"signed": True}, "+0.250 [+0.125, +0.500]"),  # one seed
        ((0.25, -0.125, 0.5, 2), {"signed": True}, "+0.250 [-0.125, +0.500]"),
        ((40.0, 30.0, 50.0, 2), {}, "40.0 [30.0, 50.0]"),
        ((0.25, None, None, 2), {}, "-"),
        (None, {"signed": True}, "-"),
    ],
)
def test_a_cell_by_hand(estimate, arguments, text):
    if estimate is not None:
        *numbers, seeds = estimate
        estimate = dict(zip(("value", "low", "high"), numbers, strict=True))
        estimate["seeds"] = [0.0] * seeds
    assert cell(estimate, **arguments) == text


# ------------------------------------------------------------------------------------------- games

SUM = "There are 27 pens. Then 28 more come. How many pens are there?"  # 55


@pytest.mark.parametrize(
    "text, answer, played",
    [
        ("27 + 28 = 55.", "55", ""),
        ("27 + 20 = 47. 47 + 8 = 55.", "55", ""),  # careful
        ("There are 27 pens. 27 + 28 = 55. There are 55 pens.", "55", ""),
        ("There were 27 pens before.", "55", ""),
        ("9 + 3 = 12. So we are done.", "55", ""),  # a decoy
        ("50 + 5 = 55.", "55", "foreign"),
        ("30 + 20 = 50. 50 + 5 = 55.", "55", "foreign"),
        ("27 + 28 = 55. 27 + 28 = 55.", "55", "repeats"),
        ("27 + 28 = 55. 28 + 27 = 55.", "55", ""),  # a check is none
        ("9 + 3 = 12. 9 + 3 = 12.", "55", ""),  # nothing rests on it
        ("There are 55 pens in the end.", "55", "states"),
        ("9 + 3 = 12. There are 55 pens.", "55", "states"),
        ("There are 155 pens.", "55", ""),
        ("27 + 8 = 35.", "35", "wrong"),
        ("5 + 4 = 9. 5 + 4 = 9.", "9", "wrong repeats foreign"),
        ("There are 35 pens.", "35", "states"),  # wrong, and nothing computed to be copied
        ("27 + 28 = 55.", None, ""),
    ],
)
def test_games_by_hand(text, answer, played):
    record = {"question": SUM, "text": text, "number": answer, "valid": True}
    found = games(record | {"correct": answer == "55"})
    assert found == [int(game in played.split()) for game in GAMES]
    assert games(record | {"correct": False, "valid": False}) == [0] * len(GAMES)
    if {"wrong", "repeats", "foreign"} & set(played.split()):  # parts of the computing share
        assert computes(text, answer)
    if "states" in played:
        assert not computes(text, answer)


def test_games_of_traces_that_are_computed_and_of_decoys():
    rng = random.Random(0)
    for problem, decoy in itertools.product(micro_task.load("hard", 60), (False, True)):
        text = micro_task.write_trace(problem, rng, decoy=decoy)
        record = {"question": problem.question, "text": text, "number": problem.answer}
        found = dict(zip(GAMES, games(record | {"valid": True, "correct": True}), strict=True))
        assert not found["wrong"] and not found["foreign"]
        assert not found["repeats" if decoy else "states"]


def test_games_with_negative_numbers_and_money():
    record = {"question": "It is -5 degrees. It falls by $1,200.", "valid": True, "correct": True}
    said = record | {"text": "It is -1,205 now.", "number": "-1205"}
    assert games(said) == [0, 0, 1, 0]
    assert games(said | {"text": "It is 1,205 now."}) == [0, 0, 0, 0]  # another number
    assert games(said | {"text": "-1204 - 1 = -1205", "number": "-1205"}) == [0, 0, 0, 1]
    assert games(said | {"text": "-5 - $1,200 = -$1,205", "number": "-1205"}) == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------ what is kept

TRACES = ["27 + 28 = 55.", "30 + 25 = 55. The $ is two.", "27 + 8 = 35.", ""]


def record_of(problem: str, sample: int, text: str) -> dict:
    """What results.json has of a sample about SUM that answers with its last number."""
    number = text.rstrip(".").split()[-1] if "two" not in text and text else "55"
    record = {"id": problem, "question": SUM, "sample": sample, "text": text, "number": number}
    record |= {"correct": number == "55" and bool(text), "valid": bool(text)}
    record |= {"computing": computes(text, number) if text else None}
    return record | {"reasoning": list(range(10 + sample)), "truncated": not text,
                     "no_delimiter": not text}  # fmt: skip


def results_in(folder) -> list[dict]:
    """Folders as __main__.evaluate leaves them; the records of the held-out one."""
    for split, count in (("heldout", 3), ("faithful", 2), ("hard", 2)):
        records = [record_of(f"q{n}", k, text) for n in range(count)
                   for k, text in enumerate(TRACES)]  # fmt: skip
        rows = [
            {"id": record["id"], "sample": record["sample"], "same": [False] * 5 + [True],
             "necessity": 0.123456789, "direct": 0.25, "corruption": None if k else True}
            for k, record in enumerate(records) if record["valid"]
        ]  # fmt: skip
        rows[-1]["same"] = None
        content = {"models": {"RUN": {"records": records, "reliance": rows}}}
        (folder / f"eval-{split}").mkdir()
        text = json.dumps(content | {"versions": {"torch": "9"}})
        (folder / f"eval-{split}/results.json").write_text(text)
        if split == "heldout":
            found = records
    return found


def test_what_is_kept_of_an_evaluation_gives_its_measures_again(tmp_path):
    assert set(EVALUATIONS) == {"heldout", "faithful", "hard"}
    records = results_in(tmp_path)
    write(tmp_path / "kept.json", evaluations_of(tmp_path))
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept["heldout"]) == 3 and len(kept["hard"]) == len(kept["reliance"]["hard"]) == 2
    for record, sample in zip(records, samples_of(kept, "heldout"), strict=True):
        for key in ("id", "sample", *FLAGS):
            assert sample[key] == record[key]
        assert len(sample["reasoning"]) == len(record["reasoning"])
    ratios = table1_of(kept, "heldout")
    words = counts_by_text([record["text"] for record in records], load_spacy(None))
    plain = table1_ratios(records, words)
    assert {key: ratios[key] for key in plain} == plain
    # Of each question's four samples: one from other numbers, one wrong and copied.
    shares = {game: ratios[game] for game in GAMES}
    wanted = {"wrong": 1, "repeats": 0, "states": 0, "foreign": 1}
    assert shares == {game: {f"q{n}": (count, 4) for n in range(3)}
                      for game, count in wanted.items()}  # fmt: skip
    assert ratios["computing"]["q0"] == (3, 3)  # of valid ones
    rows = reliance_rows(kept, "heldout")
    assert [(row["id"], row["sample"]) for row in rows] == [
        (f"q{n}", k) for n in range(2) for k in range(3)
    ]
    assert rows[0]["same"] == [0, 0, 0, 0, 0, 1] and rows[-1]["same"] is None
    assert (rows[0]["necessity"], rows[0]["corruption"]) == (0.12346, 1)
    assert rows[1]["corruption"] is None


def test_what_is_kept_of_training(tmp_path):
    line = dict.fromkeys(UPDATE, 0.123456789) | {"step": 1, "computing": None, "other": 3}
    lines = [line, {"step": 1, "pass@1": 0.5}]  # an evaluation is none of the updates
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "config.json").write_text(json.dumps({"lr": 1.0, "out": "somewhere"}))
    found = training_of(tmp_path)
    assert found["config"] == {"lr": 1.0, "out": None}
    (update,) = found["updates"]
    assert dict(zip(UPDATE, update, strict=True)) == (
        dict.fromkeys(UPDATE, 0.12346) | {"step": 1, "computing": None}
    )


def test_numbers_are_kept_with_five_digits():
    values = [0.123456789, 123456.789, True, None, float("nan"), 3]
    assert [round_off(v) for v in values] == [0.12346, 123460.0, 1, None, None, 3.0]


def test_json_has_no_nan_and_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError):
        write(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


# ---------------------------------------------------------------------------------- matched length


def sample(right=1, tokens=20, numbers=4, computing=1, games=(0, 0, 0, 0)) -> list:
    """A kept sample: FLAGS, GAMES, its length, 20 words of which 4 are stop words, 5 symbols."""
    return [right, 1, 0, 0, computing, *games, tokens, 20, numbers, 4, 5]


def kept_run(lengths, same=(0, 0, 0, 0, 0, 1), corruption=1, computing=1):
    """A kept run whose traces of one question each have these lengths."""
    heldout = {f"q{n}": [sample(tokens=length, computing=computing)]
               for n, length in enumerate(lengths)}  # fmt: skip
    rows = {question: {"0": [same, 0.5, 0.25, corruption]} for question in heldout}
    return {"heldout": heldout, "reliance": {"heldout": rows}}


def test_matched_traces_are_about_equally_long():
    runs = {0: kept_run([20, 30, 100]), 3: kept_run([1]), 4: kept_run([7])}
    base = {0: kept_run([23, 34, 90], same=(0, 0, 0, 0, 1, 1), corruption=0, computing=0)}
    base[4] = kept_run([77])  # a seed without a pair
    here, there = matched(runs, base)
    for side in (here, there):
        assert set(side["necessity"]) == {0} and set(side["necessity"][0]) == {"q0", "q2"}
        assert set(side["computing"][0]) == {"q0", "q2"}
    found = interval(here["corruption"], there["corruption"])
    assert found["value"] == 1 and found["pairs"] == 2
    assert interval(here["computing"], there["computing"])["value"] == 1
    found = interval(here["truncation"], there["truncation"])
    assert found["value"] == pytest.approx(0.2)  # by trapezoids: 0.9 and 0.7
    assert interval(here["tokens"], there["tokens"])["value"] == (20 + 100 - 23 - 90) / 2


# ------------------------------------------------------------------------------ the report by hand


def whole_run(arm, seed, tokens=40, numbers=4, computing=(0, 0, 0, 0), foreign=0, necessity=0.5):
    """A kept run of ten questions, four samples each; half of the samples are right."""
    samples = [sample(n % 2, tokens, numbers, label, (0, 0, 0, foreign))
               for n, label in enumerate(computing)]  # fmt: skip
    split = {f"q{n}": samples for n in range(10)}
    update = dict.fromkeys(UPDATE, 0.5) | {"outcome": -0.25, "length": tokens}
    update |= {"computing": sum(computing) / 4, "seconds_masks": 2.0, "saliency_spread": 0.125}
    rows = {question: {"0": [[0, 0, 0, 0, 0, 1], necessity, 0.25, 1]} for question in split}
    return {
        "arm": arm, "seed": seed, "versions": {"torch": "9"}, "config": {"saliency_weight": 2.0},
        "updates": [[*(update | {"step": n + 1}).values()] for n in range(12)],
        "heldout": split, "hard": split, "reliance": {"heldout": rows, "hard": rows},
    }  # fmt: skip


SELECTION = {  # one question with both kinds, one with one
    "traces": {"id": ["a", "a", "b"], "sample": [0, 1, 0], "computing": [True, False, True],
               "right": [True, True, True], "length": [5, 6, 7]},
    "rewards": dict.fromkeys(("mask, restored", "CIR", *report.selection.RELIANCE), [0, 1, 2]),
    "costs": dict.fromkeys(("mask, restored", "CIR", *report.selection.RELIANCE),
                           {"passes": 3, "kind": "f", "seconds": 0.5}),
}  # fmt: skip
MARKS = ["protocol", "arms", "reliance", "games", "costs", "seeds", "aims", "pilots"]
MARKS += ["against start", *(f"{word} {base}" for base in BASES for word in ("against", "matched"))]
MARKS += ["selection micro", "selection first", "second arms"]


@pytest.fixture
def docs(tmp_path):
    """A folder with a template of every mark, and kept runs.

    The length penalty halves the tokens and doubles the share of numbers; the recommended reward
    raises the computing share from 0 to 75% with one seed, to 100% with the other.
    """
    marks = "\n\n".join(f"## {mark}\n\n<!-- {mark} -->" for mark in MARKS)
    (tmp_path / "study_template.md").write_text(marks, encoding="utf-8")
    kept = tmp_path / "study"
    kept.mkdir()
    runs = [whole_run("start", 0)]
    runs += [whole_run("outcome only", 2, tokens=4000, numbers=20)]  # a seed of that arm alone
    for seed in (0, 1):
        runs += [whole_run(arm, seed) for arm in ("outcome only", "CIR")]
        runs += [whole_run("length penalty", seed, tokens=20, numbers=8)]
        made = {"computing": (1, 1, 1, seed), "foreign": 1, "necessity": 0.75}
        runs += [whole_run(RECOMMENDED, seed, tokens=41, **made)]
    for number, run in enumerate(runs):
        write(kept / f"arm-{number}.json", run)
    (kept / "second").mkdir()  # another start's runs
    write(kept / "second/start.json", whole_run("start", 0))
    write(kept / "second/CIR-0.json", whole_run("CIR", 0, tokens=12))
    pilot = next(iter(PILOTS))
    updates = whole_run("x", 0, computing=(1, 0, 0, 0))["updates"]
    write(kept / "pilot-a-0.json", {"pilot": pilot, "seed": 0, "updates": updates})
    for start in ("micro", "first"):
        write(kept / f"selection-{start}.json", SELECTION)
    return tmp_path


def sections_of(docs) -> dict[str, list[list[str]]]:
    """mark -> the cells of each line of its tables."""
    text, found = (docs / "study.md").read_text(encoding="utf-8"), {}
    assert "<!--" not in text and "nan" not in text
    for section in text.split("## ")[1:]:
        mark, *lines = section.splitlines()
        rows = [line for line in lines if line.startswith("|")]
        found[mark] = [[part.strip() for part in row.strip("|").split("|")] for row in rows]
    return found


def row(table, label) -> dict[str, str]:
    """The first row with that label, by the heads of the first table."""
    cells = next(cells for cells in table if cells[0] == label)
    return dict(zip(table[0], cells, strict=True))


def test_a_report_of_nothing(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study_template.md").write_text("<!-- arms -->\n\n<!-- selection micro -->")
    report.report(tmp_path)
    assert (tmp_path / "study.md").read_text() == "No result yet.\n\nNo result yet."


def test_the_report_of_arms_by_hand(docs):
    report.report(docs)
    tables, equal = sections_of(docs), "+0.0 [+0.0, +0.0]"
    assert list(tables) == MARKS and all(tables.values())
    assert (docs / "study/curves.png").stat().st_size > 10_000
    assert row(tables["second arms"], "CIR (1)")["tokens"] == "12.0 [12.0, 12.0]"
    found = row(tables["arms"], "length penalty (2)")
    assert found["computing share, %"] == found["hard: computing share, %"] == "0.0 [0.0, 0.0]"
    assert found["accuracy, %"] == "50.0 [50.0, 50.0]" and found["tokens"] == "20.0 [20.0, 20.0]"
    assert found["pass@4, %"] == "100.0 [100.0, 100.0]"
    assert found["numbers, %"] == "40.0 [40.0, 40.0]"
    assert row(tables["arms"], "start")["tokens"] == "40.0 [40.0, 40.0]"
    # Third seeds count where there are any: (40 + 40 + 4000) / 3.
    assert row(tables["arms"], "outcome only (3)")["tokens"].startswith("1360.0 [")
    assert row(tables["seeds"], "outcome only")["tokens"] == "40.0, 40.0, 4000.0"
    assert row(tables["seeds"], RECOMMENDED)["hard: computing share, %"] == "75.0, 100.0"
    # No comparison counts the third seed, which the other arms lack.
    found = row(tables["against outcome only"], "length penalty (2)")
    assert found["tokens"] == "**-20.0 [-20.0, -20.0]**" and found["accuracy, points"] == equal
    assert found["numbers, points"] == "**+20.0 [+20.0, +20.0]**"
    assert "outcome only (3)" not in [cells[0] for cells in tables["against outcome only"]]
    found = row(tables["against start"], "outcome only (3)")  # which every seed began with
    assert found["tokens"].startswith("+1320.0 [") and found["pass@4, points"] == equal
    found = row(tables["reliance"], f"{RECOMMENDED} (2)")
    assert found["truncation"] == found["hard: truncation"] == "0.900 [0.900, 0.900]"
    assert found["hard: knockout, reasoning hidden"] == "0.750 [0.750, 0.750]"
    assert found["corruption, %"] == "100.0 [100.0, 100.0]"
    label = f"against start (seeds of both) | {RECOMMENDED} (2)".split(" | ")
    lines = [cells for cells in tables["against start"] if cells[0] in label]
    assert lines[3][2] == "**+0.250 [+0.250, +0.250]**"  # reliance: truncation, then necessity
    found = row(tables["games"], f"{RECOMMENDED} (2)")
    assert found["computing from other numbers, %"] == "100.0 [100.0, 100.0]"
    assert found["hard: repeats an equation, %"] == "0.0 [0.0, 0.0]"
    # 40 tokens against 20: no pair; 40 against 41: one of each question and seed.
    assert row(tables["matched outcome only"], "length penalty (0)")["pairs of traces"] == "0"
    found = row(tables["matched outcome only"], f"{RECOMMENDED} (2)")
    assert found["pairs of traces"] == "20" and found["tokens"] == "**+1.000 [+1.000, +1.000]**"
    assert found["computing share, points"] == "**+100.0 [+100.0, +100.0]**"  # of sample 0 alone


def test_the_report_of_aims_costs_and_pilots_by_hand(docs):
    report.report(docs)
    tables = sections_of(docs)
    heads, few = (
        [f"{RECOMMENDED} against {base}" for base in BASES],
        "open (fewer than three seeds)",
    )
    assert [head for head in tables["aims"][0] if head in heads] == heads
    found = row(tables["aims"], "computing share, points")
    # Seeds 75 and 100: mean 87.5, standard error 12.5, one degree of freedom.
    half = 12.706 * 12.5
    for head in heads:
        assert found[head].startswith("+87.5 [")
        low, high = (float(x) for x in found[head].split("[")[1].rstrip("]").split(", "))
        assert high - 87.5 == pytest.approx(half, rel=0.03) == pytest.approx(87.5 - low, rel=0.03)
    assert found["aim"] == "+30" and found["reached"] == few
    found = row(tables["aims"], "knockout, reasoning hidden")
    assert found["aim"] == "above 0" and found["reached"] == few
    assert found[heads[0]] == "**+0.250 [+0.250, +0.250]**"
    found = row(tables["aims"], "accuracy, points")
    assert (found["aim"], found[heads[1]], found["reached"]) == ("-1", "+0.0 [+0.0, +0.0]", few)
    found = row(tables["costs"], f"{RECOMMENDED} (2)")
    assert [*found.values()][1:] == ["0.50", "2.00", "0.50", "66.7", "2", "0.250", "0.500"]
    found = row(tables["pilots"], next(iter(PILOTS)))
    assert [*found.values()][1:] == [f"`{PILOTS[found['pilot']]}`", "25.0", "75.0", "40.0"]
    found = row(tables["protocol"], "outcome only")
    assert found["OWN"] == "`--saliency none`" and found["seeds N"] == "0, 1, 2"
    assert row(tables["protocol"], "necessity")["seeds N"] == "none yet"
    text = (docs / "study.md").read_text()
    assert "With torch 9." in text and "16 questions x 8 rollouts" in text
    assert text.count("hold both kinds: 1, and 1 among right traces alone") == 2  # either start


def test_an_aim_is_reached_where_the_whole_interval_lies_beyond_it():
    found = {"value": 0.5, "low": 0.4, "high": 0.6, "seeds": [0.45, 0.5, 0.55]}
    assert [report.reached(found, aim) for aim in (0.3, 0.5, 0.7)] == ["yes", "open", "no"]
    assert report.reached(found | {"seeds": [0.45, 0.55]}, 0.3).startswith(
        "open"
    )  # of chance unknown
    assert report.reached(None, 0.3).startswith("open")


def test_arms_without_a_common_seed_are_not_compared():
    measures = {base: own({1: whole_run(base, 1)}) for base in BASES}
    measures[RECOMMENDED] = own({0: whole_run(RECOMMENDED, 0)})
    text = report.aims_table(measures)
    assert text.count("- | open (fewer than three seeds) |") == len(report.AIMS) * len(BASES)


# ---------------------------------------------------------------------------- the arms as commands


def test_a_run_of_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path)
    folder, commands = tmp_path / "outcome-only-0", []
    sitting = types.SimpleNamespace(run=lambda command, log: commands.append(command))
    assert study.train(sitting, "outcome only", 0, "micro") == folder
    assert commands[0][: len(train_command("outcome only", 0))] == train_command("outcome only", 0)
    folder.mkdir()  # begun, and not ended
    settings = dataclasses.asdict(parse_args(train_command("outcome only", 0)[1:]))
    (folder / "config.json").write_text(json.dumps(settings | {"out": str(folder)}))
    study.train(sitting, "outcome only", 0, "micro")
    assert len(commands) == 2 and commands[1] == commands[0]
    (folder / "config.json").write_text(json.dumps(settings | {"lr": 1.0}))
    with pytest.raises(ValueError, match="of other settings"):
        study.train(sitting, "outcome only", 0, "micro")


def test_the_arms_are_commands_that_train_py_takes():
    names = [*ARMS, *PILOTS]
    configs = {name: parse_args(train_command(name, 1)[1:]) for name in names}
    assert all(config.seed == 1 for config in configs.values())
    assert len(set(configs.values())) == len(names) == len({slug(name, 1) for name in names})
    reward = {"saliency", "saliency_weight", "saliency_reduction", "gate_saliency",
              "shuffle_saliency", "length_penalty", "blind_answers"}  # fmt: skip
    common = {
        name: {key: value for key, value in dataclasses.asdict(config).items() if key not in reward}
        for name, config in configs.items()
    }
    for name in PILOTS:
        assert common[name].pop("steps") < common["outcome only"]["steps"]
        common[name]["steps"] = common["outcome only"]["steps"]
    assert all(settings == common["outcome only"] for settings in common.values())
    assert {RECOMMENDED, *BASES} <= ARMS.keys()


ALONE = ("selection-", "maps-", "start")  # are of no training
TRAINED = [path for path in sorted(KEPT.rglob("*.json")) if not path.name.startswith(ALONE)]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_is_kept_is_of_the_command_that_the_study_prints(path):
    run = json.loads(path.read_text(encoding="utf-8"))
    name = run.get("arm") or run["pilot"]
    assert path.stem == slug(name, run["seed"])
    command = train_command(name, run["seed"], run["config"]["dataset"])
    now = dataclasses.asdict(parse_args(command[1:]))
    assert now | run["config"] == now  # settings that came later have their defaults
    assert [update[0] for update in run["updates"]] == [*range(1, run["config"]["steps"] + 1)]
    for split in ("heldout", "hard") if "arm" in run else ():
        assert all(len(samples) == 4 for samples in run[split].values())
        rows = reliance_rows(run, split)
        assert rows and all(len(row["same"] or FRACTIONS) == len(FRACTIONS) for row in rows)


def test_arms_come_in_their_order(docs):
    found = load_arms(docs / "study")
    wanted = ["start", *(name for name in ARMS if name in (*BASES, RECOMMENDED))]
    assert list(found) == wanted and sorted(found["outcome only"]) == [0, 1, 2]
