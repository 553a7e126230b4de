"""The study's arithmetic: intervals over seeds and questions, matched pairs, smaller masks."""

import dataclasses
import json
import shlex
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from atman import MaskConfig, lay_out, optimize_masks, token_saliency
from data import micro_labels, micro_task
from lab.measure import bootstrap
from lab.measure.table1 import WORDS, table1_ratios
from lab.study import __main__ as study
from lab.study import report, sign
from lab.study.arms import ARMS, COMMON, DEFAULT, PILOTS, ROOT, train_command
from lab.study.kept import KEPT, UPDATE, round_off, sample_row, table1_of, write
from lab.study.measures import interval, matched, own, tersest, tersest_trace
from tests import tiny
from train import parse_args

CONFIG = MaskConfig.in_steps(4)


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
    twice = {s: {q: (2 * x, n) for q, (x, n) in found.items()} for s, found in seeds.items()}
    found = interval(twice, seeds, relative=True)
    for key in ("value", "low", "high"):
        assert found[key] == pytest.approx(1)  # twice as much in every draw: 100% more


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


def kept_run(lengths, same=(0, 0, 0, 0, 0, 1), corruption=1):
    """A kept run whose traces of one question each have these lengths."""
    return {
        "heldout": {f"q{n}": [[1, 1, 0, 0, length, 9, 3, 2, 1]]
                    for n, length in enumerate(lengths)},
        "reliance": {f"q{n}": {"0": [same, 0.5, 0.25, corruption]} for n in range(len(lengths))},
        "map": {f"q{n}": [0, length, {"mask": [0.5, 0.25, None, 0.75]}]
                for n, length in enumerate(lengths)},
    }  # fmt: skip


def test_matched_traces_are_about_equally_long():
    runs = {0: kept_run([20, 30, 100]), 3: kept_run([1])}
    base = {0: kept_run([23, 34, 90], same=(0, 0, 0, 0, 1, 1), corruption=0)}
    here, there = matched(runs, base)
    assert set(here["necessity"]) == {0} and set(here["necessity"][0]) == {"q0", "q2"}
    assert set(here["comprehensiveness/mask"][0]) == {"q0", "q2"}
    found = interval(here["corruption"], there["corruption"])
    assert found["value"] == 1 and found["pairs"] == 2
    found = interval(here["truncation"], there["truncation"])
    assert found["value"] == pytest.approx(0.2)  # by trapezoids: 0.9 and 0.7
    assert "auroc/mask" not in here and set(here["auroc no punctuation/mask"][0]) == {"q0", "q2"}


