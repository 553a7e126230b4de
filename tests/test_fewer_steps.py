"""The rank correlations and tables of the study of fewer steps, by hand."""

import math
import random

import numpy as np
import pytest

from atman import MaskConfig
from data import micro_labels, micro_task
from data.tokenizer import Tokenizer
from data.traces import Rollout, reasoning_spans, split_trace
from lab.study.fewer_steps import (
    kendall,
    label_auroc,
    pooled_auroc,
    ranks,
    spearman,
    token_spearman,
    within_groups,
)


def test_ranks_share_their_mean_where_tied():
    assert ranks([30.0, 10.0, 20.0]).tolist() == [2, 0, 1]
    assert ranks([5, 1, 5, 9, 5]).tolist() == [2, 0, 2, 4, 2]  # ranks 1, 2, 3 are shared
    assert ranks([7, 7]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "x, y, rho, tau",
    [
        ([1, 2, 3, 4], [10, 20, 40, 80], 1, 1),
        ([1, 2, 3, 4], [8, 4, 2, 1], -1, -1),
        # rho = 1 - 6 * (1 + 1 + 0 + 0) / (4 * 15); of 6 pairs one disagrees
        ([1, 2, 3, 4], [2, 1, 3, 4], 0.8, 4 / 6),
        # ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3; centred: -1.5, 0, 0, 1.5 and -1.5, -0.5, 0.5, 1.5.
        # Of 6 pairs 5 agree and one is tied on the left.
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5), 5 / math.sqrt(5 * 6)),
        # ties on both sides: pairs 01 tied left, 12 tied right, 02 agrees
        ([1, 1, 2], [1, 2, 2], 0.75 / 1.5, 1 / 2),
    ],
)
def test_rank_correlations_by_hand(x, y, rho, tau):
    for left, right in ((x, y), (y, x), (np.exp(x), y)):  # only the order counts
        assert spearman(left, right) == pytest.approx(rho)
        assert kendall(left, right) == pytest.approx(tau)
    assert spearman(x, [-value for value in y]) == pytest.approx(-rho)
    assert kendall(x, [-value for value in y]) == pytest.approx(-tau)


def test_a_constant_side_has_no_order():
    for measure in (spearman, kendall):
        assert measure([1, 1, 1], [1, 2, 3]) is None
        assert measure([1, 2, 3], [0.0, 0.0, 0.0]) is None
        assert measure([1], [2]) is None


def test_groups_are_kept_apart_and_constant_ones_counted():
    ids = ["a", "b", "a", "c", "b", "c", "a"]  # in any order
    rewards = [1, 50, 2, 7, 40, 7, 3]  # a: 1 2 3, b: 50 40, c: constant
    reference = [10, 1, 20, 3, 2, 4, 30]
    found = within_groups(spearman, rewards, reference, ids)
    assert (found["groups"], found["skipped"]) == (2, 1)
    assert found["mean"] == pytest.approx(0)  # +1 in a, -1 in b
    assert found["half"] == pytest.approx(1.96 * math.sqrt(2) / math.sqrt(2))


def test_token_order_is_a_mean_over_traces():
    tokens = [np.array([1.0, 2, 3]), np.array([5.0, 4]), np.array([1.0])]
    reference = [np.array([1.0, 5, 9]), np.array([1.0, 2]), np.array([3.0])]
    assert token_spearman(tokens, reference) == pytest.approx(0)  # +1, -1, and none for one token


def test_auroc_counts_a_question_once():
    # a: 1 and 0.5; b: 0.5, and a trace with one class alone; c: no area at all
    mean, half, questions, traces = pooled_auroc(
        [1.0, 0.5, 0.5, None, None], ["a", "a", "b", "b", "c"]
    )
    assert mean == pytest.approx((0.75 + 0.5) / 2) and (questions, traces) == (2, 3)
    assert half == pytest.approx(1.96 * np.std([0.75, 0.5], ddof=1) / math.sqrt(2))


def test_only_right_rollouts_have_labels():
    tokenizer, problem = Tokenizer.from_directory("data/micro"), micro_task.load("heldout", 1)[0]
    reasoning = micro_task.write_trace(problem, random.Random(0), verbosity=1)
    rollouts, tokens = [], []
    for answer in (problem.answer, f"1{problem.answer}"):  # the second is wrong
        ids = [*tokenizer.encode(f"{reasoning}\n#####\n{answer}"), tokenizer.eos_ids[-1]]
        rollouts.append(Rollout(problem, [1], ids, split_trace(ids, tokenizer)))
        text, spans = reasoning_spans(rollouts[-1].trace.reasoning, tokenizer)
        labels = micro_labels.token_labels(text, problem.answer, spans)
        tokens.append(np.array(labels) == micro_labels.COMPUTING)  # as good as can be
    found = label_auroc({"mask": tokens, "attribution": [~t for t in tokens]}, rollouts, tokenizer)
    for which in ("all tokens", "no punctuation"):
        assert found["mask"][which][0] == 1 and found["attribution"][which][0] == 0
        assert found["mask"][which][2:] == (1, 1)  # questions, traces


def test_rules_go_as_far_as_the_papers():
    assert MaskConfig.in_steps(200) == MaskConfig.in_steps(200, path_memory=True) == MaskConfig()
    for path_memory in (False, True):
        config = MaskConfig.in_steps(20, path_memory)
        assert config.steps * config.lr == pytest.approx(0.2)
    assert MaskConfig.in_steps(20).betas == (0.6, 0.9999)
    # after as much of the path as little is left of the first gradient
    betas = MaskConfig.in_steps(20, path_memory=True).betas
    assert [beta**20 for beta in betas] == pytest.approx([0.6**200, 0.9999**200])
