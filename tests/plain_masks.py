"""The mask optimisation written plainly: the whole sequence at every step, nothing kept.

What atman.py's must equal, number for number, and what the benchmark measures it against. It is
wasteful on purpose: logits of all positions, and gradients of all weights, which are thrown away.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from atman import MaskResult
from model import Llama, at_least_float32, right_pad


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
    model: Llama, prompts, reasonings, delimiters, answers, config, progress=None, logits=None
) -> MaskResult:
    """As atman.optimize_masks.

    logits(tokens, additive, rows) -> (B, A, V), additive (B, 1, S, S): another model's, in place of
    `model`'s own; model then gives its device and number format alone.
    """
    device = model.embed_tokens.weight.device
    batch = pack(prompts, reasonings, delimiters, answers, device)
    dtype = torch.promote_types(model.embed_tokens.weight.dtype, torch.float32)
    mask = (config.init * batch.region.to(dtype)).requires_grad_()  # H = c
    optimizer = torch.optim.AdamW(
        [mask], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    attribution = torch.zeros_like(mask)

    def own_logits(tokens, additive, rows):
        everywhere = model(tokens, mask=additive)  # (B, S, V)
        return everywhere.gather(1, rows[:, :, None].expand(-1, -1, everywhere.shape[2]))

    def loss_and_gradient():
        mask.grad = None
        loss = answer_loss(logits or own_logits, batch, config.scale * mask.clamp(max=0))
        loss.sum().backward()
        model.zero_grad()
        return loss.detach(), mask.grad

    loss, gradient = loss_and_gradient()
    losses = [loss]
    for _ in range(config.steps):
        before, gradient_before = mask.detach().clone(), gradient
        mask.grad = gradient + config.sparsity * batch.region
        optimizer.step()
        loss, gradient = loss_and_gradient()
        losses.append(loss)
        attribution -= (gradient_before + gradient) / 2 * (mask.detach() - before)
        if progress:
            progress(len(mask))
    return MaskResult(mask.detach(), batch.region, attribution, torch.stack(losses))


def answer_loss(logits_of, batch: Batch, additive: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each rollout's gold answer, teacher forced (Eq. 2), in nats (B,).

    additive (B, R, T): what is added to the attention scores of rows R towards columns T.
    """
    rows = additive.shape[0], batch.tokens.shape[1], additive.shape[2]
    full = additive.gather(1, batch.row_index[:, :, None].expand(rows))  # (B, S, T)
    full = full.gather(2, batch.column_index[:, None, :].expand(batch.inside.shape))  # (B, S, S)
    full = full.masked_fill(~batch.inside, 0.0)
    logits = logits_of(batch.tokens, full[:, None], batch.answer_rows)  # (B, A, V)
    logits = at_least_float32(logits).transpose(1, 2)  # (B, V, A)
    nll = F.cross_entropy(logits, batch.answers, reduction="none")  # (B, A)
    return (nll * batch.answer_weights.to(nll.dtype)).sum(1)


def pack(prompts, reasonings, delimiters, answers, device) -> Batch:
    """Lay B ragged rollouts, no part empty, out as one right-padded batch."""
    parts = prompts, reasonings, delimiters, answers

    def lengths(rows):  # (B,)
        return torch.tensor([len(row) for row in rows], device=device)

    P, T, D, A = (lengths(rows) for rows in parts)
    R = T + D + A - 1
    sequences = [
        [*prompt, *reasoning, *delimiter, *answer[:-1]]
        for prompt, reasoning, delimiter, answer in zip(*parts, strict=True)
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