def test_what_is_kept_of_a_sample_gives_table_1_again():
    records, words, kept = [], [], {}
    for n in range(12):
        record = {"id": f"q{n % 3}", "sample": n // 3, "correct": n % 2 == 0, "valid": n != 5}
        record |= {"truncated": n == 5, "no_delimiter": n == 7, "reasoning": list(range(10 + n))}
        counts = dict(zip(WORDS, (n + 9, n, 2, 3), strict=True))
        records.append(record)
        words.append(counts)
        kept.setdefault(record["id"], []).append(sample_row(record, counts))
    assert table1_of({"heldout": kept}, "heldout") == table1_ratios(records, words)


def test_numbers_are_kept_with_five_digits():
    values = [0.123456789, 123456.789, True, None, float("nan"), 3]
    assert [round_off(v) for v in values] == [0.12346, 123460.0, 1, None, None, 3.0]


def whole_run(arm, seed, tokens, numbers, necessity=0.5, direct=0.1):
    """A kept run of ten questions, four samples each; half of the samples are right."""
    samples = [[right, 1, 0, 0, tokens, 20, numbers, 4, 5] for right in (1, 0, 1, 0)]
    split = {f"micro/heldout/{n}": samples for n in range(10)}
    update = dict.fromkeys(UPDATE, 0.5) | {"outcome": -0.25, "length": tokens}
    ranking = [0.9, 0.4, None, 0.7]
    return {
        "arm": arm, "seed": seed, "versions": {"torch": "9"}, "config": {"saliency_weight": 2.0},
        "updates": [[*(update | {"step": n + 1}).values()] for n in range(12)],
        "heldout": split, "hard": split,
        "reliance": {q: {"0": [[0, 0, 0, 0, 0, 1], necessity, direct, 1]} for q in split},
        "map": {q: [0, tokens, {"mask": ranking, "attribution": ranking}] for q in split},
    }  # fmt: skip


def test_the_report_by_hand(tmp_path):
    """Two arms, two seeds: tokens halve, the share of numbers doubles, all else is equal."""
    template = (ROOT / "docs/study_template.md").read_text(encoding="utf-8")
    (tmp_path / "study_template.md").write_text(template, encoding="utf-8")
    kept = tmp_path / "study"
    kept.mkdir()
    report.report(tmp_path)
    assert "No result yet." in (tmp_path / "study.md").read_text(encoding="utf-8")
    for seed in (0, 1):
        write(kept / f"a-{seed}.json", whole_run("outcome only", seed, 40, 4))
        write(kept / f"b-{seed}.json", whole_run("length penalty", seed, 20, 8))
        run = whole_run(DEFAULT, seed, 16, 6, necessity=0.6, direct=0.2)
        write(kept / f"c-{seed}.json", run)
    # A third seed of one arm alone, which no comparison may count.
    write(kept / "a-2.json", whole_run("outcome only", 2, 4000, 20))
    write(kept / "start.json", whole_run("start", 0, 40, 4))
    pilot = {"pilot": "mean, gated", "seed": 0, "updates": []}
    pilot["evals"] = [[0, 300, 0.5, 0.9, 60, 0.3, 0.2], [40, 300, 0.75, 0.875, 30.25, 0.4, 0.05]]
    write(kept / "pilot-mean-gated-0.json", pilot)
    report.report(tmp_path)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert (kept / "curves.png").stat().st_size > 10_000
    lines = text.splitlines()
    same, equal = "50.0 [50.0, 50.0]", "+0.0 [+0.0, +0.0]"

    def row(start, after):
        place = next(n for n, line in enumerate(lines) if line.startswith("|") and after in line)
        line = next(line for line in lines[place:] if line.startswith(start))
        return [part.strip() for part in line.strip("|").split("|")]

    found = row("| length penalty (2)", "| arm (seeds) | accuracy, %")
    assert found[1:5] == [same, "100.0 [100.0, 100.0]", "20.0 [20.0, 20.0]", "40.0 [40.0, 40.0]"]
    found = row("| length penalty (2)", "| against outcome only (seeds of both) | accuracy, points")
    assert found[1] == equal and found[3] == "**-20.0 [-20.0, -20.0]**"
    assert found[4] == "**+20.0 [+20.0, +20.0]**"  # points
    found = row("| length penalty (2)", "| against outcome only (seeds of both) | tokens, %")
    assert found[1:3] == ["**-50.0 [-50.0, -50.0]**", "**+100.0 [+100.0, +100.0]**"]
    found = row("| outcome only (2)", "pairs of traces: reliance / map")
    assert found[1:3] == ["-", "-"] and found[-1] == "0 / 0"  # 20 tokens against 40: no pair
    found = row("| length penalty (2)", "| against start (seeds of both)")
    assert found[3] == "**-20.0 [-20.0, -20.0]**"
    assert row("| mask", "| ranking |")[1:] == [
        "0.900 [0.900, 0.900]", "0.400 [0.400, 0.400]", "-", "0.700 [0.700, 0.700]"
    ]  # fmt: skip
    # Half of the samples of every question are right, so that pass@4 is 100%, as before.
    aims = "| micro preset against outcome only (2) | aim"
    tokens = sum(tokens for tokens, _ in tersest(10)["tokens"].values()) / 10
    found = row("| reasoning tokens", aims)
    assert found[1:4] == ["at most -50%", "**-60.0 [-60.0, -60.0]**", "yes"]
    assert found[4].startswith(f"**{100 * (tokens / 40 - 1):+.1f} [")
    found = row("| share of numbers", aims)
    assert found[1:4] == ["at least +60%", "**+50.0 [+50.0, +50.0]**", "no"]
    assert row("| share of stop words", aims)[1:4] == ["at most -30%", equal, "no"]
    assert row("| pass@4, points", aims)[1:] == ["at least -1", equal, "yes", "-"]
    rooms = "| measure | length penalty (2) | the most to be won"
    assert "longer by -4.0 tokens" in row("| measure", rooms)[3]
    assert row("| truncation", rooms)[1:] == [
        "0.900",
        "0.000",
        "+0.000 [+0.000, +0.000]",
        "nothing",
    ]
    found = row("| knockout, reasoning", rooms)
    assert found[1:] == ["0.500", "0.193", "**+0.100 [+0.100, +0.100]**", "better"]
    found = row("| knockout, prompt", rooms)  # of which less is better
    assert found[1:] == ["0.100", "0.100", "**+0.100 [+0.100, +0.100]**", "worse"]
    assert row("| corruption", rooms)[1:3] == ["100.0", "0.0"]
    assert row("| length penalty", f"| arm | shorter than the {report.TERSEST}")[2] == "50.0%"
    found = row("| micro preset (2)", "| arm (seeds) | sampling, s")
    assert found[4:7] == ["0.5", "2", "1.000"]  # 0.5 s each; weight 2 x spread 0.5
    found = row("| mean, gated", "| pilot | OWN")
    assert found[2:] == ["40", "75.0", "87.5", "30.2", "40.0", "5.0"]
    assert "--gate-saliency" in found[1] and "--mask-steps 5" in found[1]
    assert "<!--" not in text


def test_an_aim_is_reached_where_the_whole_interval_lies_beyond_it():
    found = {"value": -0.5, "low": -0.6, "high": -0.4, "seeds": [-0.45, -0.55]}
    assert report.reached(found, -0.3, more=False) == "yes"
    assert report.reached(found, -0.7, more=False) == "no"
    assert report.reached(found, -0.55, more=False) == "open (by the mean no)"
    assert report.reached(found, -0.45, more=False) == "open (by the mean yes)"
    assert report.reached(found, -0.7, more=True) == "yes"
    assert report.reached(found, -0.3, more=True) == "no"
    one = found | {"seeds": [-0.5]}  # of training's chance it knows nothing
    assert report.reached(one, -0.3, more=False) == "open (by the mean yes)"


def test_arms_without_a_common_seed_are_not_compared():
    arms = [own({seed: whole_run("x", seed, 40, 4)}) for seed in (0, 1)]
    measures = dict(zip((DEFAULT, "outcome only"), arms, strict=True))
    measures[report.TERSEST] = measures["length penalty"] = measures["outcome only"]
    assert report.aims_table(measures) == "No seed in common yet."
    assert report.room_table(measures, "length penalty") == "No seed in common yet."


def test_a_run_of_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path)
    folder, commands = tmp_path / "outcome-only-0", []
    sitting = types.SimpleNamespace(run=lambda command, log: commands.append(command))
    assert study.train(sitting, "outcome only", 0) == folder
    assert commands[0][: len(train_command("outcome only", 0))] == train_command("outcome only", 0)
    folder.mkdir()  # begun, and not ended
    settings = dataclasses.asdict(parse_args(train_command("outcome only", 0)[1:]))
    (folder / "config.json").write_text(json.dumps(settings | {"out": str(folder)}))
    study.train(sitting, "outcome only", 0)
    assert len(commands) == 2 and commands[1] == commands[0]
    (folder / "config.json").write_text(json.dumps(settings | {"lr": 1.0}))
    with pytest.raises(ValueError, match="of other settings"):
        study.train(sitting, "outcome only", 0)


