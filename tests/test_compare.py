"""Bootstrap intervals against closed forms; matched length; the journal; eval.py as a command."""

import argparse
import io
import json
import math
import os
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.measure import bootstrap
import eval as evaluation
from atman import MaskConfig, optimize_masks
from lab.measure.bootstrap import difference, interval
from lab.measure.compare import (
    DIFFERENCE_HEADS,
    Arm,
    compare_arms,
    difference_rows,
    difference_table,
    first_correct,
    map_ratios,
    matched_traces,
    nearest_lengths,
    reliance_ratios,
)
from lab.measure.folder import Journal
from model import Llama
from tests.test_eval import trained_pipeline

ROOT = Path(__file__).parent.parent


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
    found = difference(means(before), means(after), draws=20000)
    half = 1.96 * np.std(after - before) / math.sqrt(300)
    assert found["value"] == pytest.approx(np.mean(after - before))
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.05)
    apart = 1.96 * math.hypot(np.std(before), np.std(after)) / math.sqrt(300)
    assert found["high"] - found["low"] < 0.5 * 2 * apart


def test_a_difference_is_of_questions_that_both_have():
    found = difference({"a": (1, 1), "b": (5, 1)}, {"b": (6, 1), "c": (100, 1)})
    assert (found["value"], found["questions"], found["low"]) == (1.0, 1, None)
    assert difference({"a": (1, 1)}, {"b": (1, 1)})["value"] is None
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
    }
    ratios = map_ratios([row])
    assert ratios["unlabelled"] == {"a": (3.0, 60.0)}
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

    one = rows({"a": [10, 50], "b": [100], "c": [10], "d": [5]})
    other = rows({"a": [80, 54, 12], "b": [89, 111], "c": [14], "e": [5]})
    # a: 10 and 12 are nearest; b: 100 to 111 is within a tenth of 111, 89 further than of 100
    assert nearest_lengths(one, other, 0.1) == [(("a", 0), ("a", 2)), (("b", 0), ("b", 1))]
    assert nearest_lengths(one, other, 0.0) == [(("a", 0), ("a", 2))]  # 3 tokens always pass
    assert dict(nearest_lengths(one, other, 0.3))["c", 0] == ("c", 0)


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
        arm.map[problem, sample] = row | {"comprehensiveness": {"mask": [lost] * 5},
                                          "sufficiency": {"mask": [0.0] * 5}}  # fmt: skip
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
    assert traces.traces == [(("a", 1), ("a", 2)), (("b", 1), ("b", 0))]
    assert traces.map_traces == [(("a", 1), ("a", 2))]
    assert traces.of_side(0) == ([("a", 1), ("b", 1)], [("a", 1)])
    assert traces.of_side(1) == ([("a", 2), ("b", 0)], [("a", 2)])
    result = compare_arms(before, after, traces, 100, 0)
    own, matched = result["own"], result["matched"]
    assert matched["traces"] == [["a", 1, 2], ["b", 1, 0]]
    assert matched["map_traces"] == [["a", 1, 2]]
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
    printed = difference_table("one", "two", result, "by hand").split("\n")
    assert "by hand" in printed[0] and printed[1].startswith("two - one ")
    places = [printed[1].index(head) for head in DIFFERENCE_HEADS]
    assert places == sorted(places)
    back = compare_arms(after, before, matched_traces(after, before, 0.1), 100, 0)
    assert back["own"]["necessity"]["value"] == pytest.approx(-own["necessity"]["value"])


def test_maps_are_tested_of_first_correct_traces_and_of_matched_ones(unlike):
    before, after = unlike
    pairs = [("one", "two", matched_traces(before, after, 0.1)), ("x", "y", None)]
    assert evaluation.traces_to_map("one", before, pairs) == {("a", 1), ("b", 0)}
    assert evaluation.traces_to_map("two", after, pairs) == {("a", 1), ("b", 2), ("a", 2)}


def test_a_journal_keeps_what_was_finished(tmp_path):
    settings = {"--seed": 0, "--compare": ["x"]}
    rows = [{"id": "a", "sample": 0, "value": 0.1}, {"id": "a", "sample": 1, "value": None}]
    journal = Journal(tmp_path, settings)
    journal.add("stage", "arm", rows)
    with open(tmp_path / "partial.jsonl", "a") as file:
        file.write('{"stage": "stage", "arm": "arm", "ro')  # killed while writing
    again = Journal(tmp_path, settings)
    assert again.rows("stage", "arm") == {("a", 0): rows[0], ("a", 1): rows[1]}
    assert again.rows("stage", "other") == {} == again.rows("other", "arm")
    again.add("stage", "arm", [{"id": "b", "sample": 0}])
    assert len(Journal(tmp_path, settings).rows("stage", "arm")) == 3
    with pytest.raises(ValueError, match="--seed 0, this one has 1"):
        Journal(tmp_path, settings | {"--seed": 1})
    again.finish()
    assert not list(tmp_path.iterdir())


