"""GRPO by hand: sample groups, turn rewards into advantages, take a clipped policy step.

    completions = generate(model, prompts, max_new_tokens=1024, eos_ids=eos_ids, seed=seeds)
    advantages = group_advantages(outcome + weight * saliency, group_size=8)
    update_policy(model, optimizer, prompts, completions, advantages, passes=2)    # Eq. 5

Where it departs from other GRPOs, with the paper:
1. The advantage is reward minus group mean: no division by the standard deviation.
2. The ratio is the product over the whole sequence (`sequence`); `token` is the usual form.
3. No KL term and no reference model.
The loss of an on-policy pass is about 0 by construction (advantages sum to 0): watch rewards.

Shapes: B rollouts, S sequence, C completion tokens, V vocabulary.
"""

import numbers
from contextlib import nullcontext

import numpy as np
import torch

from cache import Prefill, RolloutCache
from model import right_pad


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    eos_ids=(),
    seed=0,
    progress=None,
    prefill=None,
) -> list[list[int]]:
    """Sample one completion for each of B prompts (ragged lists of ids); a sampled EOS is kept.

    seed: an int (row i draws from (seed, i)), or one int or tuple of ints per row. Each row has its
    own stream, one uniform per position, so what a row samples does not depend on what it is
    batched with. temperature 0 is greedy. prefill: the prompts as read before, else they are read
    here, equal ones once. progress is called with the number of rows that ended. There is no top-k
    or top-p: the policy that is scored later is the one that sampled.
    """
    device = model.embed_tokens.weight.device
    one = isinstance(seed, numbers.Integral)
    seeds = [(int(seed), row) for row in range(len(prompts))] if one else seed
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one int or one each")
    if not prompts:
        return []
    draws = np.stack([np.random.default_rng(s).random(max_new_tokens) for s in seeds])
    uniforms = torch.tensor(draws, dtype=torch.float32, device=device)  # (B, max_new_tokens)
    eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)

    prefill = prefill or Prefill(model, prompts)
    which = prefill.rows(prompts)
    lengths, logits = prefill.lengths[which], prefill.logits[which]  # (B,), (B, V)
    cache = RolloutCache(prefill, prompts, max_new_tokens)

    sampled = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    alive = torch.arange(len(prompts), device=device)  # rows still in the batch, by number
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # of those, past their EOS
    reported = 0
    for step in range(max_new_tokens):
        token = choose(logits, uniforms[alive, step], temperature)
        sampled[alive, step] = token
        ended = ended | torch.isin(token, eos)
        if step % 8 == 7:  # now and then, since asking makes a GPU wait
            running = (~ended).nonzero()[:, 0]
            if progress:  # 0 keeps a bar's clock going
                progress(len(prompts) - len(running) - reported)
                reported = len(prompts) - len(running)
            if len(running) == 0:
                break
            if 2 * len(running) <= len(alive):
                alive, token, ended = alive[running], token[running], ended[running]
                lengths = lengths[running]
                cache.select(running)
        if step + 1 < max_new_tokens:
            logits = model(token[:, None], cache=cache, positions=lengths[:, None] + step)[:, 0]
    if progress:
        progress(len(prompts) - reported)
    stops = set(eos_ids)
    return [until_eos(row, stops) for row in sampled.tolist()]


