"""The saliency `cir`, for comparison: how far the reasoning moves the gold answer, cut by cut.

    cir(batch, logits)    # (B,), of atman.lay_out's Batch and plain_logits or Suffix.logits

After arXiv 2604.22074 (causal importance of reasoning): truncate the reasoning at 10 places and ask
each time how likely the gold answer is. One forward pass a cut and one without, so 11.
"""

import math

import torch

from atman import HIDDEN, Batch, answer_probability

CUTS = 10


@torch.no_grad()
def cir(batch: Batch, logits) -> torch.Tensor:
    """Mean over the cuts of JS(P(gold) at the cut, P(gold) without one) / ln 2: (B,) in 0 to 1.

    P(gold) stands for the Bernoulli distribution of "the gold answer or another". A cut at the
    fraction f = 0, 0.1 ... 0.9 hides the columns from round(T f) on from all later rows, by -1e4
    on H, so that positions stay as they are.
    """
    column = torch.arange(batch.region.shape[2], device=batch.region.device)

    def probability(kept):  # (B,) how many of the reasoning's tokens stay visible
        hidden = batch.region & (column >= kept[:, None, None])
        return answer_probability(logits(HIDDEN * hidden), batch).double()

    whole, lengths = probability(batch.lengths), batch.lengths.double()
    cuts = [probability((lengths * n / CUTS).round()) for n in range(CUTS)]
    return torch.stack([divergence(p, whole) for p in cuts]).mean(0) / math.log(2)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the Bernoulli distributions of p and q, in nats."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)
