"""The measures of faithfulness: planted reasoners, hand-worked cases, plain loops beside ours."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from atman import MaskConfig
from data import load_problems
from data.prompts import Prompting
from data.tokenizer import Tokenizer
from data.traces import split_trace
from lab.measure import faithfulness
from lab.measure.faithfulness import (
    Erased,
    altered_number,
    altered_reasoning,
    area_over_curve,
    auroc,
    corruption,
    erasure,
    jensen_shannon,
    knockout,
    label_areas,
    rankings,
    top_tokens,
    truncation,
)
from lab.run.checkpoint import load_llama
from lab.run.sampling import sample
from tests.planted import planted_rollouts, reasoner, rollout_of

MAPS = {
    "mask": (MaskConfig(steps=30), "mask"),
    "attribution": (MaskConfig(steps=30), "attribution"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory("data/micro")


@pytest.fixture(scope="module")
def micro(tokenizer):
    """data/micro in float64, and some of its own traces."""
    model = load_llama("data/micro")
    problems = load_problems("micro", "heldout", limit=4)
    seeds = [(0, n) for n in range(len(problems))]
    rollouts, _ = sample(model, tokenizer, problems, Prompting("micro"), 150, seeds)
    rollouts = [replace(r, seed=(0, n)) for n, r in enumerate(rollouts) if r.trace.valid]
    assert len(rollouts) > 2 and len({len(r.trace.reasoning) for r in rollouts}) > 1
    return model.double(), rollouts


@pytest.fixture(scope="module")
def planted(tokenizer):
    """Of each planted reasoner the mean of every measure over its traces."""
    means = {}
    for kind in ("copier", "random", "bypass"):
        model = reasoner(kind, tokenizer)
        rollouts = planted_rollouts(model, tokenizer)
        assert all(rollout.trace.valid for rollout in rollouts)
        moved = knockout(model, tokenizer, rollouts)
        erased = Erased(model, tokenizer, rollouts)
        losses = erasure(erased, rankings(erased, MAPS))
        curves = truncation(model, tokenizer, rollouts)
        means[kind] = {
            "curve": np.mean(curves, 0),
            "truncation": np.mean([area_over_curve(curve) for curve in curves]),
            "necessity": np.mean([row["necessity"] for row in moved]),
            "direct": np.mean([row["direct"] for row in moved]),
            "corruption": np.mean(corruption(model, tokenizer, rollouts, 8)),
        } | {
            f"{test}/{name}": np.mean([row[test][name] for row in losses])
            for test in ("comprehensiveness", "sufficiency")
            for name in losses[0][test]
        }
    return means


def test_reliance_orders_planted_reasoners(planted):
    copier, mixed, bypass = planted["copier"], planted["random"], planted["bypass"]
    for measure in ("truncation", "necessity", "corruption"):
        assert copier[measure] > mixed[measure] + 0.1 > bypass[measure] + 0.2, measure
    assert copier["direct"] < mixed["direct"] - 0.02 < bypass["direct"] - 0.2


def test_a_copier_rests_on_its_reasoning_and_a_bypass_does_not(planted):
    copier, bypass = planted["copier"], planted["bypass"]
    assert copier["truncation"] == pytest.approx(0.9) and copier["corruption"] == 1
    assert copier["necessity"] > 0.97 * math.log(2) and copier["direct"] < 1e-6
    assert bypass["curve"] == pytest.approx(np.ones(6)) and bypass["corruption"] == 0
    assert bypass["truncation"] == pytest.approx(0) and bypass["necessity"] < 1e-6
    assert bypass["direct"] > 0.97 * math.log(2)


def test_right_maps_of_a_copier_beat_those_that_know_nothing(planted):
    """One token, the last number, is everything: hidden all is lost, alone it is enough."""
    copier = planted["copier"]
    for name in ("mask", "attribution", "gradient", "leave-one-out"):
        assert copier[f"comprehensiveness/{name}"] > 0.95, name
        assert abs(copier[f"sufficiency/{name}"]) < 0.05, name
    for name in ("recency", "is-number", "random"):
        assert copier[f"comprehensiveness/{name}"] < 0.8, name
        assert copier[f"sufficiency/{name}"] > 0.2, name
    assert copier["comprehensiveness/random"] < copier["comprehensiveness/is-number"]


def test_no_map_of_a_bypass_finds_anything(planted):
    for measure, value in planted["bypass"].items():
        if "/" in measure:
            assert abs(value) < 1e-3, measure


def test_area_over_the_curve_by_hand():
    assert area_over_curve([True] * 6) == pytest.approx(0)
    assert area_over_curve([False] * 5 + [True]) == pytest.approx(0.9)
    # trapezoids of width 0.2: 0, 0.1, then 0.2 three times
    assert area_over_curve([False, False, True, True, True, True]) == pytest.approx(0.3)
    assert area_over_curve([0.5, 0.5, 0.5, 0.5, 0.5, 1.0]) == pytest.approx(0.45)


def test_jensen_shannon_by_hand():
    def divergence(p, q):
        return jensen_shannon(torch.tensor(p).log(), torch.tensor(q).log()).item()

    assert divergence([0.3, 0.7], [0.3, 0.7]) == pytest.approx(0, abs=1e-7)
    assert divergence([1.0, 0.0], [0.0, 1.0]) == pytest.approx(math.log(2))
    # middle (3/4, 1/4): (ln(2/3)/2 + ln(2)/2) / 2 + ln(4/3) / 2
    by_hand = (math.log(2 / 3) / 2 + math.log(2) / 2) / 2 + math.log(4 / 3) / 2
    assert divergence([0.5, 0.5], [1.0, 0.0]) == pytest.approx(by_hand)
    assert divergence([1.0, 0.0], [0.5, 0.5]) == pytest.approx(by_hand)
    shifted = jensen_shannon(torch.tensor([1.0, 2.0]), torch.tensor([101.0, 102.0]))
    assert shifted.item() == pytest.approx(0, abs=1e-7)  # logits are no probabilities


def test_knockout_is_what_a_plain_loop_gives(micro, tokenizer):
    """Each trace alone, the mask written entry by entry, the divergence in numpy."""
    model, rollouts = micro
    found = knockout(model, tokenizer, rollouts)
    for rollout, row in zip(rollouts, found, strict=True):
        trace = rollout.trace
        answer = trace.answer[:-1]
        assert trace.answer[-1] in tokenizer.eos_ids
        tokens = torch.tensor([[*rollout.prompt, *trace.reasoning, *trace.delimiter, *answer[:-1]]])
        P, T = len(rollout.prompt), len(trace.reasoning)
        S = tokens.shape[1]
        columns = {"necessity": range(P, P + T), "direct": range(1, P)}
        whole = model(tokens)[0].softmax(-1).detach().numpy()
        for name, hidden in columns.items():
            mask = torch.zeros(S, S, dtype=torch.float64)
            for query_pos in range(P + T, S):
                for key_pos in hidden:
                    mask[query_pos, key_pos] = -1e4
            blind = model(tokens, mask=mask)[0].softmax(-1).detach().numpy()
            values = []
            for position in range(S - len(answer), S):
                p, q = whole[position], blind[position]
                m = (p + q) / 2
                values.append(((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2)
            assert row[name] == pytest.approx(np.mean(values), abs=1e-9)


def test_an_answer_without_tokens_has_no_knockout(micro, tokenizer):
    model, rollouts = micro
    silent = replace(rollouts[0], trace=replace(rollouts[0].trace, answer=[tokenizer.eos_ids[0]]))
    alone, beside = (
        knockout(model, tokenizer, [silent]),
        knockout(model, tokenizer, [silent, rollouts[1]]),
    )
    assert alone == [None] and beside[0] is None
    assert beside[1] == pytest.approx(knockout(model, tokenizer, [rollouts[1]])[0])


def test_erased_traces_are_what_the_whole_model_gives(micro, tokenizer):
    """log p(answer) under a mask over the whole sequence: columns hidden from all later rows."""
    model, rollouts = micro
    erased, rng = Erased(model, tokenizer, rollouts), np.random.default_rng(0)
    variants = [
        (n, rng.random(len(rollout.trace.reasoning)) < share)
        for n, rollout in enumerate(rollouts)
        for share in (0.0, 0.4, 1.0)
    ]
    for (n, hidden), found in zip(variants, erased.logprobs(variants), strict=True):
        rollout = rollouts[n]
        *_, delimiter, answer = rollout.masked_parts(tokenizer)
        tokens = [*rollout.prompt, *rollout.trace.reasoning, *delimiter, *answer]
        mask = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
        for place in np.flatnonzero(hidden) + len(rollout.prompt):
            mask[place + 1 :, place] = -1e4
        logprobs = model(torch.tensor([tokens]), mask=mask)[0].log_softmax(-1)
        start = len(tokens) - len(answer)
        by_loop = sum(logprobs[start + i - 1, token].item() for i, token in enumerate(answer))
        assert found == pytest.approx(by_loop, abs=1e-8)


def test_the_gradient_ranking_is_the_slope_at_the_unmasked_model(micro, tokenizer):
    model, rollouts = micro
    erased = Erased(model, tokenizer, rollouts[:1])
    (slopes,) = erased.gradients()
    rollout, step = rollouts[0], 1e-5
    *_, delimiter, answer = rollout.masked_parts(tokenizer)
    P, T = len(rollout.prompt), len(rollout.trace.reasoning)
    tokens = torch.tensor([[*rollout.prompt, *rollout.trace.reasoning, *delimiter, *answer]])

    def loss(token, change):
        mask = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float64)
        mask[P:, P + token] = change  # its own row too
        logprobs = model(tokens, mask=mask)[0].log_softmax(-1)[-len(answer) - 1 : -1]
        return -logprobs.gather(1, torch.tensor(answer)[:, None]).mean().item()

    assert len(slopes) == T
    for token in (0, T // 2, T - 1):
        by_difference = (loss(token, -step) - loss(token, step)) / (2 * step)
        assert slopes[token] == pytest.approx(by_difference, abs=1e-6)


def test_comprehensiveness_and_sufficiency_by_hand(tokenizer):
    """A model of whose ten tokens three count: p = 0.9 with all, 0.5, 0.3 and 0.1 less without."""
    worth = np.array([0, 0.5, 0, 0, 0.3, 0, 0, 0.1, 0, 0])

    class Planted:
        rollouts = [rollout_of(split_trace(list(range(10)), tokenizer), "1")]

        def logprobs(self, variants):
            return np.log([1e-9 + worth[~hidden].sum() for _, hidden in variants])

    assert len(Planted.rollouts[0].trace.reasoning) == 10
    (row,) = erasure(Planted(), [{"right": worth, "wrong": -worth}])
    assert row["probability"] == pytest.approx(0.9)
    # 1%, 5% and 10% of ten tokens are one token, 20% two, 50% five
    assert row["comprehensiveness"]["right"] == pytest.approx([0.5, 0.5, 0.5, 0.8, 0.9])
    assert row["sufficiency"]["right"] == pytest.approx([0.4, 0.4, 0.4, 0.1, 0.0])
    assert row["comprehensiveness"]["wrong"] == pytest.approx([0, 0, 0, 0, 0])
    assert row["sufficiency"]["wrong"] == pytest.approx([0.9] * 5)


def test_how_many_tokens_a_share_is():
    rng = np.random.default_rng(0)
    for length, counts in (
        (10, [1, 1, 1, 2, 5]),
        (30, [1, 2, 3, 6, 15]),
        (101, [2, 6, 11, 21, 51]),
    ):
        tops = top_tokens(np.arange(length), rng)
        assert [top.sum() for top in tops] == counts
        assert all(top[-count:].all() for top, count in zip(tops, counts, strict=True))


def test_ties_fall_by_chance_not_by_place_and_larger_shares_hold_smaller_ones():
    rng = np.random.default_rng(0)
    draws = [top_tokens(np.zeros(40), rng) for _ in range(400)]
    first = np.array([top[0] for top in draws])  # (400, 40), one token each
    assert (first.sum(1) == 1).all() and first[:, :20].sum() == pytest.approx(200, abs=50)
    for tops in draws:
        assert all((small <= large).all() for small, large in zip(tops, tops[1:], strict=False))


def test_the_changed_number_is_as_long_and_another():
    rng = np.random.default_rng(0)
    for number in ("0", "7", "10", "99", "00", "007", "1,200", "2.50", "9" * 40):
        for _ in range(30):
            changed = altered_number(number, rng)
            assert changed != number and len(changed) == len(number)
            assert changed.count(",") == number.count(",")
            assert changed.partition(".")[1:] == number.partition(".")[1:]


def test_corruption_changes_a_number_that_is_neither_given_nor_the_answer(micro, tokenizer):
    text = "She has 12 pens. 12 + 30 = 42. 42 - 2 = 40. 40 + 5 = 45. 45 - 5 = 40."
    ids = tokenizer.encode(text)
    trace = split_trace([*ids, *tokenizer.encode("\n#####\n40"), tokenizer.eos_ids[0]], tokenizer)
    seen = set()
    for seed in range(40):
        rollout = rollout_of(trace, "40", "12 pens, 30 more, 2 lost", seed=(seed,))
        before, changed = (tokenizer.decode(part) for part in altered_reasoning(rollout, tokenizer))
        assert text.startswith(before) and before[:-2] == changed[:-2]
        assert (
            before[-2:] in ("42", "45") and changed[-2:] != before[-2:] and changed[-2:].isdigit()
        )
        seen.add(len(before))
    assert len(seen) == 2  # the results: 42, and 45, not the 42 that is used
    held = rollout_of(trace, "40", "12 30 2 42 45")
    assert altered_reasoning(held, tokenizer) is None
    assert corruption(micro[0], tokenizer, [held], 8) == [None]
    negative = split_trace(
        [
            *tokenizer.encode("1 - 41 = -40."),
            *tokenizer.encode("\n#####\n-40"),
            tokenizer.eos_ids[0],
        ],
        tokenizer,
    )
    assert altered_reasoning(replace(rollout, trace=negative), tokenizer) is None


def drawn(tokenizer, text, question, draws=60):
    """Where the number that is changed begins in the text, for many seeds; the answer is 40."""
    ids = tokenizer.encode(text)
    trace = split_trace([*ids, *tokenizer.encode("\n#####\n40"), tokenizer.eos_ids[0]], tokenizer)
    starts = set()
    for seed in range(draws):
        found = altered_reasoning(rollout_of(trace, "40", question, seed=(seed,)), tokenizer)
        before, changed = (tokenizer.decode(part) for part in found)
        assert text.startswith(before) and before != changed
        starts.add(max(m.start() for m in faithfulness.NUMBER.finditer(before)))
    return starts


def test_what_is_changed_is_a_result_whatever_stands_around_it(tokenizer):
    text = "Step 1: 77 steps of 99.\n2. 12 + 30 = $42. 5 * 6 =30.\n3) 42 + 3 = 45. 45 - 5 = 40."
    found = drawn(tokenizer, text, "12 pens, 30 more, 2 lost, times 5 or 6")
    assert found == {text.index("42"), text.index("45.")}


def test_without_a_result_another_number_is_changed_but_never_a_label(tokenizer):
    text = "1. It is 71.\n 22) Then 82.\n3.5 more, 9 and 8: 40."
    found = drawn(tokenizer, text, "no 8 here")
    assert found == {text.index(n) for n in ("71", "82", "3.5", "9")}
    # With equations it is their results or nothing: else the wordier trace had more to draw from.
    for only in ("71 then 82 = 90", "It was 71, so 82 - 42 = 40."):
        ids = [*tokenizer.encode(f"{only}\n#####\n40"), tokenizer.eos_ids[0]]
        rollout = rollout_of(split_trace(ids, tokenizer), "40", "90")
        assert altered_reasoning(rollout, tokenizer) is None


def test_cuts_go_on_from_the_traces_own_delimiter_to_the_first_answer(tokenizer, monkeypatch):
    ids = tokenizer.encode("4 + 5 = 9. 9 - 1 = 8.\n<answer> 8\n")
    rollout = rollout_of(split_trace(ids, tokenizer, "<answer>", "8"), "8", "4 and 5, less 1")
    said, contexts = tokenizer.encode("8\n<answer> 7\n"), []

    def generate(model, rows, *_, complete):
        contexts.extend(rows)
        assert complete(0, tokenizer.encode("8")) is None
        return [said[: complete(n, said)] for n in range(len(rows))]

    monkeypatch.setattr(faithfulness, "generate", generate)
    assert truncation(None, tokenizer, [rollout]) == [[True] * 6]
    assert all(tokenizer.decode(row).endswith("<answer> ") for row in contexts)
    lengths = [len(row) for row in contexts]
    assert lengths == sorted(lengths) and len(set(lengths)) == 6

    said = tokenizer.encode(".\n<answer> 8\n##### 7")
    assert corruption(None, tokenizer, [rollout], 8) == [False]


def test_a_changed_run_without_an_answer_is_not_measurable(tokenizer, monkeypatch):
    """Nor is the other; and a readable one follows, or does not."""
    ids = tokenizer.encode("4 + 5 = 9. 9 - 1 = 8.")
    trace = split_trace([*ids, *tokenizer.encode("\n#####\n8"), tokenizer.eos_ids[0]], tokenizer)
    rollout = rollout_of(trace, "8", "4 and 5, less 1")

    def outcome(*texts):
        ends = [[*tokenizer.encode(text), tokenizer.eos_ids[0]] for text in texts]
        monkeypatch.setattr(faithfulness, "generate", lambda *_, **__: ends)
        return corruption(None, tokenizer, [rollout], 8)

    nine, eight, none = (f".\n#####\n{said}" for said in ("9", "8", "what"))
    assert outcome(nine, eight) == [True] and outcome(nine, nine) == [False]
    assert outcome(nine, none) == [None] == outcome(none, nine) == outcome(none, none)
    assert outcome(nine, " and on and on") == [None]


def test_recency_ranks_later_tokens_higher(micro, tokenizer):
    model, rollouts = micro
    (row,) = rankings(Erased(model, tokenizer, rollouts[:1]), {})
    length = len(rollouts[0].trace.reasoning)
    assert row["recency"].argmax() == length - 1 and (np.diff(row["recency"]) > 0).all()
    last = top_tokens(row["recency"], np.random.default_rng(0))[0]
    assert last[-1] and not last[0]


def test_a_label_map_that_is_the_truth_has_area_one(tokenizer):
    text = "12 + 30 = 42. Zounds! 5 + 6 = 11. 42 - 2 = 40."
    tail = [*tokenizer.encode("\n#####\n40"), tokenizer.eos_ids[0]]
    trace = split_trace([*tokenizer.encode(text), *tail], tokenizer)
    rollout = rollout_of(trace, "40")
    _, spans = faithfulness.reasoning_spans(trace.reasoning, tokenizer)
    labels = faithfulness.micro_labels.token_labels(trace.reasoning_text, "40", spans)
    truth = np.array(labels, dtype=float)
    areas = label_areas(rollout, tokenizer, {"right": truth, "wrong": -truth, "none": 0 * truth})
    for column in ("all tokens", "no punctuation"):
        assert areas[column] == {"right": 1.0, "wrong": 0.0, "none": 0.5}
    unknown, characters = areas["unlabelled"]
    assert characters == sum(not c.isspace() for c in trace.reasoning_text)
    assert len("Zounds!") <= unknown <= len("Zounds!....")


def test_auroc_counts_pairs_and_halves_ties():
    scores, labels = [0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1]
    pairs = [(p, n) for p, a in zip(scores, labels, strict=True) if a
             for n, b in zip(scores, labels, strict=True) if not b]  # fmt: skip
    by_hand = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
    assert auroc(scores, labels) == pytest.approx(by_hand) == pytest.approx(0.875)
    assert auroc([1, 2], [1, 1]) is None
    assert auroc([3, 3, 3], [1, 0, 1]) == 0.5


def test_truncation_on_the_shipped_model_by_a_plain_loop(micro, tokenizer):
    """Greedy decoding one token at a time with the whole model, each cut alone."""
    model, rollouts = micro
    rollout = min(rollouts, key=lambda rollout: len(rollout.trace.reasoning))
    answers = []
    for tenth in (0, 2, 4, 6, 8, 10):
        kept = round(tenth * len(rollout.trace.reasoning) / 10)
        ids = rollout.prompt + rollout.trace.reasoning[:kept] + rollout.trace.delimiter
        said = []
        while len(said) < 24 and not (said and said[-1] in tokenizer.eos_ids):
            said.append(int(model(torch.tensor([ids + said]))[0, -1].argmax()))
        answers.append(split_trace(rollout.trace.delimiter + said, tokenizer).number)
    (curve,) = truncation(model, tokenizer, [rollout])
    assert curve == [answer == answers[-1] for answer in answers]
