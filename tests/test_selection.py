"""The rewards and the tables of the study's selection, by hand."""

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch

from atman import lay_out, plain_logits
from data import micro_task
from data.tokenizer import Tokenizer
from data.traces import Rollout, split_trace
from lab.study import selection


def kept_of(**rewards):
    """Three questions: a, b with both kinds of traces, c with computing ones alone."""
    traces = {
        "id": ["a", "b", "a", "c", "b", "c", "a"],  # in any order
        "sample": [0, 0, 1, 0, 1, 1, 2],
        "computing": [True, True, True, True, False, True, False],
        "right": [True, True, False, False, False, False, True],
        "length": [10, 20, 30, 5, 10, 5, 20],
    }
    columns = {"mask, restored": [0.0] * 7, "CIR": [0.0] * 7} | rewards
    costs = {name: {"passes": 2, "kind": "f", "seconds": 0.5} for name in columns}
    costs["mask, restored"] = {"passes": 201, "kind": "b", "seconds": 2.0}
    return {"traces": traces, "rewards": columns, "costs": costs}


# a: 3, 1 | 1, of the computing ones 3 alone is right, and so is the decorating one; b: 0 | 5
PAID = [3.0, 0.0, 1.0, 9.0, 5.0, 8.0, 1.0]


def test_auc_within_a_question_by_hand():
    kept = kept_of(paid=PAID)
    # a: of the pairs 3 > 1 and 1 = 1 one and a half; b: 0 < 5; c has one kind alone
    assert selection.within(kept, "paid", "computing") == {"a": (0.75, 1), "b": (0, 1)}
    # Of the right ones a keeps 3 | 1, b one trace, c none.
    assert selection.within(kept, "paid", "computing", right_only=True) == {"a": (1, 1)}
    assert selection.within(kept, "paid", "right") == {"a": (0.75, 1), "b": (0, 1)}
    found = selection.estimates(kept, ["paid"], selection.COLUMNS)["paid"]
    assert found["AUC, all rollouts"]["value"] == 0.375  # a question counts once
    assert found["AUC, all rollouts"]["questions"] == 2
    assert (found["AUC, all rollouts"]["low"], found["AUC, all rollouts"]["high"]) == (0, 0.75)
    assert (found["AUC, right ones"]["value"], found["AUC, right ones"]["low"]) == (1, None)
    # Lengths 10, 30, 20 and pays 3, 1, 1 in a; 20, 10 and 0, 5 in b; c is constant.
    of_a = (-1 * 1 + 1 * -0.5 + 0 * -0.5) / math.sqrt(2 * 1.5)
    rho = found["rank correlation with length"]
    assert rho["value"] == pytest.approx((of_a - 1) / 2) and rho["questions"] == 2


def test_differences_are_paired_by_question():
    turned = [-value for value in PAID]
    kept = kept_of(CIR=turned, necessity=PAID, sufficiency=turned, mediation=[0.0] * 7)
    found = selection.estimates(kept, selection.RELIANCE, selection.AUCS, base="CIR")
    # a: 0.75 - 0.25, b: 0 - 1
    assert found["necessity"]["AUC, all rollouts"]["value"] == pytest.approx(-0.25)
    estimate = found["sufficiency"]["AUC, all rollouts"]
    assert [estimate[key] for key in ("value", "low", "high")] == [0, 0, 0]
    assert found["mediation"]["AUC, all rollouts"]["value"] == pytest.approx((0.25 - 0.5) / 2)
    assert found["necessity"]["AUC, right ones"]["questions"] == 1


def test_markdown_says_kinds_costs_and_questions():
    rewards = {"necessity": PAID, "sufficiency": PAID, "mediation": PAID}
    text = selection.markdown(kept_of(**rewards))
    assert text.startswith("7 valid traces of 3 questions: 5 computing (40.0% right), 2 decorating")
    assert "hold both kinds: 2, and 1 among right traces alone. A trace costs 2 s by mask" in text
    assert "| reward | AUC, all rollouts (2) | AUC, right ones (1) |" in text
    assert "| necessity | 0.375 [0.000, 0.750] | - |" in text
    assert "| 2 f | 25.00% |" in text and "| 201 b | 100.00% |" in text
    assert "| less CIR | AUC, all rollouts (2) | AUC, right ones (1) |" in text
    # CIR is paid the same everywhere, 0.5: a 0.75 - 0.5, b 0 - 0.5.
    assert "| mediation | -0.125 [-0.500, +0.250] | - |" in text


