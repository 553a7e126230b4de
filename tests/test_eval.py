"""eval.py as a command, its samples, and its folder: what an interruption leaves, who may go on."""

import io
import json
import math
import os
import re
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
from atman import MaskConfig
from data import Problem, load_problems
from data.prompts import Prompting
from data.tokenizer import Tokenizer
from data.traces import Rollout, split_trace
from eval import sample_problems
from lab.measure import arms, faithfulness, folder
from lab.measure.arms import Checkpoint, blocks, in_groups
from lab.measure.compare import key_of
from lab.measure.folder import EvalFolder, depends_on, new_folder
from lab.run import sampling
from lab.run.checkpoint import load_llama, save_llama
from lab.run.ranks import Progress
from lab.run.suffix import learn_masks
from tests.commands import ROOT, done, refused
from tests.test_table1 import trained_pipeline


@pytest.fixture(scope="module")
def micro():
    return load_llama("data/micro"), Tokenizer.from_directory("data/micro")


# ----------------------------------------------------------------------------------------- samples


def test_samples_do_not_depend_on_batch_or_company(micro):
    problems = load_problems("micro", "heldout", limit=5)

    def texts(problems, **options):
        options = {"samples": 2, "max_new_tokens": 64} | options
        records = sample_problems(*micro, problems, Prompting("micro"), **options)
        return {(r["id"], r["sample"]): r["text"] for r in records}

    everything = texts(problems)
    assert len(everything) == 10 and texts(problems, batch_size=3) == everything
    assert texts(problems[3:]).items() <= everything.items()
    assert texts(problems, seed=1) != everything


def test_greedy_samples_of_a_problem_are_sampled_once(micro, monkeypatch):
    problems, asked = load_problems("micro", "heldout", limit=3), []
    sample, counted = evaluation.sample, []
    monkeypatch.setattr(evaluation, "sample", lambda *a: asked.append(len(a[2])) or sample(*a))
    options = {"temperature": 0.0, "max_new_tokens": 24, "progress": counted.append}
    records = sample_problems(*micro, problems, Prompting("micro"), samples=4, **options)
    assert asked == [3] and sum(counted) == 12
    assert [(r["id"], r["sample"]) for r in records] == [
        (problem.id, n) for problem in problems for n in range(4)
    ]
    assert [r["text"] for r in records[::4]] == [r["text"] for r in records[3::4]]
    assert len({r["text"] for r in records}) == 3


def test_a_record_has_the_letter_and_the_subject(micro, monkeypatch):
    model, tokenizer = micro
    said = tokenizer.encode("It has 3 sides.\n##### (B) 3") + [tokenizer.eos_ids[0]]
    monkeypatch.setattr(sampling, "generate", lambda _, prompts, *a, **b: [said] * len(prompts))

    def only(problem, dataset):
        return sample_problems(model, tokenizer, [problem], Prompting(dataset), samples=1)[0]

    letter = only(Problem("m/0", "Which?", "B", subject="shapes"), "mmlu")
    assert (letter["number"], letter["correct"], letter["subject"]) == ("B", True, "shapes")
    wrong = only(Problem("m/1", "Which?", "C", subject="shapes"), "mmlu")
    assert (wrong["number"], wrong["correct"]) == ("B", False)
    number = only(Problem("g/0", "How many?", "3"), "gsm8k")
    assert (number["number"], number["correct"]) == ("3", True) and "subject" not in number


def test_the_shipped_model_computes_or_decorates_and_only_hard_problems_tell(micro):
    """Short problems are right after either kind of trace, hard ones after computing alone."""

    def accuracies(split):
        problems = load_problems("micro", split, limit=30)
        options = {"samples": 4, "max_new_tokens": 320}
        records = sample_problems(*micro, problems, Prompting("micro"), **options)
        kinds = [
            [r["correct"] for r in records if r["computing"] is kind] for kind in (True, False)
        ]
        assert 0.3 < len(kinds[0]) / len(records) < 0.7
        lengths = [[len(r["reasoning"]) for r in records[n : n + 4]] for n in range(0, 120, 4)]
        assert sum(max(group) - min(group) for group in lengths) / 30 > 15
        return [sum(right) / len(right) for right in kinds]

    assert min(accuracies("heldout")) > 0.8
    computing, decoys = accuracies("hard")
    assert computing > decoys + 0.3


