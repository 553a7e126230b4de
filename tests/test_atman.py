from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import atman
from atman import MaskConfig, MaskResult, optimize_masks, rollout_saliency, token_saliency
from lab.run.sampling import Prefill
from lab.run.suffix import Suffix
from tests import plain_masks, tiny

# Three ragged rollouts; no part has the same lengths order as another.
PARTS = (
    tiny.ids(1, 2, 4, 3),  # prompts
    tiny.ids(2, 5, 3, 7),  # reasonings
    tiny.ids(3, 1, 2, 1),  # delimiters
    tiny.ids(4, 1, 3, 2),  # answers
)


def alone(n):
    return tuple([part[n]] for part in PARTS)


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


def answer_loss(model, batch, additive, prompts=PARTS[0]):
    """Each rollout's loss (B,) with additive (B, R, T) on the scores."""
    suffix = Suffix(model, Prefill(model, prompts), prompts, batch.tokens, batch.answer_rows)
    return atman.answer_loss(suffix.logits(additive), batch)


def region_of(n):
    """R, T of rollout n."""
    T = len(PARTS[1][n])
    return T + len(PARTS[2][n]) + len(PARTS[3][n]) - 1, T


# The loss and its gradient


def test_gradient_equals_finite_differences():
    model = tiny.llama(dtype=torch.float64)
    batch = atman.pack(*PARTS, "cpu")
    generator = torch.Generator().manual_seed(5)
    H = torch.rand(batch.region.shape, generator=generator, dtype=torch.float64) * 0.7 - 0.5
    H = (H * batch.region).requires_grad_()

    def loss(H):
        return answer_loss(model, batch, (10.0 * H.clamp(max=0)) * batch.region).sum()

    (gradient,) = torch.autograd.grad(loss(H), H)
    H = H.detach()
    assert (H > 0).sum() > 10 and (H < 0).sum() > 10
    assert (gradient[H > 0] == 0).all() and (gradient[~batch.region] == 0).all()
    assert gradient.abs().max() > 1e-2
    for entry in batch.region.nonzero().tolist():
        step = torch.zeros_like(H)
        step[tuple(entry)] = 1e-5
        difference = (loss(H + step) - loss(H - step)).item() / 2e-5
        assert gradient[tuple(entry)].item() == pytest.approx(difference, rel=1e-6, abs=1e-8)


@torch.no_grad()
def test_fully_masked_reasoning_is_hidden_from_the_answer():
    model = tiny.llama()
    other = (PARTS[0], tiny.ids(6, 5, 3, 7), *PARTS[2:])
    one, two = atman.pack(*PARTS, "cpu"), atman.pack(*other, "cpu")
    hidden = -1e4 * one.region
    expected = answer_loss(model, one, hidden)
    torch.testing.assert_close(answer_loss(model, two, hidden), expected, atol=1e-6, rtol=0)
    # The delimiter, left open, would carry the reasoning to the answer: so would the answer itself.
    for n in range(3):
        R, T = region_of(n)
        D = len(PARTS[2][n])
        for rows in (slice(T, T + D), slice(T + D - 1, R)):
            leaky = hidden.clone()
            leaky[n, rows] = 0
            changed = answer_loss(model, two, leaky) - answer_loss(model, one, leaky)
            assert (changed.abs() > 1e-3).tolist() == [n == row for row in range(3)]


@torch.no_grad()
def test_fully_masked_reasoning_leaves_the_answer_logits():
    model = tiny.llama()
    (prompt, reasoning, delimiter, answer), (other,) = (part[1] for part in PARTS), tiny.ids(6, 3)
    P, T = len(prompt), len(reasoning)

    def answer_logits(reasoning, rows):
        sequence = torch.tensor([prompt + reasoning + delimiter + answer])
        mask = torch.zeros(sequence.shape[1], sequence.shape[1])
        mask[rows, P : P + T] = -1e4
        return model(sequence, mask=mask)[0, P + T + len(delimiter) - 1 :]

    for rows in (slice(P, None), slice(P + T, None)):  # the reasoning's own rows do not matter
        same = answer_logits(reasoning, rows) - answer_logits(other, rows)
        assert same.abs().max() < 1e-6
    open_delimiter = slice(P + T + len(delimiter), None)
    leak = answer_logits(reasoning, open_delimiter) - answer_logits(other, open_delimiter)
    assert (leak.abs().amax(1) > 1e-2).all()