def choose(logits, uniform, temperature) -> torch.Tensor:
    """Next token (B,) from logits (B, V): inverse distribution function at uniform (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    # right=True: the first token whose cumulative exceeds u, never one of probability zero. When u
    # rounds to 1, the last token with a probability.
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return torch.minimum(token, (cumulative < cumulative[:, -1:]).sum(-1))


def until_eos(row: list[int], eos_ids: set[int]) -> list[int]:
    end = next((n for n, token in enumerate(row) if token in eos_ids), len(row) - 1)
    return row[: end + 1]


def token_logprobs(model, prompts, completions, temperature=1.0):
    """Log-probability of each sampled token: logprobs (B, C) float32, 0 at padding; mask (B, C).

    Recomputed by the training forward on the sampled ids, EOS included. temperature divides the
    logits as it did when sampling. model may be wrapped in DDP.
    """
    logprobs, _, mask = score_tokens(model, prompts, completions, temperature)
    return logprobs, mask


def score_tokens(model, prompts, completions, temperature=1.0, logit_chunk=0, recompute=False):
    """token_logprobs, with the entropies (B, C) of the distributions, in nats, 0 at padding.

    logit_chunk and recompute save memory in the backward pass (Llama.forward).
    """
    device = next(model.parameters()).device
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    tokens, _ = right_pad(rows, device)
    targets, lengths = right_pad(completions, device)
    step = torch.arange(targets.shape[1], device=device)
    mask = step < lengths[:, None]  # (B, C)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    # The token at position p is predicted by the logits at p - 1.
    head_rows = (prompt_lengths[:, None] - 1 + step).where(mask, 0)
    logprobs, entropies = model(
        tokens,
        head_rows=head_rows,
        targets=targets,
        temperature=temperature,
        logit_chunk=logit_chunk,
        recompute=recompute,
    )  # (B, C)
    return logprobs * mask, entropies * mask, mask


def outcome_reward(correct: bool) -> float:
    """Eq. 4: 0 for the right answer, -1 otherwise (wrong, absent, or cut off)."""
    return 0.0 if correct else -1.0


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Reward minus the mean of its group (B,); rows question-major, group_size rows a question.

    A group of equal rewards gets exactly zero: no rounding is turned into a gradient. Raises
    ValueError when the rows are not whole groups.
    """
    if rewards.numel() == 0 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards are not whole groups of {group_size}")
    groups = rewards.view(-1, group_size)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    advantages = groups - groups.mean(1, keepdim=True)  # Eq. 5's A
    return advantages.masked_fill(equal, 0.0).view(-1)


def policy_loss(
    logprobs, old_logprobs, advantages, mask, clip_eps=0.2, ratio="sequence", normalizer=None
):
    """The clipped objective, Eq. 5. Returns loss (a scalar) and stats.

    logprobs, old_logprobs (B, C), advantages (B,), mask (B, C) bool. ratio `sequence`: one ratio a
    rollout, the product over its tokens, as printed; its gradient at ratio 1 is the sum over
    tokens. `token`: one ratio a token, averaged over each rollout. normalizer: number of rollouts
    over all micro-batches and ranks, default B. stats: `clipped_rows` (B floats, the share of each
    rollout's ratios whose gradient the clip removed), `clipped` (their sum), `rollouts` (how many
    have tokens), `ratio_max`, `ratio_min`.
    """
    difference = (logprobs - old_logprobs) * mask
    counts = mask.sum(1)  # (B,) tokens; 0 marks a row that only fills up a rank
    if ratio == "sequence":
        log_ratio, weights = difference.sum(1, keepdim=True), (counts > 0)[:, None].float()
    elif ratio == "token":
        log_ratio, weights = difference, mask / counts.clamp(min=1)[:, None]
    else:
        raise ValueError(f"ratio {ratio!r}: choose sequence or token")
    # Beyond e^20 either the clip or the next batch decides; exp would overflow into nan gradients.
    # Not clamp: it gives nan a gradient of 0, and a broken rollout must break the gradient.
    ratios = torch.minimum(log_ratio, log_ratio.new_tensor(20.0)).exp()  # (B, 1) or (B, C)
    advantages = advantages[:, None]
    unclipped = ratios * advantages
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    surrogate = (torch.minimum(unclipped, clipped) * weights).sum(1)  # (B,)
    loss = -surrogate.sum() / (normalizer or len(surrogate))  # Eq. 5
    used = ratios.detach()[weights > 0]
    clipped_rows = ((clipped < unclipped) * weights).sum(1)  # (B,)
    stats = {
        "clipped_rows": clipped_rows.tolist(),
        "clipped": clipped_rows.sum().item(),
        "rollouts": (counts > 0).sum().item(),
        "ratio_max": used.max().item() if len(used) else 1.0,
        "ratio_min": used.min().item() if len(used) else 1.0,
    }
    return loss, stats