def test_a_damaged_journal_is_named(tmp_path):
    (tmp_path / "partial.jsonl").write_text("what\n")
    with pytest.raises(ValueError, match="partial.jsonl is damaged"):
        Journal(tmp_path, {})


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"settings": 5}',
        '{"x": 1}',
        '{"settings": {}}\n{"x": 1}',
        '{"settings": {}}\n5',
        '{"settings": {}}\n\n',
        '{"settings": {}}\n{"stage": "s", "arm": [], "rows": []}',
        '{"settings": {}}\n{"stage": "s", "arm": "a", "rows": [{"id": "a"}]}',
        '{"settings": {}}\n{"stage": "s", "arm": "a", "rows": [5]}',
        "[" * 100000,
    ],
)
def test_a_journal_of_another_shape_is_damaged(content, tmp_path):
    (tmp_path / "partial.jsonl").write_text(content + "\n")
    with pytest.raises(ValueError, match="partial.jsonl is damaged .*: delete it"):
        Journal(tmp_path, {})


def test_a_folder_in_a_file_s_place_is_named(tmp_path):
    (tmp_path / "partial.jsonl").mkdir()
    with pytest.raises(ValueError, match="partial.jsonl is a folder"):
        Journal(tmp_path, {})


def test_a_large_mask_is_kept_as_means_of_blocks(monkeypatch):
    monkeypatch.setattr(evaluation, "FIGURE_SIZE", 2)
    mask = torch.arange(12.0).view(4, 3)
    region = torch.ones(4, 3).tril().bool()
    # rows 0 and 1, 2 and 3; columns 0 and 1, 2: of the first block 0, 3 and 4 are inside
    assert evaluation.blocks(mask, region) == [[2.333, None], [8.0, 9.5]]
    monkeypatch.setattr(evaluation, "FIGURE_SIZE", 4)
    assert evaluation.blocks(mask, region)[1] == [3.0, 4.0, None]


def test_a_folder_of_results_is_never_taken_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.time, "strftime", lambda _: "now")
    names = []
    for _ in range(3):
        names.append(evaluation.new_folder(tmp_path).name)
        (tmp_path / names[-1]).mkdir()
    assert names == ["eval-now", "eval-now-2", "eval-now-3"]


# ------------------------------------------------------------------------- the command, in process


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second arm: data/micro with a little noise on its weights."""
    path = tmp_path_factory.mktemp("arms") / "other"
    shutil.copytree(ROOT / "data/micro", path)
    model = Llama.from_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(other, tmp_path_factory):
    """results.json and output of a command that ran through."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        results = command(other, out, patch)
    figures = {f"figure{n}.png" for n in (1, 3, 4, 5)}  # no run has trained these: no Figure 2
    assert {file.name for file in out.iterdir()} == {"results.json", "report.html", *figures}
    return results, printed.getvalue()


def command(other, out, monkeypatch, *more):
    arguments = (
        f"--model data/micro --compare {other} --limit 3 --samples 2 --mask-steps 2 "
        f"--batch-size 32 --bootstrap 200 --device cpu --out {out}"
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments.split(), *more])
    evaluation.main()
    return json.loads((out / "results.json").read_text())


def test_interrupted_and_resumed_the_results_are_the_same(other, whole, tmp_path, monkeypatch):
    corruption, calls = evaluation.corruption, []

    def interrupted_at_the_third_batch(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return corruption(*arguments)

    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "corruption", interrupted_at_the_third_batch)
        with pytest.raises(SystemExit, match="the same command goes on"):
            command(other, cut, patch)
        assert not (cut / "results.json").exists()
        with pytest.raises(SystemExit, match="--limit 3, this one has 4"):
            command(other, cut, patch, "--limit", "4")
        weights = other / "model.safetensors"
        written = weights.stat()
        os.utime(weights, (1, 1))  # another file under the same name
        with pytest.raises(SystemExit, match="weights in .* 1970-01-01"):
            command(other, cut, patch)
        os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns))
        config = other / "generation_config.json"
        text = config.read_text()
        config.write_text(text + "\n")
        with pytest.raises(SystemExit, match="generation_config.json in .* sha256"):
            command(other, cut, patch)
        config.write_text(text)
        with monkeypatch.context() as edited:
            load = evaluation.load_problems
            edited.setattr(evaluation, "load_problems", lambda *a: [
                replace(problem, question=problem.question + " ") for problem in load(*a)
            ])  # fmt: skip
            with pytest.raises(SystemExit, match="problems sha256"):
                command(other, cut, edited)
        before = len(calls)
        patch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("sampled again"))
        resumed = command(other, cut, patch)
    # 2 batches an arm: the two that were finished are not done again
    assert len(calls) - before == 4 - 2
    for key in ("models", "pairs", "versions", "seeds"):
        assert resumed[key] == whole[0][key]


