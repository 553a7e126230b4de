"""Metrics of an update's rollouts, by hand."""

import pytest
import torch

from lab.run.metrics import evaluation_line, of_policy, of_rollouts
from lab.run.ranks import Ranks

FACT = {
    "measured": True, "length": 4, "tokens": 8, "truncated": False, "delimiters": 1,
    "no_reasoning": False, "computing": None, "mask_losses": None, "reliance": None,
}  # fmt: skip


def test_reliance_is_a_mean_over_the_rollouts_that_have_it():
    rows = [[0.9, 0.1, 0.5], [0.2, 0.6, 1.0], None]
    metrics = of_rollouts([FACT | {"reliance": row} for row in rows])
    assert metrics["p_gold"] == pytest.approx((0.9 + 0.2) / 2)
    assert metrics["necessity"] == pytest.approx((0.8 + 0) / 2)  # never below 0
    assert metrics["sufficiency"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["mediation"] == pytest.approx(0.8 * 0.5 / 2)  # a mean of products


def test_the_computing_share_leaves_out_traces_without_a_label():
    labels = (True, False, False, None)
    assert of_rollouts([FACT | {"computing": label} for label in labels])["computing"] == 1 / 3


def test_what_no_rollout_has_is_none():
    metrics = of_rollouts([FACT, FACT])
    names = ("computing", "p_gold", "necessity", "sufficiency", "mediation", "mask_loss_end")
    assert [metrics[name] for name in names] == [None] * 6 and metrics["length"] == 4


ALONE = Ranks(0, 1, torch.device("cpu"))
STATS = {
    "loss": 0.5, "entropy": 12.0, "ratio_max": 1.5, "ratio_min": 0.5, "gradient_norm": 2.0,
}  # fmt: skip


def test_numbers_of_the_policy_are_of_the_rollouts_that_were_computed():
    """The last row of the update only filled a rank up."""
    facts = [FACT | {"tokens": tokens} for tokens in (9, 2, 4, 5)]
    stats = STATS | {"clipped_rows": [0.5, 0.1, 0.2, 1.0, 0.0]}
    metrics = of_policy(stats, 4, facts, ALONE)
    assert metrics["clip_fraction"] == pytest.approx(1.8 / 4)
    assert metrics["clip_fraction_short"] == pytest.approx((0.1 + 0.2) / 2)
    assert metrics["clip_fraction_long"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["entropy"] == pytest.approx(12 / 20) and metrics["loss"] == 0.5
    one = of_policy(STATS | {"clipped_rows": [0.25]}, 1, facts[:1], ALONE)
    assert [one[f"clip_fraction{half}"] for half in ("", "_short", "_long")] == [0.25] * 3
    assert set(of_policy(None, 0, [], ALONE).values()) == {None}


def test_the_line_of_an_evaluation_names_the_computing_share_where_there_is_one():
    summary = {"problems": 2, "pass@1": 0.5, "tokens": 9.0}
    assert "computing" not in evaluation_line("before", summary)
    assert "computing 25.0%" in evaluation_line("before", summary | {"computing": 0.25})