# -------------------------------------------------------------------------- the mask of Figure 1


def test_a_large_mask_is_kept_as_means_of_blocks(monkeypatch):
    monkeypatch.setattr(arms, "FIGURE_SIZE", 2)
    mask = torch.arange(12.0).view(4, 3)
    region = torch.ones(4, 3).tril().bool()
    # rows 0 and 1, 2 and 3; columns 0 and 1, 2: of the first block 0, 3 and 4 are inside
    assert blocks(mask, region) == [[2.333, None], [8.0, 9.5]]
    monkeypatch.setattr(arms, "FIGURE_SIZE", 4)
    assert blocks(mask, region)[1] == [3.0, 4.0, None]


def test_a_shorter_optimisation_is_the_beginning_of_a_longer_one(micro):
    """So that Figure 1's mask half-way is that of the curve beside it."""
    parts = [([1, 2, 3], [4, 5, 6, 7], [8], [9, 10])]
    short, long = (learn_masks(micro[0], parts, MaskConfig(steps=n)) for n in (3, 6))
    assert torch.equal(short.losses, long.losses[:4])


# -------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("count", "most", "seconds_of", "expected"),
    [
        (100, 64, lambda g: 0.1 * len(g), [1, 4, 16, 64, 15]),
        (150, 64, lambda g: 2.0 * len(g), [1, 4, 16, 64, 32, 16, 17]),  # 128 s: too long
        (3, 64, lambda g: 200.0 * len(g), [1, 1, 1]),
        (100, 16, lambda g: 46.0, [1, 4, 16, 16, 16, 16, 16, 15]),  # however many there are
        (
            37,
            8,
            lambda g: 0.1 if g[0] < 15 else 70.0,
            [1, 4, 8, 8, 8, 4, 2, 1, 1],
        ),
        (0, 8, None, []),
    ],
)
def test_work_is_cut_into_groups_of_a_minute(count, most, seconds_of, expected, monkeypatch):
    now, groups = [0.0], []
    monkeypatch.setattr(arms.time, "monotonic", lambda: now[0])
    for group in in_groups(list(range(count)), most):
        groups.append(group)
        now[0] += seconds_of(group)
    assert list(map(len, groups)) == expected and sum(groups, []) == list(range(count))


def test_a_folder_keeps_what_was_finished(tmp_path):
    settings = {"--seed": 0, "--compare": ("x",)}
    rows = [{"id": "a", "sample": 0, "value": 0.1}, {"id": "a", "sample": 1, "value": None}]
    EvalFolder(tmp_path, settings).add("stage", "arm", rows)
    with open(tmp_path / "partial.jsonl", "a") as file:
        file.write('{"stage": "stage", "arm": "arm", "ro')  # killed while writing
    again = EvalFolder(tmp_path, settings)
    assert again.rows("stage", "arm") == {("a", 0): rows[0], ("a", 1): rows[1]}
    assert again.rows("stage", "other") == {} == again.rows("other", "arm")
    again.add("stage", "arm", [{"id": "b", "sample": 0}])
    assert len(again.rows("stage", "arm")) == 3
    del again  # a folder has one owner at a time
    with pytest.raises(ValueError, match=r"--seed \(saved 0, now 1\); give the same"):
        EvalFolder(tmp_path, settings | {"--seed": 1})
    again = EvalFolder(tmp_path, settings)
    assert len(again.rows("stage", "arm")) == 3 and again.results is None
    assert again.write({"a": (math.nan, 1)})["a"] == [None, 1]
    again.finish()
    assert visible_names(tmp_path) == {"results.json"}


