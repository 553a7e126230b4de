"""Keys and values that are kept: the prompts' once per question, and each rollout's own.

    prefill = Prefill(model, prompts)                       # reads each distinct prompt once
    cache = RolloutCache(prefill, prompts, room=1024)       # the rollouts that start from there
    logits = model(token, cache=cache, positions=positions)  # one more token of each rollout

A group's rollouts share their prompt's keys and values: they are in memory once, and each decoding
step reads them once for the whole group. model.py calls `attend` and knows no more of a cache.

Shapes: U distinct prompts of up to P tokens, B rollouts, G rollouts of the largest group.
"""

import torch
import torch.nn.functional as F

from model import Llama, at_least_float32, right_pad


class Prefill:
    """Distinct prompts as the model read them: sampling and masks both start from this.

    keys, values: a tensor per layer, (U, kv_heads, P, head_dim), right-padded. hidden (U, P): minus
    infinity on padding, else 0; None without padding. lengths (U,). logits (U, V): of the first
    token after each prompt.
    """

    @torch.no_grad()
    def __init__(self, model: Llama, prompts):
        """prompts: ragged lists of ids, equal ones read once. ValueError for an empty one."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        if not all(distinct):
            raise ValueError("a prompt is empty: it needs at least one token")
        device = model.embed_tokens.weight.device
        self.config = model.config
        self.number = {prompt: n for n, prompt in enumerate(distinct)}
        tokens, self.lengths = right_pad(distinct, device)
        self.keys, self.values = [], []
        self.logits = model(tokens, cache=self, head_rows=self.lengths[:, None] - 1)[:, 0]
        padding = torch.arange(tokens.shape[1], device=device) >= self.lengths[:, None]
        hidden = torch.zeros(padding.shape, device=device).masked_fill(padding, -torch.inf)
        self.hidden = hidden if padding.any() else None

    def attend(self, layer: int, query, key, value) -> torch.Tensor:
        self.keys.append(key.contiguous())
        self.values.append(value.contiguous())
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def rows(self, prompts) -> torch.Tensor:
        """Which of the distinct prompts each one is (B,). KeyError for one that was not read."""
        numbers = [self.number[tuple(prompt)] for prompt in prompts]
        return torch.tensor(numbers, device=self.lengths.device)


class RolloutCache:
    """Own keys and values of B rollouts, a column per sampled token, beside their prompts'.

    keys, values: a tensor per layer, (B, kv_heads, room, head_dim), of which `length` columns are
    written. slot (B,): the rollout's place among U prompts x G rollouts.
    """

    def __init__(self, prefill: Prefill, prompts, room: int):
        self.prefill, self.length = prefill, 0
        which, taken, places = prefill.rows(prompts), [0] * len(prefill.number), []
        for prompt in which.tolist():
            places.append(taken[prompt])
            taken[prompt] += 1
        self.group = max(taken)  # G
        self.slot = which * self.group + torch.tensor(places, device=which.device)
        self.in_order = self.slot.tolist() == list(range(len(taken) * self.group))
        config = prefill.config
        shape = (len(which), config.num_key_value_heads, room, config.head_dim)
        self.keys = [key.new_zeros(shape) for key in prefill.keys]
        self.values = [value.new_zeros(shape) for value in prefill.values]

    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rollouts alone."""
        self.slot, self.in_order = self.slot[rows], False
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]

    def attend(self, layer: int, query, key, value) -> torch.Tensor:
        """One query of each rollout (B, heads, 1, head_dim) over its prompt and its own columns."""
        end = self.length + 1
        self.keys[layer][:, :, self.length] = key[:, :, 0]
        self.values[layer][:, :, self.length] = value[:, :, 0]
        own_keys, own_values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        prompt_keys, prompt_values = self.prefill.keys[layer], self.prefill.values[layer]
        columns = prompt_keys.shape[2]  # P

        # (B, kv_heads, repeats, head_dim): query heads of one kv head are rows of one product
        grouped = query.view(len(query), key.shape[1], -1, query.shape[3])
        prompt_scores = self.by_prompt(grouped) @ prompt_keys.mT  # (U, kv_heads, G repeats, P)
        if self.prefill.hidden is not None:
            prompt_scores = prompt_scores + self.prefill.hidden[:, None, None]
        own_scores = grouped @ own_keys.mT
        scores = torch.cat((self.by_rollout(prompt_scores), own_scores), -1)
        attention = at_least_float32(scores).mul(query.shape[3] ** -0.5).softmax(-1)
        attention = attention.to(value.dtype)  # (B, kv_heads, repeats, P + length)
        out = self.by_rollout(self.by_prompt(attention[..., :columns]) @ prompt_values)
        out = out + attention[..., columns:] @ own_values
        if layer == len(self.keys) - 1:
            self.length = end
        return out.reshape(query.shape)

    def by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """(B, kv_heads, repeats, N) -> (U, kv_heads, G repeats, N), 0 where no rollout is left."""
        if not self.in_order:
            places = x.new_zeros(len(self.prefill.number) * self.group, *x.shape[1:])
            places[self.slot] = x
            x = places
        return x.unflatten(0, (-1, self.group)).transpose(1, 2).flatten(2, 3)

    def by_rollout(self, x: torch.Tensor) -> torch.Tensor:
        """The way back: (U, kv_heads, G repeats, N) -> (B, kv_heads, repeats, N)."""
        x = x.unflatten(2, (self.group, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.in_order else x[self.slot]
