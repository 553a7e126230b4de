"""The mask: learn, for one reasoning trace, which attention had to be switched back on.

Every reasoning token starts suppressed: an additive mask H, init c = -0.4 times scale 10, lies on
the attention from each later token to it (Eq. 1). AdamW then moves H, and nothing else, to make the
gold answer likely again (Eq. 2). What moved, and what that earned, is the saliency (Eq. 3).

    result = optimize_masks(model, prompts, reasonings, delimiters, answers, MaskConfig())
    rollout_saliency(result, config)                    # one number per rollout: the reward
    token_saliency(result, config, kind="attribution")  # one number per reasoning token

Where it departs from the paper, or the paper leaves a choice open:
1. Eq. 1 is s x s; rows here are reasoning, delimiter and answer, since prompt rows never see it.
2. Eq. 3 as printed falls when a token is re-enabled, the text says that it should rise: `restored`
   (default) is 1 - H/c, `literal` is H/c.
3. `attribution` (ours) credits each entry with the loss its own movement recovered: AdamW moves all
   entries at much the same pace, so the mask alone tells little about which of them mattered.

Shapes: B rollouts; P prompt, T reasoning, D delimiter, A answer tokens; rows R = T + D + A - 1 are
query positions (the last answer token predicts nothing), columns T are key positions; S = P + R.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import Llama, at_least_float32, right_pad


@dataclass(frozen=True)
class MaskConfig:
    """Section 3.4's values."""

    init: float = -0.4  # c: where every entry of H starts
    scale: float = 10.0  # H is multiplied by this before it enters the scores
    steps: int = 200
    lr: float = 1e-3
    betas: tuple[float, float] = (0.6, 0.9999)
    weight_decay: float = 0.05
    sparsity: float = 0.0  # lambda: what re-enabling costs; 0 is the paper


@dataclass(frozen=True)
class MaskResult:
    """What the optimisation found, row 0 and column 0 being the first reasoning token.

    mask (B, R, T): H itself, unclamped and unscaled, 0 outside the region. region (B, R, T) bool:
    the entries in use, w >= v. attribution (B, R, T): loss each entry recovered, in nats. losses
    (steps + 1, B): cross-entropy of the gold answer before each step and after the last, in nats.
    """

    mask: torch.Tensor
    region: torch.Tensor
    attribution: torch.Tensor
    losses: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """B ragged rollouts laid out for the model, right-padded."""

    tokens: torch.Tensor  # (B, S) prompt, reasoning, delimiter, all but the last answer token
    region: torch.Tensor  # (B, R, T) bool
    row_index: torch.Tensor  # (B, S) which row of H a query position reads
    column_index: torch.Tensor  # (B, S) which column of H a key position reads
    inside: torch.Tensor  # (B, S, S) bool: the region, laid out over the whole sequence
    answer_rows: torch.Tensor  # (B, A) positions whose logits predict the answer
    answers: torch.Tensor  # (B, A)
    answer_weights: torch.Tensor  # (B, A) 1 / number of answer tokens, 0 at padding