def visible_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, None),
        ({"--seed": 1}, r"is of other settings: --seed \(saved 0, now 1\)"),
        ({"--bootstrap": 200}, r"--bootstrap \(saved 100, now 200\)"),
        ({"--limit": 3, "--seed": 2}, r"--seed \(saved 0, now 2\), --limit \(saved None, now 3\)"),
        ({"weights in a of": "today"}, r"weights in a of \(saved None, now today\)"),
        ("{}", "does not say what settings it is of; move that file"),
        ('{"depends_on": [1]}', "does not say what settings it is of"),
        ('{"models"', "results.json is damaged"),
        ("[]", "results.json: expected a JSON object"),
    ],
)
def test_a_finished_evaluation_is_never_replaced(change, named, tmp_path):
    settings, file = {"--seed": 0, "--bootstrap": 100}, tmp_path / "results.json"
    written = EvalFolder(tmp_path, settings)
    written.write({"models": {}})
    written.finish()
    del written
    if isinstance(change, str):
        file.write_text(change)
        change = {}
    before = file.read_bytes()
    if named is None:
        assert EvalFolder(tmp_path, settings).results["models"] == {}
    else:
        with pytest.raises(ValueError, match=named):
            EvalFolder(tmp_path, settings | change)
    assert file.read_bytes() == before and visible_names(tmp_path) == {"results.json"}


def test_what_was_stopped_between_its_results_and_its_report_goes_on(tmp_path):
    cut = EvalFolder(tmp_path, {"--seed": 0})
    cut.add("stage", "arm", [{"id": "a", "sample": 0}])
    cut.write({"models": {}})
    del cut
    again = EvalFolder(tmp_path, {"--seed": 0})
    assert again.results is None and again.rows("stage", "arm").keys() == {("a", 0)}


def test_a_start_that_was_killed_at_its_first_line_begins_anew(tmp_path):
    (tmp_path / "partial.jsonl").write_text('{"settings": {"--seed": 7')
    EvalFolder(tmp_path, {"--seed": 0})
    assert (tmp_path / "partial.jsonl").read_text() == '{"settings": {"--seed": 0}}\n'


@pytest.mark.parametrize("content", ["what", '{"x": 1}', '{"settings": {}}\n{"stage": "s"}'])
def test_a_damaged_file_of_rows_is_named(content, tmp_path):
    (tmp_path / "partial.jsonl").write_text(content + "\n")
    with pytest.raises(ValueError, match="partial.jsonl is damaged .*: delete it"):
        EvalFolder(tmp_path, {})


def test_rows_that_cannot_be_written_name_their_file(tmp_path):
    rows = EvalFolder(tmp_path, {})
    rows.partial.unlink()
    rows.partial.symlink_to("/dev/full")
    with pytest.raises(OSError, match="partial.jsonl cannot be written .*No space left"):
        rows.add("stage", "arm", [])


def test_a_folder_of_results_is_never_taken_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.time, "strftime", lambda _: "now")
    names = []
    for _ in range(3):
        names.append(new_folder(tmp_path).name)
        (tmp_path / names[-1]).mkdir()
    assert names == ["eval-now", "eval-now-2", "eval-now-3"]


def test_results_hold_no_number_that_json_cannot(tmp_path):
    values = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": "x"}}
    written = EvalFolder(tmp_path, {}).write(values)
    assert written.pop("depends_on") == {}
    assert written == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": "x"}}
    assert written | {"depends_on": {}} == json.loads((tmp_path / "results.json").read_text())


def touch(checkpoint, monkeypatch):
    os.utime(checkpoint / "model.safetensors", (1, 1))  # other weights under the same name


def configure(checkpoint, monkeypatch):
    (checkpoint / "generation_config.json").write_text("{}\n")