def test_the_tersest_trace_is_one_bare_equation_a_step():
    """And two where it must first be found how much; nothing that its labels call decoration."""
    for problem in micro_task.load("heldout", 40):
        text = tersest_trace(problem)
        assert text.count("=") == sum(2 if step.groups else 1 for step in problem.steps)
        labels = micro_labels.label_characters(text, problem.answer)
        computing = [label == micro_labels.COMPUTING for label in labels]
        assert {c for c, yes in zip(text, computing, strict=True) if not yes} <= {" ", "."}
    found = tersest(1)
    ((tokens, samples),) = found["tokens"].values()
    # 2 * $2 = $4. $15 - $4 = $11. $11 * 2 = $22. $22 - $3 = $19.
    assert (tokens, samples) == (41, 1) and "pass@1" not in found


def test_json_has_no_nan_and_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError):
        write(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_the_arms_are_commands_that_train_py_takes():
    configs = {arm: parse_args(train_command(arm, 1)[1:]) for arm in ARMS}
    assert all(config.seed == 1 for config in configs.values())
    assert len(set(configs.values())) == len(ARMS)  # no arm twice
    assert train_command(DEFAULT, 2) == ["train.py", "--seed", "2"]
    free = {"saliency", "saliency_sign", "saliency_reduction", "saliency_weight", "gate_saliency",
            "mask_sparsity", "shuffle_saliency"}  # fmt: skip
    common = {
        arm: {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
        for arm, config in configs.items()
    }
    common[DEFAULT] |= {"save_every": 5, "keep": 1}  # which steer nothing
    assert common["share, gated, 10 steps"].pop("mask_steps") == 10
    common["share, gated, 10 steps"]["mask_steps"] = 20
    assert all(settings == common["outcome only"] for settings in common.values())


TRAINED = [p for p in sorted(KEPT.glob("*.json")) if not p.name.startswith(("sign-", "start"))]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_what_is_kept_is_of_the_command_that_the_study_prints(path):
    run = json.loads(path.read_text(encoding="utf-8"))
    name = run.get("arm") or run["pilot"]
    wanted = dataclasses.asdict(parse_args(train_command(name, run["seed"])[1:]))
    for key in ("save_every", "keep"):  # which steer nothing
        wanted[key] = run["config"][key]
    assert wanted | run["config"] == wanted  # runs of old lack settings that are of younger date
    assert len(run["updates"]) == wanted["steps"] and run["updates"][-1][0] == wanted["steps"]


@pytest.mark.parametrize("pilot", PILOTS)
def test_a_pilots_flags_beside_the_common_ones_are_its_command(pilot):
    short = [*COMMON.split(), "--saliency", "none", "--seed", "0"]
    short += shlex.split(report.beside_common(pilot))
    long = train_command(pilot, 0)[1:]
    unlike = {"save_every": 1, "keep": 1}
    assert dataclasses.replace(parse_args(short), **unlike) == dataclasses.replace(
        parse_args(long), **unlike
    )


def rollouts(layers):
    """A tiny Llama and three rollouts: prompt, reasoning, delimiter, answer."""
    model = tiny.llama(num_hidden_layers=layers, gain=1.5)
    parts = tiny.ids(1, 3, 2, 3), tiny.ids(2, 5, 3, 4), tiny.ids(3, 1, 2, 1), tiny.ids(4, 2, 1, 3)
    return model, list(zip(*parts, strict=True))


def test_a_mask_of_answer_rows_is_the_whole_masks_where_the_others_do_not_matter():
    """With one layer the reasoning's own rows never reach the answer."""
    model, parts = rollouts(layers=1)
    masks = optimize_masks(model, lay_out(parts, "cpu"), CONFIG)
    found = sign.smaller_mask(model, parts, "answer rows", CONFIG)
    for n, (_, reasoning, _, _) in enumerate(parts):
        length, count = len(reasoning), int(masks.region[n].any(1).sum())
        restored = 1 - masks.H[n, length:count, :length].clamp(max=0) / CONFIG.init
        assert found[n] == pytest.approx(restored.mean().item(), abs=1e-5)
    per_token = token_saliency(masks, CONFIG)  # in which the idle rows count
    assert abs(found[0] - per_token[0].mean()) > 1e-4


def test_a_mask_per_column_by_a_plain_loop():
    model, parts = rollouts(layers=2)
    found = sign.smaller_mask(model, parts, "per column", CONFIG)
    for n, (prompt, reasoning, delimiter, answer) in enumerate(parts):
        start, end = len(prompt), len(prompt) + len(reasoning)
        tokens = torch.tensor([[*prompt, *reasoning, *delimiter, *answer]])
        column = torch.full((len(reasoning),), CONFIG.init, requires_grad=True)
        optimizer = torch.optim.AdamW([column], CONFIG.lr, CONFIG.betas, weight_decay=0.05)
        for _ in range(CONFIG.steps):
            mask = torch.zeros(1, 1, tokens.shape[1], tokens.shape[1])
            mask[..., start:, start:end] = 10 * column.clamp(max=0)
            logits = model(tokens, mask=mask)[0, -len(answer) - 1 : -1]
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.tensor(answer)).backward()
            optimizer.step()
        assert found[n] == pytest.approx((1 - column / CONFIG.init).mean().item(), abs=1e-5)


def test_rewards_are_ranked_within_their_question():
    rows = []
    for n in range(12):
        length = 10 * (n % 4) + 100 * (n // 4)  # questions apart by far more than their traces
        facts = {"length": length, "numbers": 1 / (1 + length), "stop words": 0.5}
        facts |= {"decorating": None if n == 3 else length, "correct": float(n % 4 > 1)}
        pays = {"short": -length, "long within": n % 4 - 10.0 * (n // 4)}
        rows.append({"id": f"q{n // 4}", **facts, "rewards": pays})
    table = sign.correlations(rows)
    assert table["short"]["length"]["value"] == -1 and table["short"]["numbers"]["value"] == 1
    assert table["long within"]["length"]["value"] == pytest.approx(1)
    assert table["short"]["decorating"]["questions"] == 3
    assert table["short"]["stop words"]["value"] is None
    # What goes along with length alone has nothing left when length is held fixed.
    left = sign.correlations(rows, held="length")
    assert "length" not in left["short"] and left["short"]["numbers"]["value"] is None
    assert sign.partial(0.5, 0.0, 0.0) == 0.5 and sign.partial(0.48, 0.8, 0.6) == pytest.approx(0)
    assert sign.partial(0.0, 0.6, 0.6) == pytest.approx(-0.36 / 0.64)
    assert sign.partial(0.5, 1.0, 0.2) is None and sign.partial(None, 0.1, 0.2) is None
    text = sign.markdown(table)
    assert "| short | -1.00 [-1.00, -1.00] |" in text and "| - |" in text
    assert text.startswith("| reward | length (3) | numbers (3) | stop words (0) |")