def optimize_masks(
    model: Llama, prompts, reasonings, delimiters, answers, config, progress=None
) -> MaskResult:
    """Learn H for each of B rollouts (section 3.2): Eq. 2 minimised by AdamW, the model frozen.

    prompts, reasonings, delimiters, answers: B ragged lists of token ids, none empty, answers
    without EOS. Rollouts do not influence each other: their losses are summed, not averaged, so
    that AdamW's eps weighs the same whatever B. H is kept in float32 (float64 for a float64 model).
    The model's requires_grad flags come back as they were. progress is called with B after every
    step. Raises ValueError for an empty list.
    """
    device = model.embed_tokens.weight.device
    batch = pack(prompts, reasonings, delimiters, answers, device)
    dtype = torch.promote_types(model.embed_tokens.weight.dtype, torch.float32)
    mask = (config.init * batch.region.to(dtype)).requires_grad_()  # H = c
    optimizer = torch.optim.AdamW(
        [mask], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    attribution = torch.zeros_like(mask)

    def loss_and_gradient():
        loss = answer_loss(model, batch, config.scale * mask.clamp(max=0))  # (B,), Eq. 2
        return loss.detach(), torch.autograd.grad(loss.sum(), mask)[0]

    with frozen(model), torch.enable_grad():
        loss, gradient = loss_and_gradient()
        losses = [loss]
        for _ in range(config.steps):
            before, gradient_before = mask.detach().clone(), gradient
            # The sparsity term lambda * sum(H - c) has gradient lambda on every used entry.
            mask.grad = gradient + config.sparsity * batch.region
            optimizer.step()
            loss, gradient = loss_and_gradient()
            losses.append(loss)
            # Trapezoid along the path: over entries and steps it sums to the loss recovered.
            attribution -= (gradient_before + gradient) / 2 * (mask.detach() - before)
            if progress:
                progress(len(mask))
    return MaskResult(mask.detach(), batch.region, attribution, torch.stack(losses))


def answer_loss(model: Llama, batch: Batch, additive: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each rollout's gold answer, teacher forced (Eq. 2), in nats (B,).

    additive (B, R, T): what is added to the attention scores of rows R towards columns T.
    """
    rows = additive.shape[0], batch.tokens.shape[1], additive.shape[2]
    full = additive.gather(1, batch.row_index[:, :, None].expand(rows))  # (B, S, T)
    full = full.gather(2, batch.column_index[:, None, :].expand(batch.inside.shape))  # (B, S, S)
    full = full.masked_fill(~batch.inside, 0.0)
    logits = model(batch.tokens, mask=full[:, None], head_rows=batch.answer_rows)  # (B, A, V)
    logits = at_least_float32(logits).transpose(1, 2)  # (B, V, A)
    nll = F.cross_entropy(logits, batch.answers, reduction="none")  # (B, A)
    return (nll * batch.answer_weights.to(nll.dtype)).sum(1)


def pack(prompts, reasonings, delimiters, answers, device) -> Batch:
    """Lay B ragged rollouts out as one right-padded batch. Raises ValueError for an empty part."""
    parts = {"prompt": prompts, "reasoning": reasonings}
    parts |= {"delimiter": delimiters, "answer": answers}
    for name, rows in parts.items():
        if len(rows) != len(prompts) or not rows:
            raise ValueError(f"need as many {name}s as prompts, and at least one")
        for number, row in enumerate(rows):
            if len(row) == 0:
                raise ValueError(f"rollout {number}: its {name} is empty")

    def lengths(rows):  # (B,)
        return torch.tensor([len(row) for row in rows], device=device)

    P, T, D, A = (lengths(rows) for rows in parts.values())
    R = T + D + A - 1
    sequences = [
        [*prompt, *reasoning, *delimiter, *answer[:-1]]
        for prompt, reasoning, delimiter, answer in zip(*parts.values(), strict=True)
    ]
    tokens, _ = right_pad(sequences, device)  # (B, S)
    position = torch.arange(tokens.shape[1], device=device)  # (S,)
    row, column = (torch.arange(int(n.max()), device=device) for n in (R, T))
    region = (row[:, None] >= column) & (row < R[:, None])[:, :, None]
    region = region & (column < T[:, None])[:, None, :]  # (B, R, T)
    offset = position - P[:, None]  # (B, S): position counted from the first reasoning token
    row_index = offset.clamp(0, len(row) - 1)
    column_index = offset.clamp(0, len(column) - 1)
    is_row = (offset >= 0) & (offset < R[:, None])
    is_column = (offset >= 0) & (offset < T[:, None])
    causal = position[:, None] >= position
    step = torch.arange(int(A.max()), device=device)
    used = step < A[:, None]  # (B, A)
    first = P + T + D - 1  # the last delimiter token predicts the first answer token
    return Batch(
        tokens=tokens,
        region=region,
        row_index=row_index,
        column_index=column_index,
        inside=is_row[:, :, None] & is_column[:, None, :] & causal,
        answer_rows=(first[:, None] + step).where(used, 0),
        answers=right_pad(answers, device)[0],
        answer_weights=used.double() / A[:, None],
    )


@contextmanager
def frozen(model):
    """Weights without gradient, so that the backward pass runs through activations alone."""
    flags = [weight.requires_grad for weight in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for weight, flag in zip(model.parameters(), flags, strict=True):
            weight.requires_grad_(flag)


def token_saliency(result, config, kind="mask", sign="restored") -> list[torch.Tensor]:
    """Saliency of each reasoning token, B tensors of (T,).

    mask: the mean over a token's rows of 1 - min(H, 0)/c (`restored`: 0 suppressed as at the start,
    1 fully re-enabled) or of min(H, 0)/c (`literal`, Eq. 3 as printed). paper silent: Eq. 3 leaves
    v free; a mean per token first, since early tokens have more rows and would weigh more.
    attribution: the sum over a token's rows, nats of loss recovered; sign does not apply.
    """
    if kind == "attribution":
        tokens = result.attribution.sum(1)  # (B, T)
    elif kind == "mask":
        normalised = result.mask.clamp(max=0) / config.init * result.region
        tokens = normalised.sum(1) / result.region.sum(1).clamp(min=1)  # Eq. 3, per token
        if sign not in ("restored", "literal"):
            raise ValueError(f"sign {sign!r}: choose restored or literal")
        tokens = 1 - tokens if sign == "restored" else tokens
    else:
        raise ValueError(f"saliency {kind!r}: choose mask or attribution")
    lengths = result.region.any(1).sum(1).tolist()
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)]


def rollout_saliency(
    result, config, kind="mask", sign="restored", reduction="even"
) -> torch.Tensor:
    """The saliency reward of each rollout (B,).

    mask: the mean over its tokens (Eq. 3). attribution, with p a token's part of all positive
    attribution: `even` = mean of min(1, p T), 1 when all tokens earn alike; `share` = mean of
    min(1, p / 0.05); `mean` = loss recovered per token; `sum` = loss recovered. `mean` and `share`
    pay for shortness by construction, `even` and `sum` do not.
    """
    rewards = []
    for tokens in token_saliency(result, config, kind, sign):
        positive = tokens.clamp(min=0)
        part = positive / positive.sum().clamp(min=torch.finfo(tokens.dtype).tiny)
        if kind == "mask" or reduction == "mean":
            rewards.append(tokens.mean())
        elif reduction == "even":
            rewards.append((part * len(tokens)).clamp(max=1).mean())
        elif reduction == "share":
            rewards.append((part / 0.05).clamp(max=1).mean())
        elif reduction == "sum":
            rewards.append(tokens.sum())
        else:
            raise ValueError(f"reduction {reduction!r}: choose even, mean, share or sum")
    return torch.stack(rewards)