def patch(module, name, value):
    return lambda _, monkeypatch: monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (None, None),
        (touch, "weights in arm of .* 1970-01-01"),
        (configure, "generation_config.json in arm .saved sha256"),
        ("problems", "problems .saved sha256"),
        ("settings", "--seed .saved 0, now 1"),
        ("shots", "--shots .saved 0, now 1"),
        (patch(Prompting, "examples", [1]), "worked examples .saved sha256"),
        (patch(folder, "FRACTIONS", (0.5,)), "FRACTIONS .*, now "),
        (patch(folder, "TOP_SHARES", (0.5,)), "TOP_SHARES .*, now "),
        (patch(folder.faithfulness, "__file__", __file__), "faithfulness.py .*, now "),
        (patch(folder.importlib.metadata, "version", lambda _: "0.1"), "torch .* now 0.1"),
    ],
)  # fmt: skip
def test_rows_of_anything_else_are_refused_by_name(change, named, tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    for name in ("model.safetensors", "generation_config.json"):
        (tmp_path / "checkpoint" / name).write_text(name)
    settings, problems = evaluation.Settings(model="arm"), [Problem("a", "How many?", "3")]
    checkpoints = {"arm": Checkpoint("arm", tmp_path / "checkpoint", None)}
    EvalFolder(tmp_path / "out", depends_on(settings, checkpoints, problems))
    if change == "problems":
        problems = [replace(problems[0], question="How many? ")]
    elif change == "settings":
        settings = replace(settings, seed=1)
    elif change == "shots":
        settings = replace(settings, shots=1)
    elif change:
        change(tmp_path / "checkpoint", monkeypatch)
    # What no row depends on may change.
    settings = replace(settings, out="x", batch_size=1, matched=0.2, bootstrap=100)
    dependencies = depends_on(settings, checkpoints, problems)
    if named is None:
        EvalFolder(tmp_path / "out", dependencies)
    else:
        with pytest.raises(ValueError, match=named):
            EvalFolder(tmp_path / "out", dependencies)


# ------------------------------------------------------------------------- the command, in process


def command(shaken, out, *more) -> list:
    arguments = (
        f"--model data/micro --compare {shaken} --limit 3 --samples 2 --mask-steps 2 "
        f"--batch-size 32 --bootstrap 200 --device cpu --out {out}"
    )
    return [evaluation.main, *arguments.split(), *more]


@pytest.fixture(scope="module")
def shaken(tmp_path_factory):
    """A second arm: data/micro with a little noise on its weights."""
    path = tmp_path_factory.mktemp("arms") / "shaken"
    shutil.copytree(ROOT / "data/micro", path)
    model = load_llama(path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    save_llama(model, path)
    return path


@pytest.fixture(scope="module")
def two_arms(shaken, tmp_path_factory):
    """results.json and output of a command that was not interrupted."""
    out = tmp_path_factory.mktemp("two_arms")
    printed = done(*command(shaken, out))
    numbers = (1, 3, 4, 5)  # no run has trained these: no Figure 2
    figures = {"differences.png", *(f"figure{n}.png" for n in numbers)}
    assert visible_names(out) == {"results.json", "report.html", *figures}
    return json.loads((out / "results.json").read_text()), printed


def test_interrupted_and_resumed_the_results_are_the_same(shaken, two_arms, tmp_path, monkeypatch):
    corruption, calls = faithfulness.corruption, []

    def interrupted_at_the_third_batch(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return corruption(*arguments)

    cut = tmp_path / "cut"
    monkeypatch.setattr(faithfulness, "corruption", interrupted_at_the_third_batch)
    assert "interrupted; the same command goes on from here" in refused(*command(shaken, cut))
    assert not (cut / "results.json").exists()
    other = refused(*command(shaken, cut, "--precision", "bfloat16"))
    assert "--precision (saved float32, now bfloat16)" in other
    assert "--limit (saved 3, now 4)" in refused(*command(shaken, cut, "--limit", "4"))
    before = len(calls)
    monkeypatch.setattr(evaluation, "sample_problems", lambda *a, **b: pytest.fail("sampled again"))
    monkeypatch.setattr(evaluation.report, "write_report", lambda *_: None)  # slow, and seen above
    done(*command(shaken, cut))
    # An arm's 6 traces in groups of 1, 4 and 1: the two that were finished are not done again.
    assert len(calls) - before == 6 - 2
    resumed = json.loads((cut / "results.json").read_text())
    for key in ("models", "pairs", "versions", "seeds"):
        assert resumed[key] == two_arms[0][key]


def test_an_interruption_of_sampling_loses_one_group(tmp_path, monkeypatch):
    """Whatever the batch size; what it kept, and what is sampled later, are the same records."""
    monkeypatch.setattr(evaluation.report, "write_report", lambda *_: None)
    sample, sizes = evaluation.sample, []

    def interrupted_at_the_third_group(model, tokenizer, problems, *arguments):
        sizes.append(len(problems))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return sample(model, tokenizer, problems, *arguments)

    small = "--model data/micro --limit 7 --samples 2 --faithfulness off --device cpu".split()
    arguments = [evaluation.main, *small, "--batch-size", "4096", "--out"]
    done(*arguments, tmp_path / "whole")
    monkeypatch.setattr(evaluation, "sample", interrupted_at_the_third_group)
    refused(*arguments, tmp_path / "cut")
    kept = (tmp_path / "cut/partial.jsonl").read_text().splitlines()[1:]
    assert [len(json.loads(line)["rows"]) for line in kept] == sizes[:2] == [2, 8]
    done(*arguments, tmp_path / "cut")
    assert sizes[2:] == [4, 2, 2]
    whole, cut = (
        json.loads((tmp_path / name / "results.json").read_text())["models"]["data/micro"]
        for name in ("whole", "cut")
    )
    assert whole["records"] == cut["records"] and len(whole["records"]) == 14


def test_half_precision_goes_through_every_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.report, "write_report", lambda *_: None)
    loaded, load = [], arms.load_llama

    def loading(*arguments):
        loaded.append(load(*arguments).embed_tokens.weight.dtype)
        return load(*arguments)

    monkeypatch.setattr(arms, "load_llama", loading)
    small = "--model data/micro --limit 2 --samples 2 --mask-steps 1 --device cpu".split()
    done(evaluation.main, *small, "--precision", "bfloat16", "--out", tmp_path)
    assert set(loaded) == {torch.bfloat16}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arguments"]["precision"] == "bfloat16"
    entry = results["models"]["data/micro"]
    assert entry["reliance"] and entry["map"] and entry["mask"]


def test_the_command_prints_every_table(two_arms):
    _, printed = two_arms
    assert printed.count("blank English") == 2  # Table 1, and the differences of the pair
    for text in ("pass@1", "reliance on the reasoning", "is the map right?", "matched length"):
        assert text in printed
    assert printed.count("\ncomputing share ") == 2  # Table 1, and the differences of the pair


def test_results_json_says_what_was_run(shaken, two_arms):
    results, _ = two_arms
    assert "--model data/micro --compare" in results["command"]
    assert results["arguments"]["precision"] == "float32"
    assert results["arguments"]["limit"] == 3 and results["seeds"]["sampling"] == 0
    assert results["arguments"]["compare"] == [str(shaken)]
    assert results["versions"]["torch"] == torch.__version__
    mask = {"steps": 2, "lr": 0.1, "init": -0.4, "scale": 10.0, "sparsity": 0.0}
    assert mask.items() <= results["mask_settings"]["mask"].items()
    assert "blank English" in results["versions"]["spacy_pipeline"]
    assert list(results["models"]) == [str(shaken), "data/micro"]


def test_results_json_holds_the_measures_and_the_traces_of_every_arm(two_arms):
    for entry in two_arms[0]["models"].values():
        assert len(entry["records"]) == 6 and entry["run"] is None
        assert len(entry["reliance"]) == sum(record["valid"] for record in entry["records"])
        labels = [label for r in entry["records"] if (label := r["computing"]) is not None]
        assert len(labels) == len(entry["reliance"])  # those of valid samples
        assert entry["summary"]["computing"] == pytest.approx(sum(labels) / len(labels))
        # Not every trace has a number to change, or tokens of both classes.
        absent = {"corruption", "auroc/leave-one-out"} - entry["measures"].keys()
        for key in {"pass@1", "computing", "tokens", "numbers", "truncation", "necessity", "direct",
                    "corruption", "same answer at 20%", "comprehensiveness/mask",
                    "sufficiency 50%/random", "auroc/leave-one-out"} - absent:  # fmt: skip
            measure = entry["measures"][key]
            if measure["questions"] > 1:
                assert measure["low"] <= measure["value"] <= measure["high"], key
            assert len(entry["per_question"][key]) == measure["questions"]
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


def test_the_row_of_a_map_says_how_far_its_mask_overshot(micro, two_arms, tmp_path):
    """Gold answers that the traces do not give are likelier with the reasoning suppressed."""
    model, tokenizer = micro
    records = two_arms[0]["models"]["data/micro"]["records"][::2]
    records = [record | {"gold": f"{777 + n}"} for n, record in enumerate(records)]
    work = arms.Work("arm", model, tokenizer, EvalFolder(tmp_path, {}), Progress("arm", True))
    settings = evaluation.Settings(model="arm", mask_steps=2)
    keys = {key_of(record) for record in records}
    rows = evaluation.measure_maps(work, evaluation.Arm(records, []), keys, settings)
    assert rows.keys() == keys and len(keys) == 3
    for record in records:
        problem = Problem(record["id"], record["question"], record["gold"])
        prompt = Prompting("micro").prompt(tokenizer, problem)
        trace = split_trace(record["completion"], tokenizer)
        parts = Rollout(problem, prompt, record["completion"], trace).masked_parts(tokenizer)
        masks = learn_masks(model, [parts], MaskConfig.in_steps(2))
        below = (masks.unmasked - masks.losses[-1]).item()
        assert below > 1
        assert rows[key_of(record)]["overshoot"] == pytest.approx(below, abs=1e-3)


def test_results_json_holds_one_mask_at_three_steps(two_arms):
    for entry in two_arms[0]["models"].values():
        row, masks = entry["mask"], entry["mask"]["masks"]
        assert row["steps"] == [0, 1, 2] and len(row["probability"]) == 3
        assert [len(masks[0]), len(masks[0][0])] == row["size"]
        for mask in masks:
            assert all(
                (value is None) == (column > number)
                for number, values in enumerate(mask)
                for column, value in enumerate(values)
            )
        assert {value for values in masks[0] for value in values} == {-0.4, None}
        assert masks[0] != masks[1] != masks[2]  # two steps of 0.1 at most
        assert masks[2][-1][0] == pytest.approx(-0.4, abs=0.21)
        assert max(abs(value + 0.4) for value in masks[2][-1]) > 0.1


def test_results_json_holds_the_differences_of_a_pair(shaken, two_arms):
    results, _ = two_arms
    (pair,) = results["pairs"]
    assert (pair["before"], pair["after"]) == (str(shaken), "data/micro")
    values = [results["models"][pair[side]]["measures"]["tokens"]["value"]
              for side in ("before", "after")]  # fmt: skip
    assert pair["own"]["tokens"]["value"] == pytest.approx(values[1] - values[0])
    matched = pair["matched"]
    assert matched["tolerance"] == 0.1
    assert {"computing", "truncation"} <= pair["own"].keys() & matched["differences"].keys()
    assert matched["differences"]["necessity"]["questions"] == len(matched["traces"])
    lengths = [matched[side]["tokens"]["value"] for side in ("before", "after")]
    assert abs(lengths[0] - lengths[1]) <= max(3, 0.1 * max(lengths))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--compare", "data/micro"], "--model data/micro: the same checkpoint as data/micro"),
        (["--compare", "./data/micro/"], "the same checkpoint as ./data/micro/; name another"),
        (["--compare", ROOT / "data/micro"], "--model data/micro: the same checkpoint"),
        (["--bootstrap", "99"], "--bootstrap 99: must be at least 100"),
        (["--compare"], "--compare: expected at least one argument"),
        (["--spacy-model", "no_such_thing"], "--spacy-model no_such_thing: no such pipeline"),
    ],
)
def test_bad_input_gets_a_sentence_before_the_work(more, named, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "sample_problems", lambda *a, **b: pytest.fail("sampled"))
    arguments = ["--model", "data/micro", "--device", "cpu", "--out", tmp_path / "out", *more]
    assert named in refused(evaluation.main, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["partial.jsonl", "results.json", "report.html", "figure1.png", "figure5.png"]
)
def test_a_folder_where_results_go_is_refused_first(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(evaluation, "sample_problems", lambda *a, **b: pytest.fail("sampled"))
    said = refused(evaluation.main, "--model", "data/micro", "--device", "cpu", "--out", tmp_path)
    assert f"error: --out {tmp_path}: {name} there is a folder; move it" in said
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_an_error_says_does_nothing_to_the_terminal(monkeypatch):
    def fail(*_, **__):
        raise ValueError("template: \x1b[2Jgone\nand more\u202e")

    monkeypatch.setattr(evaluation, "run", fail)
    said = refused(evaluation.main, "--model", "x")
    assert said == "error: template: ‹U+001B›[2Jgone\nand more‹U+202E›"


def test_without_faithfulness_there_is_only_table_1(tmp_path, monkeypatch):
    """And a trained spaCy pipeline by its path."""
    monkeypatch.setattr(evaluation.report, "write_report", lambda *_: None)
    trained_pipeline().to_disk(tmp_path / "tagger")
    arguments = "--model data/micro --limit 2 --samples 2 --faithfulness off --device cpu"
    more = ["--out", tmp_path, "--spacy-model", tmp_path / "tagger"]
    printed = done(evaluation.main, *arguments.split(), *more)
    assert "spaCy, a trained tagger of English (en_pipeline 0.0.0)" in printed
    assert "accuracy (pass@1)" in printed and "reliance" not in printed
    (entry,) = json.loads((tmp_path / "results.json").read_text())["models"].values()
    assert entry["reliance"] == entry["map"] == [] and "necessity" not in entry["measures"]
    # The same command again says that it is finished; other settings do not replace it.
    before = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr(evaluation, "sample_all", lambda *_: pytest.fail("sampled again"))
    again = done(evaluation.main, *arguments.split(), *more)
    assert "finished: nothing was run" in again
    assert printed[printed.index("2 problems") : printed.index("wrote")].strip() in again
    said = refused(evaluation.main, *arguments.split(), *more, "--seed", "9", "--limit", "1")
    assert "of other settings: --limit (saved 2, now 1), --seed (saved 0, now 9)" in said
    assert (tmp_path / "results.json").read_bytes() == before


def test_reliance_alone_makes_no_map_and_shows_a_dash_where_it_is_absent(
    shaken, tmp_path, monkeypatch
):
    """The first arm has no trace with a number to change: 6 traces in 3 groups."""
    corruption, calls = faithfulness.corruption, []

    def absent_at_first(model, tokenizer, rollouts, max_new_tokens):
        calls.append(1)
        found = corruption(model, tokenizer, rollouts, max_new_tokens)
        return [None if len(calls) <= 3 else True for _ in found]

    monkeypatch.setattr(faithfulness, "corruption", absent_at_first)
    monkeypatch.setattr(faithfulness, "Erased", lambda *_: pytest.fail("a map"))
    printed = done(*command(shaken, tmp_path, "--faithfulness", "reliance"))
    assert re.search(r"\ncorruption \(answer changes\) +- +1\.000 ", printed)
    assert "no map" not in printed and "map:" not in printed and "is the map" not in printed
    figures = {"differences.png", *(f"figure{n}.png" for n in (3, 4, 5))}
    assert visible_names(tmp_path) == {"results.json", "report.html", *figures}
    results = json.loads((tmp_path / "results.json").read_text())
    for entry in results["models"].values():
        assert entry["map"] == [] and entry["mask"] is None and len(entry["reliance"]) == 6
        assert not any("/" in key for key in entry["measures"])
    (pair,) = results["pairs"]
    for differences in (pair["own"], pair["matched"]["differences"]):
        assert {"computing", "truncation", "necessity", "direct"} <= differences.keys()
        assert "corruption" not in differences
    page = (tmp_path / "report.html").read_text()
    row = page.partition("corruption (answer changes)")[2].partition("</tr>")[0]
    assert re.findall(r"<td><bdi>(.*?)</bdi>", row)[0] == "-"
    assert "no map to test" not in page and "No saliency" not in page
    assert page.count("Not measured: see --faithfulness") == 1  # of the map


def test_an_output_without_unicode_gets_everything(tmp_path, monkeypatch):
    """As under PYTHONIOENCODING=ascii: name, table and paths."""
    (tmp_path / "modèle").symlink_to(ROOT / "data/micro")
    monkeypatch.chdir(tmp_path)
    arguments = "--model modèle --limit 1 --samples 1 --faithfulness off --device cpu --out é"
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments.split()])
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    page = Path("é/report.html")
    monkeypatch.setattr(evaluation.report, "write_report", lambda *_: page)
    evaluation.main()
    printed = out.buffer.getvalue()
    assert b"mod\\xe8le" in printed and b"wrote \\xe9/results.json\n" in printed
    assert printed.endswith(b"wrote \\xe9/report.html\n")
    assert not (tmp_path / "é/partial.jsonl").exists()


