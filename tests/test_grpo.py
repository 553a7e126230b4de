"""Eq. 4 and 5 by hand: log-probabilities, advantages, the clipped loss and one policy update."""

import math

import pytest
import torch

from grpo import (
    GRPOConfig,
    group_advantages,
    policy_loss,
    score_tokens,
    token_logprobs,
    update_policy,
)
from lab.run.sampling import generate
from model import Llama
from tests import tiny
from tests.bench import saved_bytes
from tests.tiny import next_logits

PROMPTS = tiny.ids(1, 3, 6, 1, 4)


def table_of(seed, size=6):
    """Logits after each token, for tiny.bigram."""
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).mul(2).tolist()


def log_softmax(row):
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


# Log-probabilities


def test_constant_logits_by_hand():
    model = tiny.bigram([[0.5, -1.0, 2.0, 0.0]] * 4)
    logp = log_softmax([0.5, -1.0, 2.0, 0.0])
    logprobs, mask = token_logprobs(model, [[0, 1], [3]], [[2, 2, 1], [0]])
    assert logprobs[0].tolist() == pytest.approx([logp[2], logp[2], logp[1]], abs=1e-6)
    assert logprobs[1].tolist() == pytest.approx([logp[0], 0, 0], abs=1e-6)
    assert mask.tolist() == [[True] * 3, [True, False, False]]


def test_each_token_is_scored_by_the_one_before_it():
    table = table_of(1)
    logp = [log_softmax(row) for row in table]
    prompts, completions = [[4, 2], [1], [0, 3, 5]], [[3, 0, 5], [1, 1, 4, 2], [2]]
    logprobs, mask = token_logprobs(tiny.bigram(table), prompts, completions)
    assert logprobs.dtype == torch.float32 and mask.dtype == torch.bool
    for n in range(3):
        chain = prompts[n][-1:] + completions[n]
        expected = [logp[a][b] for a, b in zip(chain, chain[1:], strict=False)]
        padding = 4 - len(expected)
        assert logprobs[n].tolist() == pytest.approx(expected + [0] * padding, abs=1e-5)
        assert mask[n].tolist() == [True] * len(expected) + [False] * padding


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_logprobs_equal_a_full_forward_of_each_row_alone(temperature):
    model = tiny.llama()
    completions = tiny.ids(2, 5, 2, 9, 1)
    logprobs, mask = token_logprobs(model, PROMPTS, completions, temperature)
    assert logprobs.shape == mask.shape == (4, 9)
    assert logprobs.requires_grad
    for n in range(4):
        for k, token in enumerate(completions[n]):
            logits = next_logits(model, PROMPTS[n] + completions[n][:k]) / temperature
            expected = logits[token] - logits.exp().sum().log()
            assert logprobs[n, k].item() == pytest.approx(expected.item(), abs=1e-5)
        assert (logprobs[n, len(completions[n]) :] == 0).all()
        assert mask[n].sum() == len(completions[n])


def test_sampled_stop_token_is_scored():
    model = tiny.llama()
    completions = generate(model, PROMPTS, 30, seed=1, eos_ids=list(range(16)))
    assert all(row[-1] < 16 for row in completions)
    logprobs, mask = token_logprobs(model, PROMPTS, completions)
    for n, row in enumerate(completions):
        logits = next_logits(model, PROMPTS[n] + row[:-1])
        expected = logits[row[-1]] - logits.exp().sum().log()
        assert mask[n, len(row) - 1]
        assert logprobs[n, len(row) - 1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_bf16_logits_are_scored_in_float32():
    model = tiny.llama(dtype=torch.bfloat16)
    logprobs, _ = token_logprobs(model, PROMPTS[:1], [[5, 9]])
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0] + [5]]))[0, -2:].double()
    expected = logits.log_softmax(-1)[[0, 1], [5, 9]]
    torch.testing.assert_close(logprobs[0].double(), expected, atol=1e-5, rtol=0)


# Rewards and advantages


def test_advantages_by_hand():
    rewards = torch.tensor([0.0, -1.0, -1.0, 2.0, 5.0, 5.0, 5.0, 1.0])
    assert group_advantages(rewards, 4).tolist() == [0, -1, -1, 2, 1, 1, 1, -3]
    assert group_advantages(rewards, 2).tolist() == [0.5, -0.5, -1.5, 1.5, 0, 0, 2, -2]
    assert group_advantages(rewards, 1).tolist() == [0] * 8