def update_policy(
    model,
    optimizer,
    prompts,
    completions,
    advantages,
    *,
    passes=2,
    micro_batch=2,
    clip_eps=0.2,
    ratio="sequence",
    temperature=1.0,
    normalizer=None,
    world_size=1,
    autocast=None,
    logit_chunk=0,
    recompute=False,
    progress=None,
) -> dict:
    """`passes` optimiser steps over one batch of rollouts, each accumulated over micro-batches.

    advantages (B,), 0 for rows that only fill up a rank (their completions are empty). model may be
    wrapped in DDP, which averages gradients over world_size ranks: the loss is scaled back, so that
    the sum over all micro-batches and ranks is divided by normalizer (default B * world_size) once.
    The old log-probabilities are those of the first pass itself: until its optimiser step the
    weights are the ones that sampled, and the same forward at the same shape makes the ratio
    exactly 1. autocast: the dtype of the forward's products, None for the weights' own; logit_chunk
    and recompute save memory (Llama.forward).

    A gradient that is not finite takes no step and ends the update; it is the same on all ranks.
    Passes before it keep their steps: going back would take a copy of the weights and moments.
    Returns, of this rank: loss and entropy (first pass; nats, summed over tokens); clipped_rows (B
    floats, the share of each rollout's ratios that the clip held in the last pass); ratio_max,
    ratio_min; gradient_norm (first pass, all ranks); steps (optimiser steps taken, all ranks) and
    broken_rows (those whose log-probabilities are not finite).
    """
    count = len(completions)
    normalizer = normalizer or count * world_size
    # Neighbours in length share a micro-batch: less padding.
    order = sorted(range(count), key=lambda row: len(prompts[row]) + len(completions[row]))
    micro_batches = [order[start : start + micro_batch] for start in range(0, count, micro_batch)]
    device = next(model.parameters()).device.type
    old_logprobs = [None] * len(micro_batches)
    result = {"loss": 0.0, "entropy": 0.0, "ratio_max": 1.0, "ratio_min": 1.0, "steps": 0}
    broken = set()
    for sweep in range(passes):
        optimizer.zero_grad()
        result["clipped_rows"] = [0.0] * count
        for n, rows in enumerate(micro_batches):
            last = n == len(micro_batches) - 1
            # DDP sums over ranks once, in the last micro-batch; no_sync must wrap the forward.
            with nullcontext() if last or world_size == 1 else model.no_sync():
                with torch.autocast(device, autocast, enabled=autocast is not None):
                    logprobs, entropies, mask = score_tokens(
                        model,
                        [prompts[row] for row in rows],
                        [completions[row] for row in rows],
                        temperature,
                        logit_chunk,
                        recompute,
                    )
                if sweep == 0:
                    old_logprobs[n] = logprobs.detach()
                    result["entropy"] += entropies.sum().item()
                loss, stats = policy_loss(
                    logprobs,
                    old_logprobs[n],
                    advantages[rows],
                    mask,
                    clip_eps,
                    ratio,
                    normalizer,
                )
                (loss * world_size).backward()
            result["ratio_max"] = max(result["ratio_max"], stats["ratio_max"])
            result["ratio_min"] = min(result["ratio_min"], stats["ratio_min"])
            if sweep == 0:
                result["loss"] += loss.item()
            finite = logprobs.isfinite().all(1).tolist()
            for row, clipped, well in zip(rows, stats["clipped_rows"], finite, strict=True):
                result["clipped_rows"][row] = clipped
                broken |= set() if well else {row}
            if progress:
                progress(len(rows))
        norm = torch.nn.utils.get_total_norm(
            [weight.grad for weight in model.parameters() if weight.grad is not None]
        )
        if sweep == 0:
            result["gradient_norm"] = norm.item()
        if not norm.isfinite():
            break
        optimizer.step()
        result["steps"] += 1
    optimizer.zero_grad()  # gradients would take memory from the next sampling
    return result | {"broken_rows": sorted(broken)}