@pytest.mark.parametrize("changed", ["FRACTIONS", "TOP_SHARES", "faithfulness.py", "torch"])
def test_rows_measured_by_other_code_are_refused_by_name(changed, tmp_path, monkeypatch):
    args = argparse.Namespace(mask_steps=2, mask_sparsity=0.0)
    Journal(tmp_path, evaluation.journal_settings(args, {}, []))
    Journal(tmp_path, evaluation.journal_settings(args, {}, []))  # the same: it goes on
    if changed == "torch":
        monkeypatch.setattr(evaluation.importlib.metadata, "version", lambda _: "0.1")
    elif changed == "faithfulness.py":
        monkeypatch.setattr(evaluation.faithfulness, "__file__", __file__)
    else:
        monkeypatch.setattr(evaluation, changed, (0.5,))
    with pytest.raises(ValueError, match=f"{changed} .*, this one has "):
        Journal(tmp_path, evaluation.journal_settings(args, {}, []))


def test_results_json_holds_what_its_description_says(other, whole):
    results, printed = whole
    assert printed.count("blank English") == 2  # Table 1, and the differences of the pair
    assert "reliance on the reasoning" in printed and "is the map right?" in printed
    assert "matched length" in printed
    assert results["command"].startswith("python eval.py --model data/micro --compare")
    assert results["arguments"]["limit"] == 3 and results["seeds"]["sampling"] == 0
    assert results["versions"]["torch"] == torch.__version__
    mask = {"steps": 2, "lr": 0.1, "init": -0.4, "scale": 10.0, "sparsity": 0.0}
    assert mask.items() <= results["mask_settings"]["mask"].items()
    assert "blank English" in results["versions"]["spacy_pipeline"]
    assert list(results["models"]) == [str(other), "data/micro"]
    for entry in results["models"].values():
        assert len(entry["records"]) == 6 and len(entry["reliance"]) == sum(
            record["valid"] for record in entry["records"]
        )
        for key in ("pass@1", "tokens", "numbers", "truncation", "necessity", "direct",
                    "corruption", "same answer at 20%", "comprehensiveness/mask",
                    "sufficiency 50%/random", "auroc/leave-one-out"):  # fmt: skip
            found = entry["measures"][key]
            assert found["low"] <= found["value"] <= found["high"], key
            assert len(entry["per_question"][key]) == found["questions"]
        assert entry["measures"]["pass@1"]["value"] == pytest.approx(entry["summary"]["pass@1"])
        row = entry["map"][0]
        assert len(row["scores"]["mask"]) == row["length"] and len(row["sufficiency"]["mask"]) == 5
        texts = {(r["id"], r["sample"]): r["text"] for r in entry["records"]}
        assert len(entry["traces"]) == 3
        for trace in entry["traces"]:
            text = texts[trace["id"], trace["sample"]]
            assert "".join(trace["tokens"]) == text and trace["special"] == []
            words = "".join(text[start:end] for start, end, *_ in trace["words"])
            assert words == "".join(text.split())
        mask, lasts = entry["mask"], entry["mask"]["masks"]
        assert mask["steps"] == [0, 1, 2] and len(mask["probability"]) == 3
        assert [len(lasts[0]), len(lasts[0][0])] == mask["size"]
        for one in lasts:
            assert all((v is None) == (c > r) for r, row in enumerate(one)
                       for c, v in enumerate(row))  # fmt: skip
        assert {v for row in lasts[0] for v in row} == {-0.4, None}
        assert lasts[0] != lasts[1] != lasts[2]  # two steps of 0.1 at most
        assert lasts[2][-1][0] == pytest.approx(-0.4, abs=0.21)
        assert max(abs(v + 0.4) for v in lasts[2][-1]) > 0.1
        assert entry["run"] is None
    (pair,) = results["pairs"]
    assert (pair["before"], pair["after"]) == (str(other), "data/micro")
    values = [results["models"][pair[side]]["measures"]["tokens"]["value"]
              for side in ("before", "after")]  # fmt: skip
    assert pair["own"]["tokens"]["value"] == pytest.approx(values[1] - values[0])
    matched = pair["matched"]
    assert matched["differences"]["necessity"]["questions"] == len(matched["traces"])
    lengths = [matched[side]["tokens"]["value"] for side in ("before", "after")]
    assert abs(lengths[0] - lengths[1]) <= max(3, 0.1 * max(lengths))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--compare", "data/micro"], "--model data/micro: the same checkpoint as data/micro"),
        (["--compare", "./data/micro/"], "the same checkpoint as ./data/micro/; name another"),
        (["--compare", ROOT / "data/micro"], "--model data/micro: the same checkpoint"),
        (["--bootstrap", "99"], "--bootstrap 99: must be a number of at least 100"),
        (["--compare"], "--compare: expected at least one argument"),
    ],
)
def test_bad_input_gets_a_sentence_before_the_work(more, named, tmp_path, monkeypatch, capsys):
    arguments = ["--model", "data/micro", "--device", "cpu", "--out", tmp_path / "out", *more]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(SystemExit) as refusal:
        evaluation.main()
    assert named in capsys.readouterr().err + str(refusal.value.code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["partial.jsonl", "results.json", "report.html", "figure1.png", "figure5.png"]
)
def test_a_folder_where_results_go_is_refused_first(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(ROOT)
    arguments = ["--model", "data/micro", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(SystemExit, match=f"{name} .*is a folder|{name} there is a folder"):
        evaluation.main()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_an_error_says_does_nothing_to_the_terminal(monkeypatch):
    def fail(_):
        raise ValueError("template: \x1b[2Jgone\nand more\u202e")

    monkeypatch.setattr(evaluation, "run", fail)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "x"])
    with pytest.raises(SystemExit) as refusal:
        evaluation.main()
    assert refusal.value.code == "error: template: ‹U+001B›[2Jgone\nand more‹U+202E›"