@pytest.mark.parametrize("size", [3, 7, 8])
@pytest.mark.parametrize("reward", [0.1, -0.7, 1 / 3])
def test_equal_rewards_give_exactly_zero(size, reward):
    rewards = torch.tensor([reward] * size + [0.0] * (size - 1) + [1.0])
    advantages = group_advantages(rewards, size)
    assert (advantages[:size] == 0).all()
    expected = [-1 / size] * (size - 1) + [1 - 1 / size]
    assert advantages[size:].tolist() == pytest.approx(expected, abs=1e-6)


def test_rewards_must_be_whole_groups():
    for count, size in [(7, 2), (3, 4), (0, 4)]:
        with pytest.raises(ValueError, match=f"{count} rewards are not whole groups of {size}"):
            group_advantages(torch.zeros(count), size)


# The loss

OLD = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.5, 0.0], [-2.0, 0.0, 0.0]])
NEW = torch.tensor([[-0.9, -2.1, -0.6], [-0.2, -1.4, 0.0], [-2.1, 0.0, 0.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()


def test_sequence_loss_by_hand():
    loss, stats = policy_loss(NEW, OLD, torch.tensor([1.0, -2.0, 0.5]), MASK, clip_eps=0.15)
    ratios = [math.exp(0.1 - 0.1 - 0.1), math.exp(0.1 + 0.1), math.exp(-0.1)]
    # The second ratio, 1.22, is above 1.15, but its advantage is negative: not clipped.
    expected = -(ratios[0] * 1 + ratios[1] * -2 + ratios[2] * 0.5) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert stats["clipped"] == 0 and stats["rollouts"] == 3
    assert stats["ratio_max"] == pytest.approx(ratios[1], abs=1e-6)
    assert stats["ratio_min"] == pytest.approx(ratios[0], abs=1e-6)
    loss, stats = policy_loss(NEW, OLD, torch.tensor([1.0, 2.0, -0.5]), MASK, clip_eps=0.08)
    expected = -(ratios[0] * 1 + 1.08 * 2 + 0.92 * -0.5) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert stats["clipped"] == 2


def test_token_loss_by_hand():
    up, down = math.exp(0.1), math.exp(-0.1)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, stats = policy_loss(NEW, OLD, advantages, MASK, clip_eps=0.2, ratio="token")
    expected = -((up + 2 * down) / 3 * 1 + up * -2 + down * 0.5) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert stats["clipped"] == 0 and stats["rollouts"] == 3
    loss, stats = policy_loss(NEW, OLD, advantages, MASK, clip_eps=0.05, ratio="token")
    expected = -((1.05 + 2 * down) / 3 * 1 + up * -2 + down * 0.5) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert stats["clipped"] == pytest.approx(1 / 3)  # one token of the first rollout's three
    assert stats["ratio_max"] == pytest.approx(up) and stats["ratio_min"] == pytest.approx(down)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize(
    "advantage, moved, clipped",
    [(2.0, 0.5, True), (2.0, -0.5, False), (-2.0, 0.5, False), (-2.0, -0.5, True)],
)
def test_four_quadrants_of_the_clip(ratio, advantage, moved, clipped):
    old = torch.tensor([[-1.0, -2.0]])
    logprobs = (old + torch.tensor([[moved, 0.0]])).requires_grad_()
    mask = torch.ones(1, 2).bool()
    loss, stats = policy_loss(logprobs, old, torch.tensor([advantage]), mask, 0.2, ratio)
    loss.backward()
    value = math.exp(moved)
    if clipped:
        value = 1.2 if moved > 0 else 0.8
    share = 1.0 if ratio == "sequence" else 0.5  # the token form has a second token, at ratio 1
    expected = -advantage * (value if ratio == "sequence" else (value + 1) / 2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    slope = 0.0 if clipped else -advantage * value * share
    assert logprobs.grad[0, 0].item() == pytest.approx(slope, abs=1e-6)
    if ratio == "token":
        assert logprobs.grad[0, 1].item() == pytest.approx(-advantage / 2, abs=1e-6)
    assert stats["clipped"] == pytest.approx(share if clipped else 0)


def test_at_ratio_one_the_sequence_gradient_is_length_times_the_token_gradient():
    model = tiny.llama()
    for completion in tiny.ids(3, 1, 4, 9):
        gradients = {}
        for ratio in ("sequence", "token"):
            model.zero_grad()
            logprobs, mask = token_logprobs(model, PROMPTS[:1], [completion])
            advantages = torch.tensor([0.7])
            policy_loss(logprobs, logprobs.detach(), advantages, mask, ratio=ratio)[0].backward()
            gradients[ratio] = model.embed_tokens.weight.grad.clone()
        expected = len(completion) * gradients["token"]
        torch.testing.assert_close(gradients["sequence"], expected, atol=1e-5, rtol=1e-4)
        assert expected.abs().max() > 0.01
        # and the sequence form at ratio 1 is REINFORCE: advantage times the sum of log-probs
        model.zero_grad()
        (-0.7 * token_logprobs(model, PROMPTS[:1], [completion])[0].sum()).backward()
        gradient = model.embed_tokens.weight.grad
        torch.testing.assert_close(gradient, gradients["sequence"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_normalizer_and_padding_rows(ratio):
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, stats = policy_loss(NEW, OLD, advantages, MASK, ratio=ratio)
    clipped_rows = stats.pop("clipped_rows").tolist()
    halved, _ = policy_loss(NEW, OLD, advantages, MASK, ratio=ratio, normalizer=6)
    assert halved.item() == pytest.approx(loss.item() / 2, abs=1e-6)
    # A row without tokens changes nothing, whatever stands in it.
    pad = torch.full((1, 3), 5.0)
    rows = [torch.cat([x, pad * s]) for x, s in ((NEW, 1), (OLD, -1))]
    rows[0].requires_grad_()
    mask = torch.cat([MASK, torch.zeros(1, 3).bool()])
    for filler in (0.0, 9.0):
        more = torch.cat([advantages, torch.tensor([filler])])
        padded, padded_stats = policy_loss(*rows, more, mask, ratio=ratio, normalizer=3)
        assert padded.item() == pytest.approx(loss.item(), abs=1e-6)
        assert padded_stats.pop("clipped_rows").tolist() == pytest.approx([*clipped_rows, 0])
        torch.testing.assert_close(padded_stats, stats, atol=1e-6, rtol=0)
        (gradient,) = torch.autograd.grad(padded, rows[0])
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()


def test_unknown_ratio_is_refused():
    with pytest.raises(ValueError, match="'product': choose sequence or token"):
        policy_loss(NEW, OLD, torch.ones(3), MASK, ratio="product")


# The update

COMPLETIONS = tiny.ids(5, 4, 9, 2, 6, 1, 7, 3, 5)
EIGHT = tiny.ids(6, 3, 3, 6, 6, 1, 1, 4, 4)
ADVANTAGES = torch.tensor([1.0, -0.5, 0.3, -0.8, 0.6, 0.2, -1.2, 0.4])


def updated(
    model, rows=slice(None), lr=0.002, advantages=ADVANTAGES,
    world_size=1, autocast=None, progress=None, **settings,
):  # fmt: skip
    """The model after one update by plain gradient descent, and what the update returned.

    settings: of GRPOConfig.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batch, config = (EIGHT[rows], COMPLETIONS[rows], advantages[rows]), GRPOConfig(**settings)
    ranks = {"world_size": world_size, "autocast": autocast, "progress": progress}
    return model, update_policy(model, optimizer, *batch, config, **ranks)


def assert_same(left, right, tolerance=1e-6):
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def apart(left, right):
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@torch.no_grad()
def score(model, prompt, completion):
    return token_logprobs(model, [prompt], [completion])[0].sum().item()


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_micro_batches_do_not_change_the_update(ratio):
    expected, at_once = updated(tiny.llama(), micro_batch=8, passes=2, ratio=ratio)
    assert apart(expected, tiny.llama()) > 1e-3
    clipped_rows, broken = at_once.pop("clipped_rows"), at_once.pop("broken_rows")
    for size in (1, 2, 3):  # 3: the last one is smaller
        model, result = updated(tiny.llama(), micro_batch=size, passes=2, ratio=ratio)
        assert_same(model, expected)
        assert result.pop("clipped_rows") == pytest.approx(clipped_rows, abs=1e-6)
        assert result.pop("broken_rows") == broken == []
        assert result == pytest.approx(at_once, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_one_pass_is_one_gradient_step_on_the_mean_over_rollouts(ratio):
    model, result = updated(tiny.llama(), passes=1, ratio=ratio)
    by_hand = tiny.llama()
    terms = []
    for prompt, completion, advantage in zip(EIGHT, COMPLETIONS, ADVANTAGES, strict=True):
        logprob = token_logprobs(by_hand, [prompt], [completion])[0].sum()
        share = 1 if ratio == "sequence" else len(completion)
        terms.append(-advantage * logprob / share / 8)
    sum(terms).backward()
    with torch.no_grad():
        gradients = [weight.grad for weight in by_hand.parameters()]
        for weight in by_hand.parameters():
            weight -= 0.002 * weight.grad
    assert_same(model, by_hand)
    norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients))
    assert result["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert result["loss"] == pytest.approx(-ADVANTAGES.mean().item(), abs=1e-6)


def test_two_ranks_of_four_equal_one_of_eight():
    # DDP averages over ranks: so do we here, between two updates of one step each.
    alone, _ = updated(tiny.llama(), passes=1, micro_batch=4)
    ranks = [
        updated(tiny.llama(), rows, passes=1, micro_batch=4, world_size=2)[0]
        for rows in (slice(0, 4), slice(4, 8))
    ]
    with torch.no_grad():
        for a, b in zip(*(rank.parameters() for rank in ranks), strict=True):
            a.add_(b).div_(2)
    assert_same(ranks[0], alone)


def test_rows_that_fill_up_a_rank_change_nothing():
    expected, result = updated(tiny.llama())
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    filled = update_policy(
        model,
        optimizer,
        EIGHT + [[1]] * 3,
        COMPLETIONS + [[]] * 3,  # with micro-batches of 2, one of them is nothing but filling
        torch.cat([ADVANTAGES, torch.zeros(3)]),
        GRPOConfig(),
        total=8,
    )
    assert_same(model, expected)
    assert filled.pop("clipped_rows") == result.pop("clipped_rows") + [0.0] * 3
    assert filled.pop("broken_rows") == result.pop("broken_rows") == []
    assert filled == pytest.approx(result, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_rows_without_an_advantage_add_nothing_to_the_gradient(micro_batch, ratio):
    advantages = torch.tensor([0.0, -0.5, 0.0, -0.8, 0.6, 0.0, 0.0, 0.4])
    rows = [n for n, advantage in enumerate(advantages.tolist()) if advantage]
    config = GRPOConfig(passes=1, micro_batch=micro_batch, ratio=ratio)
    weights = []
    for chosen in (range(8), rows):
        model = tiny.llama(dtype=torch.float64)
        prompts, completions = [EIGHT[n] for n in chosen], [COMPLETIONS[n] for n in chosen]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # it takes the gradient whole
        update_policy(
            model, optimizer, prompts, completions, advantages[list(chosen)], config, total=8
        )
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-12, rtol=0)
    start = torch.cat([weight.flatten() for weight in tiny.llama(dtype=torch.float64).parameters()])
    assert (weights[0] - start).abs().max() > 1e-2


def test_first_pass_ratio_is_exactly_one():
    _, result = updated(tiny.llama(), passes=1, micro_batch=3)
    assert result["ratio_max"] == result["ratio_min"] == 1.0
    assert result["clipped_rows"] == [0.0] * 8


def test_second_pass_moves_on_and_clips():
    start, (first, first_result) = tiny.llama(), updated(tiny.llama(), passes=1)
    second, result = updated(tiny.llama(), passes=2)
    assert apart(first, second) > 1e-3
    ratios, clipped = [], []
    by_hand = updated(tiny.llama(), passes=1)[0]
    by_hand.zero_grad()
    for prompt, completion, advantage in zip(EIGHT, COMPLETIONS, ADVANTAGES, strict=True):
        ratios.append(math.exp(score(first, prompt, completion) - score(start, prompt, completion)))
        clipped.append(float(ratios[-1] > 1.2 if advantage > 0 else ratios[-1] < 0.8))
        if clipped[-1]:
            continue
        # What is not clipped takes a step along the gradient of ratio times advantage.
        logprob = token_logprobs(by_hand, [prompt], [completion])[0].sum()
        (-advantage * ratios[-1] * logprob / 8).backward()
    assert 2 <= sum(clipped) <= 6
    assert result["clipped_rows"] == clipped  # of the rows in the order they came in
    assert result["gradient_norm"] == first_result["gradient_norm"]  # of the first pass
    assert result["loss"] == first_result["loss"]
    assert result["ratio_max"] == pytest.approx(max(ratios), rel=1e-4)
    assert result["ratio_min"] == pytest.approx(min(ratios), rel=1e-4)
    with torch.no_grad():
        for weight in by_hand.parameters():
            weight -= 0.002 * weight.grad
    assert_same(second, by_hand)


def test_zero_advantage_leaves_the_weights_exactly():
    model, result = updated(tiny.llama(), advantages=torch.zeros(8))
    assert tiny.same_weights(model, tiny.llama())
    assert result["loss"] == 0 and result["gradient_norm"] == 0


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_advantage_moves_its_completion_the_right_way(ratio, advantage):
    for n in range(8):
        advantages = torch.zeros(8)
        advantages[n] = advantage
        model, _ = updated(tiny.llama(), lr=0.01, advantages=advantages, passes=1, ratio=ratio)
        before, after = (score(m, EIGHT[n], COMPLETIONS[n]) for m in (tiny.llama(), model))
        assert (after - before) * advantage > 1e-3


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_stop_token_is_trained(advantage):
    # The two differ only in their last token: were it not trained, their gradients would cancel.
    eos, word, prompt = 7, 9, [3, 1]
    model = tiny.llama()
    before = next_logits(model, prompt + [4, 8])
    update_policy(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        [prompt, prompt],
        [[4, 8, eos], [4, 8, word]],
        torch.tensor([advantage, -advantage]),
        GRPOConfig(passes=1),
    )
    moved = next_logits(model, prompt + [4, 8]) - before
    assert advantage * moved[eos] > 0.01 and advantage * moved[word] < -0.01


def test_temperature_divides_in_the_update_too():
    table = table_of(3)
    model = tiny.bigram(table)
    prompts, completions = [[2]], [[5]]
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=1.0)
    config = GRPOConfig(passes=1, temperature=2.0)
    update_policy(model, optimizer, prompts, completions, torch.tensor([1.0]), config)
    # d log p(5 | 2) / d logit = (one-hot - softmax(logits / 2)) / 2
    probabilities = [math.exp(x) for x in log_softmax([x / 2 for x in table[2]])]
    expected = [((n == 5) - p) / 2 for n, p in enumerate(probabilities)]
    moved = model.lm_head.weight[:, 2].tolist()
    steps = [after - before for after, before in zip(moved, table[2], strict=True)]
    assert steps == pytest.approx(expected, abs=1e-5)


def test_gradient_norm_and_stale_gradients():
    model = tiny.llama()
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1e3)  # left over: must not count
    model, result = updated(model, lr=1.0, passes=1)
    steps = [a - b for a, b in zip(model.parameters(), tiny.llama().parameters(), strict=True)]
    size = math.sqrt(sum(step.double().pow(2).sum().item() for step in steps))
    assert size == pytest.approx(result["gradient_norm"], rel=1e-3)  # SGD at rate 1 takes it whole
    _, plain = updated(tiny.llama(), passes=1)
    assert result["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-5)


def test_neighbours_in_length_share_a_micro_batch(monkeypatch):
    """Rows of 2 to 12 tokens: in order of length, two at a time, the padding is least."""
    sizes, forward = [], Llama.forward
    monkeypatch.setattr(
        Llama,
        "forward",
        lambda self, tokens, **rest: sizes.append(tokens.shape) or forward(self, tokens, **rest),
    )
    updated(tiny.llama(), passes=1, micro_batch=2)
    lengths = sorted(len(p) + len(c) for p, c in zip(EIGHT, COMPLETIONS, strict=True))
    assert [size[1] for size in sizes] == lengths[1::2] and lengths[0] < lengths[-1]


def test_progress_counts_every_rollout_in_every_pass():
    counts = []
    updated(tiny.llama(), passes=2, micro_batch=3, progress=counts.append)
    assert counts == [3, 3, 2] * 2


# Less memory, half precision, numbers that are not finite


SAVING = {  # the longest completion has 9 tokens
    "chunks of 1": {"logit_chunk": 1},
    "chunks of 2": {"logit_chunk": 2},
    "one chunk of 9": {"logit_chunk": 9},
    "a chunk of 50": {"logit_chunk": 50},
    "recomputed": {"recompute": True},
    "both": {"logit_chunk": 2, "recompute": True},
}


@pytest.mark.parametrize("saving", SAVING.values(), ids=SAVING)
@pytest.mark.parametrize("tied", [True, False])
def test_what_saves_memory_changes_no_number(saving, tied):
    def scored(**arguments):
        model = tiny.llama(dtype=torch.float64, tie_word_embeddings=tied)
        logprobs, entropies, mask = score_tokens(model, EIGHT, COMPLETIONS, 0.7, **arguments)
        (logprobs.double() * ADVANTAGES[:, None]).sum().backward()
        return logprobs.detach(), entropies, mask, [weight.grad for weight in model.parameters()]

    logprobs, entropies, mask, gradients = scored()
    saved = scored(**saving)
    assert mask.sum() == sum(map(len, COMPLETIONS)) and torch.equal(saved[2], mask)
    # They leave as float32, computed in float64: equal to the last bit, give or take one.
    torch.testing.assert_close(saved[0], logprobs, atol=0, rtol=1.2e-7)
    torch.testing.assert_close(saved[1], entropies, atol=0, rtol=1.2e-7)
    for gradient, expected in zip(saved[3], gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-12)


def test_chunks_and_recomputing_keep_less():
    model = tiny.llama(vocab_size=2000)

    def kept(**arguments):
        return saved_bytes(lambda: score_tokens(model, EIGHT, COMPLETIONS, **arguments), model)

    logits = 8 * 9 * 2000 * 4
    everything = kept()
    assert kept(logit_chunk=9) == kept(logit_chunk=50) == everything > logits
    assert kept(logit_chunk=2) < everything - 0.95 * logits
    layers = everything - logits
    assert kept(recompute=True) - logits < 0.3 * layers
    assert kept(recompute=True, logit_chunk=2) < 0.3 * layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_an_update_on_a_gpu_equals_the_cpus_and_waits_for_no_micro_batch():
    def update(device):
        model, done = tiny.llama(dtype=torch.float64).to(device), []
        optimizer = torch.optim.AdamW(model.parameters(), fused=device == "cuda")

        def watch(rows):  # from the first micro-batch's end to the last one's
            done.append(rows)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode(0 if len(done) == 4 else "error")

        config = GRPOConfig(passes=1, micro_batch=2)
        batch = EIGHT, COMPLETIONS, ADVANTAGES.to(device)
        result = update_policy(model, optimizer, *batch, config, progress=watch)
        assert len(done) == 4
        return result, torch.cat([weight.detach().flatten().cpu() for weight in model.parameters()])

    try:
        (ours, weights), (expected, expected_weights) = update("cuda"), update("cpu")
    finally:
        torch.cuda.set_sync_debug_mode(0)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=0)


def test_autocast_leaves_master_weights_and_gradients_in_float32():
    gradients = {}
    for autocast in (None, torch.bfloat16):
        model, result = updated(tiny.llama(), lr=1.0, passes=1, autocast=autocast)
        pairs = zip(tiny.llama().parameters(), model.parameters(), strict=True)
        gradients[autocast] = torch.cat([(a - b).flatten() for a, b in pairs])  # SGD at rate 1
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert result["steps"] == 1 and result["ratio_max"] == result["ratio_min"] == 1.0
    wide, half = gradients.values()
    error = (wide - half).norm() / wide.norm()
    assert 1e-4 < error < 0.03  # bfloat16 has 8 bits; equal would mean that it was not used


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_a_broken_rollout_is_named_and_takes_no_step(micro_batch):
    completions = [[token % 63 for token in row] for row in COMPLETIONS]
    completions[5][2] = 63  # which no other rollout has
    model = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.embed_tokens.weight[63] = torch.nan
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batch, config = (EIGHT, completions, ADVANTAGES), GRPOConfig(micro_batch=micro_batch)
    result = update_policy(model, optimizer, *batch, config)
    assert result["broken_rows"] == [5] and result["steps"] == 0
    assert not math.isfinite(result["gradient_norm"]) and not optimizer.state
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.view(torch.int32), new.view(torch.int32))  # nan equals nan so
        assert new.grad is None
    completions[5][2] = 0
    result = update_policy(model, optimizer, *batch, config)
    assert result["broken_rows"] == [] and result["steps"] == 2  # the row is not read


def test_a_gradient_that_breaks_in_the_second_pass_takes_no_second_step():
    model, seen = tiny.llama(), []

    def break_second(gradient):
        seen.append(gradient)
        return gradient * math.inf if len(seen) > 1 else gradient

    model.norm.weight.register_hook(break_second)
    model, result = updated(model, passes=3, micro_batch=8)
    once, _ = updated(tiny.llama(), passes=1, micro_batch=8)
    assert result["steps"] == 1 and len(seen) == 2 and math.isfinite(result["gradient_norm"])
    assert apart(model, once) == 0 and result["broken_rows"] == []


# Blind rows

BLIND = [2, 3]  # of the completions of 5 and 4 tokens: where each delimiter begins


def hiding(rows, blind):
    """The mask of rows = [(prompt length, completion length)], cell by cell."""
    longest = max(P + C for P, C in rows)
    mask = torch.zeros(len(rows), 1, longest, longest)
    for n, ((P, C), first) in enumerate(zip(rows, blind, strict=True)):
        for row in range(P + first, P + C):
            for column in range(1, P):
                mask[n, 0, row, column] = -1e4
    return mask


@pytest.mark.parametrize("layers", [1, 2])
def test_blind_rows_equal_an_explicit_mask(layers):
    model = tiny.llama(num_hidden_layers=layers)
    prompts, completions = tiny.ids(1, 4, 7), tiny.ids(2, 5, 4)
    logprobs, mask = token_logprobs(model, prompts, completions, blind=BLIND)
    tokens = torch.zeros(2, 11, dtype=torch.int64)
    for n, row in enumerate((prompts[0] + completions[0], prompts[1] + completions[1])):
        tokens[n, : len(row)] = torch.tensor(row)
    masked = model(tokens, mask=hiding([(4, 5), (7, 4)], BLIND)).log_softmax(-1)
    plain = model(tokens).log_softmax(-1)
    for n, (P, completion) in enumerate(zip((4, 7), completions, strict=True)):
        for place, token in enumerate(completion):
            row = P + place - 1
            assert logprobs[n, place].item() == pytest.approx(
                masked[n, row, token].item(), abs=1e-5
            )
            moved = abs(masked[n, row, token] - plain[n, row, token]) > 1e-3
            assert moved == (place > BLIND[n])  # predicted by a blind row
    assert torch.equal(mask, token_logprobs(model, prompts, completions)[1])


def test_blind_rows_of_one_layer_know_the_prompts_first_token_alone():
    model = tiny.llama(num_hidden_layers=1)
    (completion,) = tiny.ids(2, 5)
    prompt = [9, 10, 11, 12]
    told = [
        token_logprobs(model, [changed], [completion], blind=[2])[0][0]
        for changed in (prompt, [9, 20, 21, 22], [19, 10, 11, 12])
    ]
    assert (told[0] - told[1])[3:].abs().max() < 1e-6 < 1e-3 < (told[0] - told[1])[:3].abs().min()
    assert (told[0] - told[2])[3:].abs().min() > 1e-4
    everywhere = token_logprobs(model, [prompt], [completion], blind=[5])[0]  # no row is blind
    plain = token_logprobs(model, [prompt], [completion])[0]
    torch.testing.assert_close(everywhere, plain, atol=1e-5, rtol=0)


def test_an_update_is_blind_in_every_pass_whatever_the_micro_batches():
    prompts, completions = tiny.ids(1, 4, 7), tiny.ids(2, 5, 4)
    advantages, weights = torch.tensor([1.0, -1.0]), []
    for micro_batch, blind in ((1, BLIND), (2, BLIND), (2, None)):
        model = tiny.llama(dtype=torch.float64)
        config = GRPOConfig(passes=2, micro_batch=micro_batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        update_policy(model, optimizer, prompts, completions, advantages, config, blind=blind)
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)
    assert (weights[0] - weights[2]).abs().max() > 1e-4