@torch.no_grad()
def test_answer_tokens_are_targets_and_the_last_one_only_that():
    # Summed over every possible last token, the likelihoods of one answer's endings make 1.
    model = tiny.llama(dtype=torch.float64)
    prompt, reasoning, delimiter, (first, second) = (part[2] for part in PARTS)
    many = [[prompt] * 64, [reasoning] * 64, [delimiter] * 64]
    batch = atman.pack(*many, [[first, last] for last in range(64)], "cpu")
    assert (batch.tokens == batch.tokens[0]).all() and batch.tokens[0, -1] == first
    none = torch.zeros_like(batch.region, dtype=torch.float64)
    losses = answer_loss(model, batch, none, [prompt] * 64)
    sequence = prompt + reasoning + delimiter
    logprobs = model(torch.tensor([sequence]))[0, -1].log_softmax(-1)
    endings = (-2 * losses - logprobs[first]).exp()  # the mean loss times 2, less the first token's
    assert endings.sum().item() == pytest.approx(1, abs=1e-9)
    assert endings.max() - endings.min() > 0.01


@pytest.mark.parametrize("init", [-0.4, 0.0])
def test_loss_before_any_step(init):
    model = tiny.llama(dtype=torch.float64)
    result = optimize_masks(model, *PARTS, MaskConfig(steps=0, init=init))
    assert result.losses.shape == (1, 3)
    assert torch.equal(result.mask, init * result.region.double())
    assert torch.equal(result.attribution, torch.zeros_like(result.mask))
    for n in range(3):
        prompt, reasoning, delimiter, answer = (part[n] for part in PARTS)
        sequence = torch.tensor([prompt + reasoning + delimiter + answer])
        mask = torch.zeros(sequence.shape[1], sequence.shape[1], dtype=torch.float64)
        mask[len(prompt) :, len(prompt) : len(prompt) + len(reasoning)] = 10 * init
        logits = model(sequence, mask=mask if init else None)[0, -len(answer) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        torch.testing.assert_close(result.losses[0, n], expected, atol=1e-9, rtol=0)


def test_unmasked_is_the_loss_of_the_plain_model():
    model = tiny.llama(dtype=torch.float64)
    result = optimize_masks(model, *PARTS, MaskConfig(steps=2))
    assert result.unmasked.shape == (3,)
    for n in range(3):
        sequence = torch.tensor([[token for part in PARTS for token in part[n]]])
        answer = torch.tensor(PARTS[3][n])
        expected = F.cross_entropy(model(sequence)[0, -len(answer) - 1 : -1], answer)
        torch.testing.assert_close(result.unmasked[n], expected, atol=1e-9, rtol=0)
    assert (result.unmasked - result.losses).abs().min() > 1e-4  # no step of the mask is near


# The optimisation


@pytest.mark.parametrize("sparsity", [0.0, 0.01])
def test_optimisation_equals_a_plain_loop(sparsity):
    model = tiny.llama(dtype=torch.float64)
    # A rate at which entries cross zero, where the clamp takes their gradient away.
    config = MaskConfig(steps=12, lr=0.08, sparsity=sparsity)
    result = optimize_masks(model, *PARTS, config)
    assert (result.mask > 0).any() and (result.mask < -0.8).any()
    for n in range(3):
        states, gradients, losses = plain_loop(model, *(part[n] for part in PARTS), config)
        R, T = region_of(n)
        torch.testing.assert_close(result.mask[n, :R, :T], states[-1], atol=1e-9, rtol=0)
        torch.testing.assert_close(result.losses[:, n], losses, atol=1e-9, rtol=0)
        earned = torch.zeros(R, T, dtype=torch.float64)
        for k in range(config.steps):
            mean = (gradients[k] + gradients[k + 1]) / 2
            earned -= mean * (states[k + 1] - states[k])
        torch.testing.assert_close(result.attribution[n, :R, :T], earned, atol=1e-9, rtol=0)


def group_of_eight(reasoning=(9, 30)):
    """Eight ragged rollouts of one question, all with the same gold answer."""
    generator = torch.Generator().manual_seed(8)
    low, high = reasoning
    lengths = torch.randint(low, high, (8,), generator=generator).tolist()
    (prompt, answer), delimiters = tiny.ids(9, 12, 3), tiny.ids(10, *[1, 2] * 4)
    return [prompt] * 8, tiny.ids(11, *lengths), delimiters, [answer] * 8


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_two_hundred_steps_equal_the_plain_loops(dtype, tolerance):
    """The paper's setting, ragged batch: the whole sequence at every step gives the same masks."""
    model = tiny.llama(dtype=dtype, hidden_size=64)
    parts, config = group_of_eight(), MaskConfig()
    ours = optimize_masks(model, *parts, config)
    plain = plain_masks.optimize_masks(model, *parts, config)
    assert torch.equal(ours.region, plain.region)
    for field in ("mask", "attribution", "losses"):
        torch.testing.assert_close(
            getattr(ours, field), getattr(plain, field), atol=tolerance, rtol=0
        )
    assert (plain.mask - config.init * plain.region).abs().max() > 0.05
    for kind in ("mask", "attribution"):
        found, expected = (rollout_saliency(result, config, kind) for result in (ours, plain))
        assert expected.std() > 1e-3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_half_precision_keeps_the_order_within_a_group():
    """The same weights, rounded to bf16, computed with in float32, bf16 and float16."""
    rounded = tiny.llama(hidden_size=64, dtype=torch.bfloat16)
    parts, config = group_of_eight(), MaskConfig()
    rewards = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = tiny.llama(hidden_size=64)
        model.load_state_dict(rounded.state_dict())
        result = optimize_masks(model.to(dtype), *parts, config)
        assert result.mask.dtype == torch.float32
        rewards[dtype] = rollout_saliency(result, config)
    ranks = [reward.argsort().argsort().float() for reward in rewards.values()]
    for other in ranks[1:]:
        assert torch.corrcoef(torch.stack((ranks[0], other)))[0, 1] >= 0.97  # Spearman


@pytest.mark.parametrize("gain", [1e-4, 1.0, 60.0])
def test_float16_gradients_neither_vanish_nor_overflow(gain):
    """Logits scaled by the output head: gradients far below and far above float16's range."""
    results = []
    for dtype in (torch.float32, torch.float16):
        model = tiny.llama(tie_word_embeddings=False, gain=0.5)
        with torch.no_grad():
            model.lm_head.weight *= gain
        # One step: where H moves by its rate whatever the gradient's size, its sign must be right.
        results.append(optimize_masks(model.to(dtype), *PARTS, MaskConfig(steps=1)))
    wide, half = results
    assert half.attribution.isfinite().all() and half.losses.isfinite().all()
    assert (half.mask - wide.mask).abs().max() < 3e-4  # of the rate, 1e-3: no sign is lost
    earned, expected = half.attribution.abs().sum(), wide.attribution.abs().sum()
    assert earned.item() == pytest.approx(expected.item(), rel=0.1)


def test_a_float16_rollout_that_breaks_leaves_the_others_alone():
    model = tiny.llama(tie_word_embeddings=False, dtype=torch.float16)
    with torch.no_grad():
        model.embed_tokens.weight[63] = torch.inf
    parts = [[[token % 63 for token in row] for row in part] for part in PARTS]
    parts[1][1][0] = 63
    config = MaskConfig(steps=5)
    together = optimize_masks(model, *parts, config)
    assert together.losses[:, 1].isnan().all()
    for n in (0, 2):
        single = optimize_masks(model, *([part[n]] for part in parts), config)
        R, T = region_of(n)
        torch.testing.assert_close(together.mask[n, :R, :T], single.mask[0], atol=1e-4, rtol=0)
        assert (single.mask - config.init * single.region).abs().max() > 3e-3


def test_prompts_read_before_give_the_same_masks():
    model, config = tiny.llama(), MaskConfig(steps=3)
    prefill = Prefill(model, [*tiny.ids(12, 6), *PARTS[0][::-1]])  # other prompts among them
    found = optimize_masks(model, *PARTS, config, prefill=prefill)
    expected = optimize_masks(model, *PARTS, config)
    torch.testing.assert_close(found.mask, expected.mask, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.attribution, expected.attribution, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_padded_batch_equals_each_rollout_alone(dtype, tolerance):
    model, config = tiny.llama(dtype=dtype), MaskConfig(steps=40)
    together = optimize_masks(model, *PARTS, config)
    for n in range(3):
        single = optimize_masks(model, *alone(n), config)
        R, T = region_of(n)
        assert single.mask.shape == (1, R, T)
        for field in ("mask", "attribution", "region"):
            batched = getattr(together, field)[n]
            expected = torch.zeros_like(batched)
            expected[:R, :T] = getattr(single, field)[0]
            torch.testing.assert_close(batched, expected, atol=tolerance, rtol=0)
        losses = together.losses[:, n]
        torch.testing.assert_close(losses, single.losses[:, 0], atol=tolerance, rtol=0)


def test_order_in_the_batch_does_not_matter():
    model, config = tiny.llama(dtype=torch.float64), MaskConfig(steps=5)
    forward = optimize_masks(model, *PARTS, config)
    backward = optimize_masks(model, *(part[::-1] for part in PARTS), config)
    torch.testing.assert_close(forward.mask, backward.mask.flip(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "weights, expected",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_shapes_formats_and_region(weights, expected):
    model = tiny.llama(dtype=weights)
    result = optimize_masks(model, *PARTS, MaskConfig(steps=2))
    assert [region_of(n) for n in range(3)] == [(6, 5), (7, 3), (9, 7)]  # T + D + A - 1, T
    R, T = 9, 7
    assert result.mask.shape == result.region.shape == result.attribution.shape == (3, R, T)
    assert result.mask.dtype == result.attribution.dtype == result.losses.dtype == expected
    assert result.region.dtype == torch.bool and result.losses.shape == (3, 3)
    for n in range(3):
        rows, columns = region_of(n)
        for w in range(R):
            for v in range(T):
                inside = w < rows and v < columns and w >= v
                assert result.region[n, w, v] == inside
                assert (result.mask[n, w, v] != 0) == inside
    assert (result.attribution[~result.region] == 0).all()
    assert not result.mask.requires_grad and not result.losses.requires_grad


def test_idle_entries_end_at_weight_decay_alone():
    # In one layer the reasoning rows, and all delimiter rows but the last, feed no answer row.
    model, config = tiny.llama(num_hidden_layers=1), MaskConfig()
    result = optimize_masks(model, *PARTS, config)
    expected = (1 - config.lr * config.weight_decay) ** 200
    assert expected == pytest.approx(0.990, abs=1e-4)
    for n in range(3):
        R, T = region_of(n)
        idle = T + len(PARTS[2][n]) - 1
        restored = result.mask[n, :R, :T] / config.init
        entries = restored[:idle][result.region[n, :idle, :T]]
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
        result = optimize_masks(model, *PARTS, config)
        recovered = result.losses[0] - result.losses[-1]
        assert (recovered > 0.3).all()
        errors[name] = (result.attribution.sum((1, 2)) / recovered - 1).abs()
    assert errors["paper"].max() < 0.02
    assert errors["paper"].max() < errors["coarse"].max() < errors["coarser"].max()


def test_one_sided_attribution_errs_more():
    model = tiny.llama(seed=3, dtype=torch.float64, gain=1.5)
    states, gradients, losses = plain_loop(model, *(part[2] for part in PARTS), MaskConfig())
    moves = list(zip(states, states[1:], strict=False))
    one_sided = -sum((g * (b - a)).sum() for g, (a, b) in zip(gradients, moves, strict=False))
    recovered = losses[0] - losses[-1]
    ours = optimize_masks(model, *alone(2), MaskConfig()).attribution.sum()
    assert (ours - recovered).abs() * 3 < (one_sided - recovered).abs()


def test_sparsity_stops_what_is_not_worth_it():
    model, lam = tiny.llama(dtype=torch.float64), 2e-3
    batch = atman.pack(*PARTS, "cpu")
    H = (-0.4 * batch.region.double()).requires_grad_()
    loss = answer_loss(model, batch, 10 * H).sum()
    (gradient,) = torch.autograd.grad(loss, H)
    config = MaskConfig(steps=5, sparsity=lam)  # few: the gradient stays near where it began
    moved = optimize_masks(model, *PARTS, config).mask - H.detach()
    cheap = batch.region & (gradient.abs() < lam / 2)
    worth = batch.region & (gradient < -2 * lam)
    assert cheap.sum() > 10 and worth.sum() > 5
    assert (moved[cheap] < 0).all() and (moved[worth] > 0).all()
    free = optimize_masks(model, *PARTS, replace(config, sparsity=0.0)).mask - H.detach()
    assert (free[cheap & (gradient < -lam / 100)] > 0).all()


def test_model_comes_back_as_it_was(monkeypatch):
    model = tiny.llama()
    before = tiny.llama()
    frozen = {"norm.weight", "layers.1.mlp.up_proj.weight"}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)

    def check():
        assert {n for n, w in model.named_parameters() if not w.requires_grad} == frozen
        assert all(weight.grad is None for weight in model.parameters())
        assert tiny.same_weights(model, before)

    with torch.no_grad():  # a caller who samples need not open it
        optimize_masks(model, *PARTS, MaskConfig(steps=2))
    check()

    def fail(logits, batch):
        assert not any(weight.requires_grad for weight in model.parameters())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(atman, "answer_loss", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimize_masks(model, *PARTS, MaskConfig(steps=2))
    check()


@pytest.mark.parametrize("part", range(4))
def test_empty_or_uneven_parts_are_named(part):
    name = ("prompt", "reasoning", "delimiter", "answer")[part]
    parts = [list(rows) for rows in PARTS]
    parts[part][1] = []
    with pytest.raises(ValueError, match=f"rollout 1: its {name} is empty"):
        optimize_masks(tiny.llama(), *parts, MaskConfig())
    if part:
        with pytest.raises(ValueError, match=f"{name}s"):
            optimize_masks(tiny.llama(), *PARTS[:part], PARTS[part][:2], *PARTS[part + 1 :], None)
    with pytest.raises(ValueError, match="at least one"):
        optimize_masks(tiny.llama(), [], [], [], [], MaskConfig())


# Saliency

INIT = MaskConfig(init=-0.4)
RESULT = MaskResult(  # two rollouts: T = 3, R = 4 and T = 2, R = 2, the rest padding
    mask=torch.tensor(
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
    tokens = token_saliency(RESULT, INIT, sign=sign)
    assert [row.tolist() for row in tokens] == [pytest.approx(row, abs=1e-6) for row in expected]
    means = [sum(row) / len(row) for row in expected]
    found = rollout_saliency(RESULT, INIT, sign=sign)
    assert found.tolist() == pytest.approx(means, abs=1e-6)
    halved = token_saliency(RESULT, MaskConfig(init=-0.8), sign="literal")
    assert halved[0].tolist() == pytest.approx([x / 2 for x in LITERAL[0]], abs=1e-6)


def test_restored_is_the_default():
    assert torch.equal(token_saliency(RESULT, INIT)[0], token_saliency(RESULT, INIT, "mask")[0])
    default = rollout_saliency(RESULT, INIT)
    assert torch.equal(default, rollout_saliency(RESULT, INIT, "mask", "restored"))


@pytest.mark.parametrize("sign", ["restored", "literal"])
def test_attribution_saliency_by_hand(sign):
    tokens = token_saliency(RESULT, INIT, "attribution", sign)
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
    for reduction, rewards in expected.items():
        found = rollout_saliency(RESULT, INIT, "attribution", sign, reduction)
        assert found.tolist() == pytest.approx(rewards, abs=1e-6), reduction
    default = rollout_saliency(RESULT, INIT, "attribution")
    assert default.tolist() == pytest.approx(expected["even"], abs=1e-6)


def test_even_is_one_when_all_tokens_earn_alike():
    attribution = RESULT.region / RESULT.region.sum(1, keepdim=True).clamp(min=1)
    alike = replace(RESULT, attribution=attribution)
    found = rollout_saliency(alike, INIT, "attribution", reduction="even")
    assert found.tolist() == pytest.approx([1, 1], abs=1e-6)
    # and it is 1 less the distance of the parts from uniform
    tokens = torch.tensor([5.0, 3.0, 2.0])
    attribution = torch.zeros(1, 4, 3)
    attribution[0, 3] = tokens
    one = MaskResult(RESULT.mask[:1], RESULT.region[:1], attribution, RESULT.losses[:, :1])
    distance = sum(abs(part - 1 / 3) for part in (0.5, 0.3, 0.2)) / 2
    found = rollout_saliency(one, INIT, "attribution", reduction="even")
    assert found.item() == pytest.approx(1 - distance, abs=1e-6)


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
        rollout_saliency(RESULT, INIT, **arguments)
    if "reduction" not in arguments:
        with pytest.raises(ValueError, match=message):
            token_saliency(RESULT, INIT, **arguments)
