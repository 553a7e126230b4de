"""The study's arithmetic: intervals over seeds and questions, matched pairs, smaller masks."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bootstrap
from atman import MaskConfig, optimize_masks, token_saliency
from table1 import WORDS, table1_ratios
from tests import sign, study, study_report, tiny

CONFIG = MaskConfig.in_steps(4)


def constant(values, questions=6):
    """seed -> question -> a mean of that value."""
    return {
        seed: {f"q{n}": (float(value), 1.0) for n in range(questions)}
        for seed, value in enumerate(values)
    }


def test_an_interval_is_over_seeds_and_questions():
    found = study_report.interval(constant([0.0, 1.0]))
    assert (found["value"], found["low"], found["high"]) == (0.5, 0.0, 1.0)  # seeds alone differ
    assert (found["seeds"], found["questions"]) == (2, 6)
    one = {0: {f"q{n}": (float(n % 2), 1.0) for n in range(40)}}
    found, plain = study_report.interval(one), bootstrap.interval(one[0])
    for key in ("value", "low", "high"):
        assert found[key] == pytest.approx(plain[key], abs=0.05)
    assert found["high"] - found["low"] > 0.2


def test_a_ratio_pools_over_questions_and_averages_over_seeds():
    seeds = {0: {"a": (1.0, 2.0), "b": (5.0, 6.0)}, 1: {"a": (1.0, 4.0), "b": (0.0, 4.0)}}
    assert study_report.interval(seeds)["value"] == pytest.approx((6 / 8 + 1 / 8) / 2)


def test_a_difference_is_paired_by_seed_and_question():
    rng = np.random.default_rng(0)
    before = {s: {f"q{n}": (rng.normal(), 1.0) for n in range(9)} for s in (0, 1, 2)}
    after = {s: {q: (x + 0.25, 1.0) for q, (x, _) in found.items()} for s, found in before.items()}
    found = study_report.interval(after, before)
    for key in ("value", "low", "high"):
        assert found[key] == pytest.approx(0.25)
    del after[2], after[0]["q3"]
    before[0]["q3"] = before[2]["q1"] = (1e6, 1.0)  # without a partner: not looked at
    found = study_report.interval(after, before)
    assert found["value"] == pytest.approx(0.25) and found["seeds"] == 2
    assert study_report.interval(after, {5: before[0]}) is None
    assert study_report.interval({0: {"a": (1.0, 1.0)}}, {0: {"b": (1.0, 1.0)}}) is None


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
    one = {0: kept_run([20, 30, 100]), 3: kept_run([1])}
    other = {0: kept_run([23, 34, 90], same=(0, 0, 0, 0, 1, 1), corruption=0)}
    here, there = study_report.matched(one, other)
    assert set(here["necessity"]) == {0} and set(here["necessity"][0]) == {"q0", "q2"}
    assert set(here["comprehensiveness/mask"][0]) == {"q0", "q2"}
    found = study_report.interval(here["corruption"], there["corruption"])
    assert found["value"] == 1 and found["questions"] == 2
    found = study_report.interval(here["truncation"], there["truncation"])
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
        kept.setdefault(record["id"], []).append(study.record_row(record, counts))
    assert study_report.table1_of({"heldout": kept}, "heldout") == table1_ratios(records, words)


def test_numbers_are_kept_with_five_digits_and_json_has_no_nan():
    values = [0.123456789, 123456.789, True, None, float("nan"), 3]
    assert [study.round_off(v) for v in values] == [0.12346, 123460.0, 1, None, None, 3.0]


def test_the_arms_are_commands_that_train_py_takes():
    from config import parse_args

    configs = {arm: parse_args(study.train_command(arm, 1)[1:]) for arm in study.ARMS}
    assert all(config.seed == 1 for config in configs.values())
    rewards = {(c.saliency, c.saliency_sign, c.saliency_reduction, c.gate_saliency, c.mask_sparsity,
                c.shuffle_saliency, c.saliency_weight) for c in configs.values()}  # fmt: skip
    assert len(rewards) == len(study.ARMS)  # no arm twice
    same = {(c.lr, c.steps, c.questions, c.rollouts, c.mask_steps) for c in configs.values()}
    assert len(same) == 1


def rollouts(layers):
    """A tiny Llama and three rollouts, as records of fewer_steps.sample and as their tails."""
    model = tiny.llama(num_hidden_layers=layers, gain=1.5)
    prompts, reasonings = tiny.ids(1, 3, 2, 3), tiny.ids(2, 5, 3, 4)
    tails = list(zip(tiny.ids(3, 1, 2, 1), tiny.ids(4, 2, 1, 3), strict=True))
    rows = [
        {"prompt": prompt, "trace": types.SimpleNamespace(reasoning=reasoning)}
        for prompt, reasoning in zip(prompts, reasonings, strict=True)
    ]
    return model, rows, tails


def test_a_mask_of_answer_rows_is_the_whole_masks_where_the_others_do_not_matter():
    """With one layer the reasoning's own rows never reach the answer."""
    model, rows, tails = rollouts(layers=1)
    delimiters, answers = map(list, zip(*tails, strict=True))
    prompts, reasonings = [r["prompt"] for r in rows], [r["trace"].reasoning for r in rows]
    whole = optimize_masks(model, prompts, reasonings, delimiters, answers, CONFIG)
    found = sign.smaller_mask(model, rows, tails, "answer rows", CONFIG, lambda done: None)
    for n, reasoning in enumerate(reasonings):
        length, count = len(reasoning), int(whole.region[n].any(1).sum())
        restored = 1 - whole.mask[n, length:count, :length].clamp(max=0) / CONFIG.init
        assert found[n] == pytest.approx(restored.mean().item(), abs=1e-5)
    per_token = token_saliency(whole, CONFIG)  # in which the idle rows count
    assert abs(found[0] - per_token[0].mean()) > 1e-4


def test_a_mask_per_column_by_a_plain_loop():
    model, rows, tails = rollouts(layers=2)
    found = sign.smaller_mask(model, rows, tails, "per column", CONFIG, lambda done: None)
    for n, (row, (delimiter, answer)) in enumerate(zip(rows, tails, strict=True)):
        reasoning, start = row["trace"].reasoning, len(row["prompt"])
        tokens = torch.tensor([[*row["prompt"], *reasoning, *delimiter, *answer]])
        column = torch.full((len(reasoning),), CONFIG.init, requires_grad=True)
        optimizer = torch.optim.AdamW([column], CONFIG.lr, CONFIG.betas, weight_decay=0.05)
        for _ in range(CONFIG.steps):
            mask = torch.zeros(tokens.shape[1], tokens.shape[1])
            end = start + len(reasoning)
            mask[start:, start:end] = 10 * column.clamp(max=0)
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
    text = sign.markdown(table)
    assert "| short | -1.00 [-1.00, -1.00] |" in text and "| - |" in text
