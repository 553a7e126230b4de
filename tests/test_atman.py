"""The mask by independent arithmetic: Eq. 1 to 3 of atman.py.

The tests of the optimisation run twice: over `plain_logits`, the whole model at every step, and
over `Suffix.logits`, which promises the same numbers.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import atman
from atman import (
    MaskConfig,
    Masks,
    lay_out,
    optimize_masks,
    plain_logits,
    rollout_saliency,
    token_saliency,
)
from tests import tiny
from tests.tiny import suffix_logits

# Three ragged rollouts: the lengths of no two parts are in the same order.
PROMPTS, REASONINGS = tiny.ids(1, 2, 4, 3), tiny.ids(2, 5, 3, 7)
DELIMITERS, ANSWERS = tiny.ids(3, 1, 2, 1), tiny.ids(4, 1, 3, 2)
ROLLOUTS = list(zip(PROMPTS, REASONINGS, DELIMITERS, ANSWERS, strict=True))

both_ways = pytest.mark.parametrize("logits_of", [plain_logits, suffix_logits])


def learn(model, rollouts, config, logits_of=plain_logits) -> Masks:
    batch = lay_out(rollouts, "cpu")
    return optimize_masks(model, batch, config, logits_of(model, batch))


def plain_loop(model, prompt, reasoning, delimiter, answer, config):
    """One rollout, AdamW by its formulas, one (S, S) mask through the whole sequence and head.

    Returns H after each step, the gradients there and the losses: steps + 1 of each.
    """
    P, T = len(prompt), len(reasoning)
    R = T + len(delimiter) + len(answer) - 1
    sequence = prompt + reasoning + delimiter + answer
    used = torch.ones(R, T, dtype=torch.bool).tril()
    H = torch.full((R, T), config.init, dtype=torch.float64) * used
    m, v, states, gradients, losses = 0, 0, [], [], []
    for step in range(config.steps + 1):
        H.requires_grad_()
        mask = torch.zeros(len(sequence), len(sequence), dtype=torch.float64)
        mask[P : P + R, P : P + T] = config.scale * H.clamp(max=0)
        logprobs = model(torch.tensor([sequence]), mask=mask)[0].log_softmax(-1)
        first = len(sequence) - len(answer)
        loss = -sum(logprobs[first + n - 1, token] for n, token in enumerate(answer)) / len(answer)
        (gradient,) = torch.autograd.grad(loss, H)
        H = H.detach()
        states.append(H)
        gradients.append(gradient)
        losses.append(loss.item())
        gradient = gradient + config.sparsity * used
        first_beta, second_beta = config.betas
        m = first_beta * m + (1 - first_beta) * gradient
        v = second_beta * v + (1 - second_beta) * gradient**2
        H = H * (1 - config.lr * config.weight_decay)
        corrected = (v / (1 - second_beta ** (step + 1))).sqrt() + 1e-8
        H = H - config.lr * (m / (1 - first_beta ** (step + 1))) / corrected
    return states, gradients, torch.tensor(losses, dtype=torch.float64)


def region_of(n):
    """R, T of rollout n."""
    T = len(REASONINGS[n])
    return T + len(DELIMITERS[n]) + len(ANSWERS[n]) - 1, T


# The loss and its gradient


@both_ways
def test_gradient_equals_finite_differences(logits_of):
    model = tiny.llama(dtype=torch.float64).requires_grad_(False)
    batch = lay_out(ROLLOUTS, "cpu")
    logits = logits_of(model, batch)
    generator = torch.Generator().manual_seed(5)
    H = torch.rand(batch.region.shape, generator=generator, dtype=torch.float64) * 0.7 - 0.5
    H = (H * batch.region).requires_grad_()

    def loss(H):
        return atman.answer_loss(logits((10.0 * H.clamp(max=0)) * batch.region), batch).sum()

    (gradient,) = torch.autograd.grad(loss(H), H)
    H = H.detach()
    assert (H > 0).sum() > 10 and (H < 0).sum() > 10
    assert (gradient[H > 0] == 0).all() and (gradient[~batch.region] == 0).all()
    assert gradient.abs().max() > 1e-2
    for entry in batch.region.nonzero().tolist():
        step = torch.zeros_like(H)
        step[tuple(entry)] = 1e-5
        with torch.no_grad():
            difference = (loss(H + step) - loss(H - step)).item() / 2e-5
        assert gradient[tuple(entry)].item() == pytest.approx(difference, rel=1e-6, abs=1e-8)


@both_ways
@torch.no_grad()
def test_fully_masked_reasoning_is_hidden_from_the_answer(logits_of):
    model = tiny.llama()
    changed_reasonings = zip(PROMPTS, tiny.ids(6, 5, 3, 7), DELIMITERS, ANSWERS, strict=True)
    batches = [lay_out(rollouts, "cpu") for rollouts in (ROLLOUTS, list(changed_reasonings))]
    logits = [logits_of(model, batch) for batch in batches]

    def losses(mask):
        return [
            atman.answer_loss(of_batch(mask), batch)
            for of_batch, batch in zip(logits, batches, strict=True)
        ]

    hiding = -1e4 * batches[0].region
    torch.testing.assert_close(*losses(hiding), atol=1e-6, rtol=0)
    # The delimiter, left open, would carry the reasoning to the answer: so would the answer itself.
    for n in range(3):
        R, T = region_of(n)
        D = len(DELIMITERS[n])
        for rows in (slice(T, T + D), slice(T + D - 1, R)):
            leaky = hiding.clone()
            leaky[n, rows] = 0
            before, after = losses(leaky)
            assert ((after - before).abs() > 1e-3).tolist() == [n == row for row in range(3)]


@torch.no_grad()
def test_fully_masked_reasoning_leaves_the_answer_logits():
    model = tiny.llama()
    (prompt, reasoning, delimiter, answer), (changed,) = ROLLOUTS[1], tiny.ids(6, 3)
    P, T = len(prompt), len(reasoning)

    def answer_logits(reasoning, rows):
        sequence = torch.tensor([prompt + reasoning + delimiter + answer])
        mask = torch.zeros(sequence.shape[1], sequence.shape[1])
        mask[rows, P : P + T] = -1e4
        return model(sequence, mask=mask)[0, P + T + len(delimiter) - 1 :]

    for rows in (slice(P, None), slice(P + T, None)):  # the reasoning's own rows do not matter
        same = answer_logits(reasoning, rows) - answer_logits(changed, rows)
        assert same.abs().max() < 1e-6
    open_delimiter = slice(P + T + len(delimiter), None)
    leak = answer_logits(reasoning, open_delimiter) - answer_logits(changed, open_delimiter)
    assert (leak.abs().amax(1) > 1e-2).all()


@both_ways
@torch.no_grad()
def test_answer_tokens_are_targets_and_the_last_one_only_that(logits_of):
    # Summed over every possible last token, the likelihoods of one answer's endings make 1.
    model = tiny.llama(dtype=torch.float64)
    prompt, reasoning, delimiter, (first, _) = ROLLOUTS[2]
    endings = [(prompt, reasoning, delimiter, [first, last]) for last in range(64)]
    batch = lay_out(endings, "cpu")
    assert (batch.tokens == batch.tokens[0]).all() and batch.tokens[0, -1] == first
    unmasked = logits_of(model, batch)(torch.zeros_like(batch.region, dtype=torch.float64))
    losses = atman.answer_loss(unmasked, batch)
    sequence = prompt + reasoning + delimiter
    logprobs = model(torch.tensor([sequence]))[0, -1].log_softmax(-1)
    likelihoods = (-2 * losses - logprobs[first]).exp()  # twice the mean, less the first token's
    assert likelihoods.sum().item() == pytest.approx(1, abs=1e-9)
    assert likelihoods.max() - likelihoods.min() > 0.01


@both_ways
@pytest.mark.parametrize("init", [-0.4, 0.0])
def test_losses_before_any_step_and_without_a_mask(init, logits_of):
    model = tiny.llama(dtype=torch.float64)
    masks = learn(model, ROLLOUTS, MaskConfig(steps=0, init=init), logits_of)
    assert masks.losses.shape == (1, 3) and masks.unmasked.shape == (3,)
    assert torch.equal(masks.H, init * masks.region.double())
    assert torch.equal(masks.attribution, torch.zeros_like(masks.H))
    for n, (prompt, reasoning, delimiter, answer) in enumerate(ROLLOUTS):
        sequence = torch.tensor([prompt + reasoning + delimiter + answer])
        mask = torch.zeros(sequence.shape[1], sequence.shape[1], dtype=torch.float64)
        mask[len(prompt) :, len(prompt) : len(prompt) + len(reasoning)] = 10 * init
        for loss, applied in ((masks.losses[0, n], mask), (masks.unmasked[n], None)):
            logits = model(sequence, mask=applied)[0, -len(answer) - 1 : -1]
            expected = F.cross_entropy(logits, torch.tensor(answer))
            torch.testing.assert_close(loss, expected, atol=1e-9, rtol=0)
    if init:
        assert (masks.unmasked - masks.losses).abs().min() > 1e-4


# The optimisation


@both_ways
@pytest.mark.parametrize("sparsity", [0.0, 0.01])
def test_optimisation_equals_a_plain_loop(sparsity, logits_of):
    model = tiny.llama(dtype=torch.float64)
    # A rate at which entries cross zero, where the clamp takes their gradient away.
    config = MaskConfig(steps=12, lr=0.08, sparsity=sparsity)
    masks = learn(model, ROLLOUTS, config, logits_of)
    assert (masks.H > 0).any() and (masks.H < -0.8).any()
    for n, rollout in enumerate(ROLLOUTS):
        states, gradients, losses = plain_loop(model, *rollout, config)
        R, T = region_of(n)
        torch.testing.assert_close(masks.H[n, :R, :T], states[-1], atol=1e-9, rtol=0)
        torch.testing.assert_close(masks.losses[:, n], losses, atol=1e-9, rtol=0)
        earned = torch.zeros(R, T, dtype=torch.float64)
        for k in range(config.steps):
            mean = (gradients[k] + gradients[k + 1]) / 2
            earned -= mean * (states[k + 1] - states[k])
        torch.testing.assert_close(masks.attribution[n, :R, :T], earned, atol=1e-9, rtol=0)


def test_the_whole_model_is_the_default():
    model, config = tiny.llama(), MaskConfig(steps=3)
    masks = optimize_masks(model, lay_out(ROLLOUTS, "cpu"), config)
    expected = learn(model, ROLLOUTS, config, plain_logits)
    assert torch.equal(masks.H, expected.H) and torch.equal(masks.losses, expected.losses)


@both_ways
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_padded_batch_equals_each_rollout_alone(dtype, tolerance, logits_of):
    model, config = tiny.llama(dtype=dtype), MaskConfig(steps=20)
    together = learn(model, ROLLOUTS, config, logits_of)
    for n, rollout in enumerate(ROLLOUTS):
        alone = learn(model, [rollout], config, logits_of)
        R, T = region_of(n)
        assert alone.H.shape == (1, R, T)
        for field in ("H", "attribution", "region"):
            batched = getattr(together, field)[n]
            expected = torch.zeros_like(batched)
            expected[:R, :T] = getattr(alone, field)[0]
            torch.testing.assert_close(batched, expected, atol=tolerance, rtol=0)
        losses = together.losses[:, n]
        torch.testing.assert_close(losses, alone.losses[:, 0], atol=tolerance, rtol=0)


@both_ways
def test_order_in_the_batch_does_not_matter(logits_of):
    model, config = tiny.llama(dtype=torch.float64), MaskConfig(steps=5)
    forward = learn(model, ROLLOUTS, config, logits_of)
    backward = learn(model, ROLLOUTS[::-1], config, logits_of)
    torch.testing.assert_close(forward.H, backward.H.flip(0), atol=1e-9, rtol=0)


def test_progress_counts_the_batch_at_every_step():
    counts = []
    batch = lay_out(ROLLOUTS, "cpu")
    optimize_masks(tiny.llama(), batch, MaskConfig(steps=4), progress=counts.append)
    assert counts == [3] * 4


@both_ways
@pytest.mark.parametrize(
    "weights, expected",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_shapes_formats_and_region(weights, expected, logits_of):
    masks = learn(tiny.llama(dtype=weights), ROLLOUTS, MaskConfig(steps=2), logits_of)
    assert [region_of(n) for n in range(3)] == [(6, 5), (7, 3), (9, 7)]  # T + D + A - 1, T
    R, T = 9, 7
    assert masks.H.shape == masks.region.shape == masks.attribution.shape == (3, R, T)
    assert masks.H.dtype == masks.attribution.dtype == masks.losses.dtype == expected
    assert masks.region.dtype == torch.bool and masks.losses.shape == (3, 3)
    for n in range(3):
        rows, columns = region_of(n)
        for w in range(R):
            for v in range(T):
                inside = w < rows and v < columns and w >= v
                assert masks.region[n, w, v] == inside
                assert (masks.H[n, w, v] != 0) == inside
    assert (masks.attribution[~masks.region] == 0).all()
    assert not masks.H.requires_grad and not masks.losses.requires_grad


@both_ways
def test_idle_entries_end_at_weight_decay_alone(logits_of):
    # In one layer the reasoning rows, and all delimiter rows but the last, feed no answer row.
    model, config = tiny.llama(num_hidden_layers=1), MaskConfig()
    masks = learn(model, ROLLOUTS, config, logits_of)
    expected = (1 - config.lr * config.weight_decay) ** 200
    assert expected == pytest.approx(0.990, abs=1e-4)
    for n in range(3):
        R, T = region_of(n)
        idle = T + len(DELIMITERS[n]) - 1
        restored = masks.H[n, :R, :T] / config.init
        entries = restored[:idle][masks.region[n, :idle, :T]]
        assert entries.tolist() == pytest.approx([expected] * len(entries), rel=1e-5)
        assert ((restored[idle:] - expected).abs() > 0.05).all()


def test_attribution_sums_to_the_loss_recovered():
    model = tiny.llama(seed=3, dtype=torch.float64, gain=1.5)
    errors = {}
    for name, config in {
        "paper": MaskConfig(),
        "coarse": MaskConfig(steps=25, lr=8e-3),
        "coarser": MaskConfig(steps=10, lr=2e-2),
    }.items():
        masks = learn(model, ROLLOUTS, config)
        recovered = masks.losses[0] - masks.losses[-1]
        assert (recovered > 0.3).all()
        errors[name] = (masks.attribution.sum((1, 2)) / recovered - 1).abs()
    assert errors["paper"].max() < 0.02
    assert errors["paper"].max() < errors["coarse"].max() < errors["coarser"].max()


def test_one_sided_attribution_errs_more():
    model, config = tiny.llama(seed=3, dtype=torch.float64, gain=1.5), MaskConfig(steps=50, lr=4e-3)
    states, gradients, losses = plain_loop(model, *ROLLOUTS[2], config)
    moves = list(zip(states, states[1:], strict=False))
    one_sided = -sum((g * (b - a)).sum() for g, (a, b) in zip(gradients, moves, strict=False))
    recovered = losses[0] - losses[-1]
    ours = learn(model, ROLLOUTS[2:], config).attribution.sum()
    assert (ours - recovered).abs() * 3 < (one_sided - recovered).abs()


@both_ways
def test_a_mask_stops_at_the_unmasked_loss(logits_of):
    """After 7 steps, never, and before the first step: each as the plain loop was by then."""
    model = tiny.llama(seed=20, dtype=torch.float64, gain=1.5)
    config = MaskConfig(steps=12, lr=0.02)
    whole = learn(model, ROLLOUTS, config, logits_of)
    ended = learn(model, ROLLOUTS, replace(config, stop_at_unmasked=True), logits_of)
    assert torch.equal(ended.unmasked, whole.unmasked)
    for n, stop in enumerate((7, 12, 0)):
        states, _, losses = plain_loop(model, *ROLLOUTS[n], config)
        below = (losses <= whole.unmasked[n]).tolist()
        assert below.index(True) == stop if n != 1 else not any(below)
        expected = torch.cat((losses[:stop], losses[stop].repeat(13 - stop)))
        torch.testing.assert_close(ended.losses[:, n], expected, atol=1e-9, rtol=0)
        R, T = region_of(n)
        torch.testing.assert_close(ended.H[n, :R, :T], states[stop], atol=1e-9, rtol=0)
        below_by = [max(0.0, (whole.unmasked[n] - loss).item()) for loss in losses[[-1, stop]]]
        shown = [masks.overshoot[n].item() for masks in (whole, ended)]
        assert shown == pytest.approx(below_by, abs=1e-9)
    assert whole.overshoot[0] > 2 * ended.overshoot[0] > 0 == whole.overshoot[1]
    recovered = ended.losses[0] - ended.losses[-1]
    assert recovered[0] > 0.1 and recovered[2] == 0
    torch.testing.assert_close(ended.attribution.sum((1, 2)), recovered, rtol=0.03, atol=0)


def test_sparsity_stops_what_is_not_worth_it():
    model, cost = tiny.llama(dtype=torch.float64), 2e-3
    batch = lay_out(ROLLOUTS, "cpu")
    H = (-0.4 * batch.region.double()).requires_grad_()
    loss = atman.answer_loss(plain_logits(model, batch)(10 * H), batch).sum()
    (gradient,) = torch.autograd.grad(loss, H)
    config = MaskConfig(steps=5, sparsity=cost)  # few: the gradient stays near where it began
    moved = learn(model, ROLLOUTS, config).H - H.detach()
    cheap = batch.region & (gradient.abs() < cost / 2)
    worth = batch.region & (gradient < -2 * cost)
    assert cheap.sum() > 10 and worth.sum() > 5
    assert (moved[cheap] < 0).all() and (moved[worth] > 0).all()
    free = learn(model, ROLLOUTS, replace(config, sparsity=0.0)).H - H.detach()
    assert (free[cheap & (gradient < -cost / 100)] > 0).all()


@both_ways
def test_model_comes_back_as_it_was(monkeypatch, logits_of):
    model, before = tiny.llama(), tiny.llama()
    frozen = {"norm.weight", "layers.1.mlp.up_proj.weight"}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)

    def check():
        assert {n for n, w in model.named_parameters() if not w.requires_grad} == frozen
        assert all(weight.grad is None for weight in model.parameters())
        assert tiny.same_weights(model, before)

    with torch.no_grad():  # a caller who samples need not open it
        learn(model, ROLLOUTS, MaskConfig(steps=2), logits_of)
    check()

    def fail(logits, batch):
        assert not any(weight.requires_grad for weight in model.parameters())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(atman, "answer_loss", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        learn(model, ROLLOUTS, MaskConfig(steps=2), logits_of)
    check()


@pytest.mark.parametrize("part", range(4))
def test_an_empty_part_is_named(part):
    name = ("prompt", "reasoning", "delimiter", "answer")[part]
    rollouts = [list(rollout) for rollout in ROLLOUTS]
    rollouts[1][part] = []
    with pytest.raises(ValueError, match=f"rollout 1: its {name} is empty"):
        lay_out(rollouts, "cpu")


def test_no_rollouts_and_a_missing_part_are_refused():
    for rollouts in ([], [ROLLOUTS[0], ROLLOUTS[1][:3]]):
        with pytest.raises(ValueError):
            lay_out(rollouts, "cpu")


def test_fewer_steps_go_as_far_as_the_papers():
    config = MaskConfig.in_steps(50, sparsity=0.5)
    assert config == MaskConfig(steps=50, lr=4e-3, sparsity=0.5)
    assert MaskConfig.in_steps(200, path_memory=True) == MaskConfig()
    first, second = MaskConfig.in_steps(50, path_memory=True).betas
    assert (first, second) == pytest.approx((0.6**4, 0.9999**4))


# Saliency

INIT = MaskConfig(init=-0.4)
MASKS = Masks(  # two rollouts: T = 3, R = 4 and T = 2, R = 2, the rest padding
    H=torch.tensor(
        [
            [[-0.4, 0, 0], [-0.2, -0.3, 0], [0.0, -0.1, -0.6], [0.2, -0.4, -0.1]],
            [[-0.4, 0, 0], [-0.1, 0.3, 0], [0, 0, 0], [0, 0, 0]],
        ]
    ),
    region=torch.tensor(
        [
            [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]],
            [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]],
        ]
    ).bool(),
    attribution=torch.tensor(
        [
            [[0.5, 0, 0], [0.25, 0.005, 0], [1.0, 0.005, -0.2], [0.0, 0.005, 0.1]],
            [[-0.5, 0, 0], [-0.25, -0.125, 0], [0, 0, 0], [0, 0, 0]],
        ]
    ),
    losses=torch.zeros(2, 2),
    unmasked=torch.zeros(2),
)
# min(H, 0) / c, entry by entry, then the mean of a column's entries.
LITERAL = [
    [(1 + 0.5 + 0 + 0) / 4, (0.75 + 0.25 + 1) / 3, (1.5 + 0.25) / 2],
    [(1 + 0.25) / 2, 0.0],
]
EARNED = [[1.75, 0.015, -0.1], [-0.75, -0.125]]


@pytest.mark.parametrize("sign", ["restored", "literal"])
def test_mask_saliency_by_hand(sign):
    expected = [[1 - x if sign == "restored" else x for x in row] for row in LITERAL]
    tokens = token_saliency(MASKS, INIT, sign=sign)
    assert [row.tolist() for row in tokens] == [pytest.approx(row, abs=1e-6) for row in expected]
    means = [sum(row) / len(row) for row in expected]
    rewards = rollout_saliency(MASKS, INIT, sign=sign)
    assert rewards.tolist() == pytest.approx(means, abs=1e-6)
    halved = token_saliency(MASKS, MaskConfig(init=-0.8), sign="literal")
    assert halved[0].tolist() == pytest.approx([x / 2 for x in LITERAL[0]], abs=1e-6)


def test_restored_is_the_default():
    assert torch.equal(token_saliency(MASKS, INIT)[0], token_saliency(MASKS, INIT, "mask")[0])
    default = rollout_saliency(MASKS, INIT)
    assert torch.equal(default, rollout_saliency(MASKS, INIT, "mask", "restored"))


@pytest.mark.parametrize("sign", ["restored", "literal"])
def test_attribution_saliency_by_hand(sign):
    tokens = token_saliency(MASKS, INIT, "attribution", sign)
    assert [row.tolist() for row in tokens] == [pytest.approx(row, abs=1e-6) for row in EARNED]
    # The first rollout's parts of all positive attribution; the second has none.
    parts = [1.75 / 1.765, 0.015 / 1.765, 0.0]
    assert 3 * parts[1] < 1 and parts[1] < 0.05 < parts[0]
    expected = {
        "even": [(1 + 3 * parts[1] + 0) / 3, 0.0],
        "share": [(1 + parts[1] / 0.05 + 0) / 3, 0.0],
        "mean": [(1.75 + 0.015 - 0.1) / 3, -0.875 / 2],
        "sum": [1.75 + 0.015 - 0.1, -0.875],
    }
    for reduction, by_hand in expected.items():
        rewards = rollout_saliency(MASKS, INIT, "attribution", sign, reduction)
        assert rewards.tolist() == pytest.approx(by_hand, abs=1e-6), reduction
    default = rollout_saliency(MASKS, INIT, "attribution")
    assert default.tolist() == pytest.approx(expected["even"], abs=1e-6)


def test_even_is_one_when_all_tokens_earn_alike():
    attribution = MASKS.region / MASKS.region.sum(1, keepdim=True).clamp(min=1)
    alike = replace(MASKS, attribution=attribution)
    rewards = rollout_saliency(alike, INIT, "attribution", reduction="even")
    assert rewards.tolist() == pytest.approx([1, 1], abs=1e-6)
    # and it is 1 less the distance of the parts from uniform
    attribution = torch.zeros_like(MASKS.attribution)
    attribution[0, 3] = torch.tensor([5.0, 3.0, 2.0])
    distance = sum(abs(part - 1 / 3) for part in (0.5, 0.3, 0.2)) / 2
    uneven = replace(MASKS, attribution=attribution)
    rewards = rollout_saliency(uneven, INIT, "attribution", reduction="even")
    assert rewards[0].item() == pytest.approx(1 - distance, abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "gradient"}, "'gradient': choose mask or attribution"),
        ({"sign": "inverse"}, "'inverse': choose restored or literal"),
        ({"kind": "attribution", "reduction": "median"}, "'median': choose even, mean, share"),
    ],
)
def test_unknown_saliency_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rollout_saliency(MASKS, INIT, **arguments)
    if "reduction" not in arguments:
        with pytest.raises(ValueError, match=message):
            token_saliency(MASKS, INIT, **arguments)