def test_a_run_is_a_name_too_and_results_have_a_folder_by_default(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(ROOT / "data/micro", run / "checkpoint")
    (run / "config.json").write_text(json.dumps({"saliency": "none", "seed": 7}))
    (run / "metrics.jsonl").write_text('{"step": 1, "outcome": -0.5, "length": 30}\n')
    monkeypatch.chdir(tmp_path)
    arguments = "--model run --limit 1 --samples 1 --faithfulness off --device cpu"
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments.split()])
    evaluation.main()
    (results,) = Path("runs").iterdir()
    names = {"results.json", "report.html", "figure2.png", "figure3.png"}
    assert visible_names(results) == names
    printed = capsys.readouterr().out
    assert f"report and results: {results}" in printed and f"wrote {results}/report.html" in printed
    (entry,) = json.loads((results / "results.json").read_text())["models"].values()
    assert entry["run"]["config"]["seed"] == 7 and entry["run"]["updates"] == [[1, -0.5, 30]]
    assert "baseline: trained with the outcome reward only" in (results / "report.html").read_text()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "sample", interrupt)
    with pytest.raises(SystemExit) as ended:
        evaluation.main()
    assert ended.value.code == 130  # as a shell has it for Ctrl-C
    assert re.search(r"with --out runs/eval-.* goes on from here", capsys.readouterr().err)


def test_an_arms_model_is_gone_before_the_next_ones_is_loaded(tmp_path):
    """Two models in memory may be too many for one GPU."""
    checkpoint = Checkpoint("micro", ROOT / "data/micro", None)
    with checkpoint.opened("cpu", "float32", None, "micro") as work:
        model = weakref.ref(work.model)
    assert work.model is None and model() is None
