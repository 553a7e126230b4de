"""The part of Llama that a mask can change, run again and again under different masks.

    prefill = Prefill(model, prompts)                        # once per question
    suffix = Suffix(model, prefill, prompts, tokens, rows)   # once per batch of rollouts
    logits = suffix.logits(additive)                         # at every step, gradients to additive

A mask over reasoning columns touches only rows after the prompt, so most of a forward pass is the
same at every step of its optimisation. What is saved, none of which changes a number (a bfloat16 or
float16 model's attention weights alone are kept as rounded for the backward pass):
1. The prompt's keys and values are computed once per question and shared by its rollouts.
2. Layer 0's queries, keys and values come before any attention: computed once, without gradient.
3. Of the last layer only keys and values are needed of all rows; its queries, attention output and
   MLP, and the output head, run on the rows that predict the answer.
4. The backward pass runs through activations alone (weights frozen), and attention keeps for it one
   tensor of the size of the scores.

Shapes: B rollouts; P prompt columns; R own rows, T of them reasoning; A answer rows; K = P + R.
"""

import torch
import torch.nn.functional as F

from cache import Prefill
from model import Llama, at_least_float32, scaled_product


class Suffix:
    """B rollouts, as far as the answer's prediction needs them.

    tokens (B, R) int64, right-padded: what follows each prompt. answer_rows (B, A): rows whose
    logits are wanted. The prompts' keys and values are copied out of prefill once, as many columns
    as the longest of these prompts has.
    """

    @torch.no_grad()
    def __init__(self, model: Llama, prefill: Prefill, prompts, tokens, answer_rows):
        self.model, self.answer_rows = model, answer_rows
        which, rows = prefill.rows(prompts), tokens.shape[1]
        self.columns = int(prefill.lengths[which].max())  # P
        # Room for the own columns after the prompt's: (B, kv_heads, K, head_dim)
        self.keys, self.values = (
            [F.pad(x[which, :, : self.columns], (0, 0, 0, rows)) for x in kept]
            for kept in (prefill.keys, prefill.values)
        )
        positions = prefill.lengths[which, None] + torch.arange(rows, device=tokens.device)
        self.cos, self.sin = model.angles(positions)

        dtype = torch.promote_types(model.embed_tokens.weight.dtype, torch.float32)
        bias = torch.zeros(rows, self.columns + rows, dtype=dtype, device=tokens.device)
        future = torch.ones_like(bias, dtype=torch.bool).triu(self.columns + 1)
        self.bias = bias.masked_fill(future, -torch.inf).repeat(len(tokens), 1, 1)  # (B, R, K)
        if prefill.hidden is not None:
            self.bias[:, :, : self.columns] += prefill.hidden[which, None, : self.columns]

        self.x = model.embed_tokens(tokens)  # (B, R, hidden)
        attention = model.layers[0].self_attn
        self.first = model.layers[0].input_layernorm(self.x)
        self.first_query = attention.queries(self.first, self.cos, self.sin)
        self.first_keys_values = attention.keys_values(self.first, self.cos, self.sin)

    def logits(self, additive: torch.Tensor) -> torch.Tensor:
        """Logits (B, A, V) with additive (B, R, T) on the scores of own rows, reasoning columns.

        The caller freezes the model's weights, so that gradients reach additive alone, and goes
        backward before the next call: that one writes over the buffers of keys and values (autograd
        refuses an older pass).
        """
        layers, x, cos, sin = self.model.layers, self.x, self.cos, self.sin
        bias = self.bias.clone()
        bias[:, :, self.columns : self.columns + additive.shape[2]] += additive.detach()
        for number, layer in enumerate(layers):
            attention = layer.self_attn
            if number == 0:
                normed, (key, value) = self.first, self.first_keys_values
            else:
                normed = layer.input_layernorm(x)
                key, value = attention.keys_values(normed, cos, sin)
            if number == len(layers) - 1:
                x, normed, bias, additive = map(self.at_answer, (x, normed, bias, additive))
                cos, sin = self.at_answer(cos[:, 0])[:, None], self.at_answer(sin[:, 0])[:, None]
            if number == 0 and len(layers) > 1:
                query = self.first_query
            else:
                query = attention.queries(normed, cos, sin)
            keys, values = self.keys[number], self.values[number]
            out = SuffixAttention.apply(query, key, value, additive, bias, keys, values)
            x = x + attention.output(out)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.head(x)

    def at_answer(self, x: torch.Tensor) -> torch.Tensor:
        """The answer rows (B, A, ...) of x (B, R, ...)."""
        return x.gather(1, self.answer_rows[:, :, None].expand(-1, -1, x.shape[2]))


class SuffixAttention(torch.autograd.Function):
    """Eq. 1 over prompt and own columns, with its backward pass written out.

    query (B, heads, S, head_dim); key, value (B, kv_heads, R, head_dim): the own columns; additive
    (B, S, T): H, here for its gradient only; bias (B, S, K): H, and minus infinity on what is not
    seen; keys, values (B, kv_heads, K, head_dim): buffers that begin with the prompt's columns, and
    whose others are written here. Returns (B, heads, S, head_dim).
    """

    @staticmethod
    def forward(ctx, query, key, value, additive, bias, keys, values):
        own = keys.shape[2] - key.shape[2]  # P, the first own column
        keys[:, :, own:], values[:, :, own:] = key, value
        ctx.shape, ctx.own, ctx.reasoning = query.shape, own, additive.shape[2]
        # Query heads that share a key/value head become rows of one product: (B kv_heads, ., .)
        query = query.reshape(keys.shape[0] * keys.shape[1], -1, keys.shape[3])
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        ctx.scale = keys.shape[2] ** -0.5
        scores = at_least_float32(scaled_product(query, keys.mT, ctx.scale))
        scores.view(*ctx.shape[:3], -1).add_(bias[:, None])  # Eq. 1
        attention = scores.softmax(-1).to(values.dtype)
        ctx.save_for_backward(query, keys, values, attention)
        return (attention @ values).view(ctx.shape)

    @staticmethod
    def backward(ctx, gradient):
        query, keys, values, attention = ctx.saved_tensors
        batch, heads, length, head_dim = ctx.shape
        gradient = gradient.reshape(query.shape)
        wide = at_least_float32(attention)
        d_scores = at_least_float32(gradient @ values.mT)  # so far the attention's: now softmax's
        d_scores.sub_(torch.linalg.vecdot(d_scores, wide)[:, :, None]).mul_(wide)
        by_head = d_scores.view(batch, heads, length, -1)
        d_additive = by_head[..., ctx.own : ctx.own + ctx.reasoning].sum(1)  # shared by all heads
        if not ctx.needs_input_grad[0]:  # layer 0, whose queries, keys and values are constant
            return None, None, None, d_additive, None, None, None
        d_scores = d_scores.to(query.dtype)
        d_query = scaled_product(d_scores, keys, ctx.scale).view(ctx.shape)
        d_key = scaled_product(d_scores[:, :, ctx.own :].mT, query, ctx.scale)
        d_value = attention[:, :, ctx.own :].mT @ gradient
        own = batch, -1, keys.shape[1] - ctx.own, head_dim
        return d_query, d_key.view(own), d_value.view(own), d_additive, None, None, None
