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

from cache import Prefill
from model import Llama, at_least_float32, right_pad
from suffix import Suffix


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

    @classmethod
    def in_steps(cls, steps: int, path_memory: bool = False, **changes) -> "MaskConfig":
        """So many steps, at a rate at which they go as far as the paper's 200 at 1e-3.

        0.6 forgets a gradient within 3 steps: 3 in 200 of the paper's path, a third of a path of
        10. With path_memory AdamW forgets after as much of the path as there: the betas to the
        power 200 / steps. changes: other values of MaskConfig.
        """
        power = cls.steps / steps if path_memory else 1
        betas = tuple(beta**power for beta in cls.betas)
        return cls(**{"steps": steps, "lr": 0.2 / steps, "betas": betas} | changes)


@dataclass(frozen=True)
class MaskResult:
    """What the optimisation found, row 0 and column 0 being the first reasoning token.

    mask (B, R, T): H itself, unclamped and unscaled, 0 outside the region. region (B, R, T) bool:
    the entries in use, w >= v. attribution (B, R, T): loss each entry recovered, in nats. losses
    (steps + 1, B): cross-entropy of the gold answer before each step and after the last, in nats;
    unmasked (B,): the same without a mask.
    """

    mask: torch.Tensor
    region: torch.Tensor
    attribution: torch.Tensor
    losses: torch.Tensor
    unmasked: torch.Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """B ragged rollouts laid out for the model, right-padded; prompts apart."""

    tokens: torch.Tensor  # (B, R) reasoning, delimiter, all but the last answer token
    region: torch.Tensor  # (B, R, T) bool
    answer_rows: torch.Tensor  # (B, A) rows whose logits predict the answer
    answers: torch.Tensor  # (B, A)
    answer_weights: torch.Tensor  # (B, A) 1 / number of answer tokens, 0 at padding


def optimize_masks(
    model: Llama, prompts, reasonings, delimiters, answers, config, progress=None, prefill=None
) -> MaskResult:
    """Learn H for each of B rollouts (section 3.2): Eq. 2 minimised by AdamW, the model frozen.

    prompts, reasonings, delimiters, answers: B ragged lists of token ids, none empty, answers
    without EOS. Rollouts do not influence each other: their losses are summed, not averaged, so
    that AdamW's eps weighs the same whatever B. H is kept in float32 (float64 for a float64 model).
    The model's requires_grad flags come back as they were. progress is called with B after every
    step. prefill: the prompts as read before by these very weights, else they are read here. Raises
    ValueError for an empty list, KeyError for a prompt that is not in prefill.
    """
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    batch = pack(prompts, reasonings, delimiters, answers, device)
    # All that the mask cannot change is computed here, once: suffix.py says what.
    suffix = Suffix(
        model, prefill or Prefill(model, prompts), prompts, batch.tokens, batch.answer_rows
    )
    wide = torch.promote_types(dtype, torch.float32)
    mask = (config.init * batch.region.to(wide)).requires_grad_()  # H = c
    optimizer = torch.optim.AdamW(
        [mask], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    attribution = torch.zeros_like(mask)
    # float16 has no room below 6e-8 and above 65504: the loss is scaled up, so that small gradients
    # do not vanish on the way back, and less so for a rollout whose large ones overflow.
    half = dtype == torch.float16
    scale = torch.full((len(mask),), 2.0**16 if half else 1.0, device=device)

    def loss_and_gradient():
        # Outside the region H is 0 and gets no gradient: it stays there.
        additive = (config.scale * mask.clamp(max=0)).masked_fill(~batch.region, 0.0)
        loss = answer_loss(suffix.logits(additive), batch)  # (B,), Eq. 2
        gradient = torch.autograd.grad((scale * loss).sum(), mask, retain_graph=half)[0]
        while half and (overflow := overflown(gradient, scale)).any():
            scale[overflow] /= 16
            gradient = torch.autograd.grad((scale * loss).sum(), mask, retain_graph=True)[0]
        return loss.detach(), gradient / scale[:, None, None]

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
        with torch.no_grad():
            unmasked = answer_loss(suffix.logits(torch.zeros_like(mask)), batch)
    return MaskResult(mask.detach(), batch.region, attribution, torch.stack(losses), unmasked)


def overflown(gradient, scale) -> torch.Tensor:
    """Which rollouts' scaled gradients are beyond float16 (B,), and can be scaled less."""
    return ~gradient.isfinite().all(2).all(1) & (scale > 1)


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of each rollout's gold answer, teacher forced (Eq. 2), in nats (B,).

    logits (B, A, V) of the rows that predict it.
    """
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

    own = zip(reasonings, delimiters, answers, strict=True)
    tokens, R = right_pad([[*r, *d, *a[:-1]] for r, d, a in own], device)  # (B, R), (B,)
    answers, A = right_pad(answers, device)
    T = torch.tensor([len(reasoning) for reasoning in reasonings], device=device)
    row, column = (torch.arange(int(n.max()), device=device) for n in (R, T))
    region = (row[:, None] >= column) & (row < R[:, None])[:, :, None]
    region = region & (column < T[:, None])[:, None, :]  # (B, R, T)
    step = torch.arange(answers.shape[1], device=device)
    used = step < A[:, None]  # (B, A)
    # R = T + D + A - 1: the answer is predicted by the last A rows, delimiter's last one first.
    answer_rows = ((R - A)[:, None] + step).where(used, 0)
    return Batch(tokens, region, answer_rows, answers, used.double() / A[:, None])


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


def main() -> None:
    """Explain one trace, or several: explain.py's command."""
    import explain

    explain.main()


if __name__ == "__main__":
    main()