def test_results_hold_no_number_that_json_cannot():
    found = evaluation.finite(
        {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": "x"}}
    )
    assert found == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": "x"}}


def test_without_faithfulness_there_is_only_table_1(tmp_path, monkeypatch, capsys):
    """And a trained spaCy pipeline by its path."""
    trained_pipeline().to_disk(tmp_path / "tagger")
    monkeypatch.chdir(ROOT)
    arguments = "--model data/micro --limit 2 --samples 2 --faithfulness off --device cpu"
    more = ["--out", str(tmp_path), "--spacy-model", str(tmp_path / "tagger")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments.split(), *more])
    evaluation.main()
    printed = capsys.readouterr().out
    assert "spaCy, a trained tagger (en_pipeline 0.0.0)" in printed
    assert "accuracy (pass@1)" in printed and "reliance" not in printed
    (entry,) = json.loads((tmp_path / "results.json").read_text())["models"].values()
    assert entry["reliance"] == entry["map"] == [] and "necessity" not in entry["measures"]


def test_an_output_without_unicode_gets_everything(tmp_path, monkeypatch):
    """As under PYTHONIOENCODING=ascii: name, table and paths."""
    (tmp_path / "modèle").symlink_to(ROOT / "data/micro")
    monkeypatch.chdir(tmp_path)
    arguments = "--model modèle --limit 1 --samples 1 --faithfulness off --device cpu --out é"
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments.split()])
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    evaluation.main()
    printed = out.buffer.getvalue()
    assert b"mod\\xe8le" in printed and b"wrote \\xe9/results.json\n" in printed
    assert printed.endswith(b"wrote \\xe9/report.html\n")
    assert not (tmp_path / "é/partial.jsonl").exists()


def test_a_shorter_optimisation_is_the_beginning_of_a_longer_one():
    """So that Figure 1's mask half-way is that of the curve beside it."""
    model = Llama.from_pretrained(ROOT / "data/micro")
    parts = [[1, 2, 3]], [[4, 5, 6, 7]], [[8]], [[9, 10]]
    short, long = (optimize_masks(model, *parts, MaskConfig(steps=n)) for n in (3, 6))
    assert torch.equal(short.losses, long.losses[:4])


def test_a_run_is_a_name_too_and_results_have_a_folder_by_default(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(ROOT / "data/micro", run / "checkpoint")
    (run / "config.json").write_text(json.dumps({"saliency": "none", "seed": 7}))
    (run / "metrics.jsonl").write_text('{"step": 1, "outcome": -0.5, "length": 30}\n')
    monkeypatch.chdir(tmp_path)
    arguments = "--model run --limit 1 --samples 1 --faithfulness off --device cpu"
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments.split()])
    evaluation.main()
    (folder,) = (tmp_path / "runs").iterdir()
    names = {"results.json", "report.html", "figure2.png", "figure3.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert f"wrote runs/{folder.name}/report.html" in capsys.readouterr().out
    (entry,) = json.loads((folder / "results.json").read_text())["models"].values()
    assert entry["run"]["config"]["seed"] == 7 and entry["run"]["updates"] == [[1, -0.5, 30]]
    assert "baseline: trained with the outcome reward only" in (folder / "report.html").read_text()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "sample", interrupt)
    with pytest.raises(SystemExit, match="with --out runs/eval-.* goes on from here"):
        evaluation.main()