def test_markdown_of_a_start_without_decoration():
    rewards = {"necessity": PAID, "sufficiency": PAID, "mediation": PAID}
    kept = kept_of(**rewards)
    kept["traces"]["computing"] = [True] * 7
    text = selection.markdown(kept)
    assert "7 computing (42.9% right), 0 decorating (0.0% right)" in text
    assert "hold both kinds: 0, and 0 among right traces alone" in text
    assert "| AUC, all rollouts (0) | AUC, right ones (0) | AUC of right over wrong (2) |" in text
    assert "| mediation | - | - |" in text and "nan" not in text


@pytest.mark.parametrize(
    "x, y, rho",
    [
        ([1, 2, 3, 4], [10, 20, 40, 80], 1),
        ([1, 2, 3, 4], [8, 4, 2, 1], -1),
        # rho = 1 - 6 * (1 + 1 + 0 + 0) / (4 * 15)
        ([1, 2, 3, 4], [2, 1, 3, 4], 0.8),
        # ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3; centred: -1.5, 0, 0, 1.5 and -1.5, -0.5, 0.5, 1.5
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_spearman_by_hand(x, y, rho):
    for left, right in ((x, y), (y, x), (np.exp(x), y)):  # only the order counts
        assert selection.spearman(left, right) == pytest.approx(rho)


def case_of(layers=2):
    """A tiny Llama and three ragged rollouts: prompt, reasoning, delimiter, answer."""
    model = tiny.llama(num_hidden_layers=layers, gain=1.5)
    parts = tiny.ids(1, 3, 2, 3), tiny.ids(2, 5, 3, 4), tiny.ids(3, 1, 2, 1), tiny.ids(4, 2, 1, 3)
    parts = list(zip(*parts, strict=True))
    return parts, selection.Case(model, parts)


@torch.no_grad()
def by_hand(model, parts, level) -> torch.Tensor:
    """P(gold) of each rollout by itself: the whole model under level(row's part, column's part)."""
    found = []
    for lists in parts:
        part = [name for name, ids in zip("PRDA", lists, strict=True) for _ in ids]
        part[0] = "BOS"
        mask = torch.tensor([[float(level(row, column)) for column in part] for row in part])
        ids = [token for of_part in lists for token in of_part]
        logprobs = model(torch.tensor([ids]), mask=mask)[0].log_softmax(-1)
        places = range(len(ids) - len(lists[3]), len(ids))
        found.append(math.exp(sum(logprobs[place - 1, ids[place]].item() for place in places)))
    return torch.tensor(found)


def test_fixed_masks_by_the_whole_model():
    parts, case = case_of()

    def p(level):
        return by_hand(case.model, parts, level)

    full, hidden = p(lambda row, column: 0), p(lambda row, column: -1e4 * (column == "R"))
    late = p(lambda row, column: -1e4 * (column == "R" and row in "DA"))
    weaker = p(lambda row, column: -2 * (column == "R"))
    alone = p(lambda row, column: -1e4 * (column == "P" and row in "DA"))
    blind = p(lambda row, column: -1e4 * (column == "P" and row in "RDA"))
    found = selection.by_reliance(case) | selection.by_level(case, -2.0)
    found |= selection.soft_sr(case)
    necessity = (full - hidden).clamp(min=0)
    wanted = {
        "P(gold)": full, "necessity": necessity, "sufficiency": alone,
        "mediation": necessity * alone, "geometric mean of the two": (necessity * alone) ** 0.5,
        "smaller of the two": necessity.minimum(alone), "mean of the two": (necessity + alone) / 2,
        "log necessity": (full / hidden).log(), "log sufficiency": alone.log(),
        "mean of the two logs": (full / hidden * alone).log() / 2,
        "P(gold) - P(gold, H at -2)": full - weaker, "SR, P(gold)": blind,
    }  # fmt: skip
    assert wanted.keys() == found.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=2e-3, atol=1e-9, msg=name)
    assert torch.equal(late, hidden)  # a knockout from the answer's rows would be no other reward
    # The others tell apart, or equality would say little.
    masks = torch.stack((full, hidden, weaker, alone, blind)).log()  # (5, B)
    apart = (masks[:, None] - masks).abs().amax(2) + torch.eye(5)
    assert apart.min() > 0.02  # ten times what the comparison allows


def test_integrated_gradients_sum_to_what_the_path_wins():
    parts, case = case_of()
    gained = selection.integrated_gradients(case.batch, case.logits, -4.0, points=64)
    whole = by_hand(case.model, parts, lambda row, column: 0)
    start = by_hand(case.model, parts, lambda row, column: -4 * (column == "R"))
    torch.testing.assert_close(gained.sum((1, 2)), (whole / start).log(), rtol=1e-2, atol=1e-3)
    assert not gained[~case.batch.region].any()
    # One point: minus the start times the slope half of the way, by finite differences.
    single, step = selection.integrated_gradients(case.batch, case.logits, -4.0, points=1), 0.05
    values = []
    for sign in (1, -1):
        mask = -2.0 * case.batch.region.float()
        mask[0, 2, 1] += sign * step
        values.append(selection.atman.answer_probability(case.logits(mask), case.batch)[0].log())
    slope = (values[0] - values[1]).item() / (2 * step)
    assert single[0, 2, 1].item() == pytest.approx(4 * slope, rel=0.02, abs=1e-4)


def test_masks_are_read_as_they_are_named():
    parts, case = case_of()
    work = dict(enumerate(selection.computations(steps=3)))
    assert [work[n][:2] for n in range(4)] == [(4, "b")] * 4
    configs = [work[n][2].keywords["config"] for n in range(4)]
    assert [config.init for config in configs] == [-0.4, -1, -2, -0.4]
    # Each can go half of the way back to no mask.
    assert [config.lr * config.steps for config in configs] == pytest.approx([0.2, 0.5, 1, 0.2])
    assert [config.sparsity for config in configs] == [0, 0, 0, 1e-3]
    found = work[0][2](case)
    torch.testing.assert_close(found["mask, restored"], 1 - found["mask, literal"])
    start = by_hand(case.model, parts, lambda row, column: -4 * (column == "R"))
    masks = selection.atman.optimize_masks(case.model, case.batch, configs[0])
    plain = plain_logits(case.model, lay_out(parts, "cpu"))((10 * masks.H).detach())
    end = selection.atman.answer_probability(plain, case.batch).detach()
    torch.testing.assert_close(found["mask, P(gold) recovered"], end - start, rtol=1e-3, atol=1e-5)


def test_sr_compares_the_answers_with_and_without_the_question(monkeypatch):
    tokenizer, problem = Tokenizer.from_directory("data/micro"), micro_task.load("heldout", 1)[0]
    text = micro_task.write_trace(problem, random.Random(0), verbosity=0)
    ids = [*tokenizer.encode(f"{text}\n#####\n{problem.answer}"), tokenizer.eos_ids[-1]]
    prompt, trace = tokenizer.encode_prompt(problem.question), split_trace(ids, tokenizer)
    asked = []

    def answers(model, tokenizer, rollouts, starts, max_new_tokens):
        asked.extend(starts)
        return [["5", "5"], [None, None], ["5", "6"]]

    monkeypatch.setattr(selection, "greedy_answers", answers)
    rollouts = [Rollout(problem, prompt, ids, trace)] * 3
    _, case = case_of()
    case.tokenizer, case.rollouts = tokenizer, rollouts
    found = selection.sr(case)
    assert found["SR"].tolist() == [1, 0, 0]
    (whole, first), (bare, then) = asked[0]
    assert first == then == trace.delimiter and whole == prompt + trace.reasoning
    assert tokenizer.decode(bare) == tokenizer.decode(whole).replace(problem.question, "")


def test_a_run_keeps_every_reward_of_every_trace(tmp_path, capsys):
    out = tmp_path / "selection.json"
    selection.run(
        selection.Settings(
            questions=2, rollouts=2, steps=2, batch=3, device="cpu", out=str(out), first=1
        )
    )
    kept = json.loads(out.read_text())
    count = len(kept["traces"]["id"])
    assert 1 <= count <= 4 and set(kept["traces"]["id"]) <= {"micro/heldout/1", "micro/heldout/2"}
    columns = [*kept["traces"].values(), *kept["rewards"].values()]
    assert {len(column) for column in columns} == {count}
    assert kept["rewards"]["minus the length"] == [-length for length in kept["traces"]["length"]]
    assert kept["costs"].keys() == kept["rewards"].keys()
    necessity, mediation = (kept["costs"][name] for name in ("necessity", "mediation"))
    assert (necessity["passes"], mediation["passes"]) == (2, 3)
    assert necessity["seconds"] == pytest.approx(mediation["seconds"] * 2 / 3)
    assert all(cost["seconds"] > 0 for cost in kept["costs"].values() if cost["passes"])
    assert capsys.readouterr().out.strip() == selection.markdown(kept)


def test_it_runs_where_spacy_is_not_installed():
    code = "import sys, lab.study.selection; sys.exit('spacy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
