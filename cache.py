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

from model import Llama, at_least_float32, right_pad, scaled_product


class Prefill:
    """Distinct prompts as the model read them: sampling and masks both start from this.

    keys, values: a tensor per layer, (U, kv_heads, P, head_dim), right-padded. hidden (U, P): minus
    infinity on padding, else 0; None without padding. lengths (U,). logits (U, V): of the first
    token after each prompt. Stale once the model's weights have changed.
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

    A place is kept for each of the largest group's G rollouts at each of the U prompts in use, so
    that a group's queries are rows of one product with its prompt. keys, values: a tensor per
    layer, (U, kv_heads, G, room, head_dim), of which `length` columns are written. slot (B,): each
    rollout's place among U x G. prompt_keys, prompt_values, hidden: the prefill's, of those U.
    """

    def __init__(self, prefill: Prefill, prompts, room: int):
        self.length, which = 0, prefill.rows(prompts)
        self.prompt_keys, self.prompt_values = prefill.keys, prefill.values
        self.hidden = prefill.hidden
        self.arrange(which, len(prefill.number))
        config = prefill.config
        shape = (self.prompts, config.num_key_value_heads, self.group, room, config.head_dim)
        self.keys = [key.new_zeros(shape) for key in prefill.keys]
        self.values = [value.new_zeros(shape) for value in prefill.values]

    def arrange(self, which: torch.Tensor, prompts: int) -> None:
        """Give each rollout, whose prompt is which (B,), a place."""
        taken, slots = [0] * prompts, []
        for prompt in which.tolist():
            slots.append((prompt, taken[prompt]))
            taken[prompt] += 1
        self.prompts, self.group = prompts, max(taken)  # U, G
        slots = [prompt * self.group + place for prompt, place in slots]
        self.in_order = slots == list(range(prompts * self.group))
        self.slot = torch.tensor(slots, device=which.device)

    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rollouts alone, and the prompts that they continue."""
        slot, group = self.slot[rows], self.group
        used, which = torch.unique(slot // group, return_inverse=True)
        if self.hidden is not None:
            self.hidden = self.hidden[used]
        self.prompt_keys = [key[used] for key in self.prompt_keys]
        self.prompt_values = [value[used] for value in self.prompt_values]
        self.arrange(which, len(used))
        for kept in (self.keys, self.values):
            for layer, old in enumerate(kept):  # one at a time: two copies of one layer at most
                new = old.new_zeros(self.prompts, old.shape[1], self.group, *old.shape[3:])
                written = old.transpose(1, 2).flatten(0, 1)[slot, :, : self.length]
                new.transpose(1, 2)[which, self.slot - which * self.group, :, : self.length] = (
                    written
                )
                kept[layer] = new

    def attend(self, layer: int, query, key, value) -> torch.Tensor:
        """One query of each rollout (B, heads, 1, head_dim) over its prompt and its own columns."""
        end, (heads, repeats) = self.length + 1, (key.shape[1], query.shape[1] // key.shape[1])
        self.keys[layer][:, :, :, self.length : end] = self.by_slot(key)
        self.values[layer][:, :, :, self.length : end] = self.by_slot(value)
        own_keys = self.keys[layer][:, :, :, :end].flatten(0, 2)  # (U kv_heads G, length, head_dim)
        own_values = self.values[layer][:, :, :, :end].flatten(0, 2)
        prompt_keys = self.prompt_keys[layer].flatten(0, 1)  # (U kv_heads, P, head_dim)
        prompt_values = self.prompt_values[layer].flatten(0, 1)
        columns, scale = prompt_keys.shape[1], query.shape[3] ** -0.5  # P

        # Query heads of one key/value head are rows of one product; so, for the prompt's columns,
        # are the rollouts of its group.
        query = self.by_slot(query.view(len(query), heads, repeats, -1)).flatten(0, 2)
        grouped = query.view(len(prompt_keys), -1, query.shape[2])  # (U kv_heads, G repeats, .)
        prompt_scores = scaled_product(grouped, prompt_keys.mT, scale)
        if self.hidden is not None:
            prompt_scores.view(self.prompts, -1, columns).add_(self.hidden[:, None])
        own_scores = scaled_product(query, own_keys.mT, scale)  # (U kv_heads G, repeats, length)
        scores = torch.cat((prompt_scores.view(*own_scores.shape[:2], columns), own_scores), -1)
        attention = at_least_float32(scores).softmax(-1).to(value.dtype)
        out = attention.view(*grouped.shape[:2], -1)[:, :, :columns] @ prompt_values
        out = torch.baddbmm(out.view(query.shape), attention[:, :, columns:], own_values)
        if layer == len(self.keys) - 1:
            self.length = end
        out = out.view(self.prompts, heads, self.group, repeats, -1).transpose(1, 2).flatten(0, 1)
        return (out if self.in_order else out[self.slot]).flatten(1, 2)[:, :, None]

    def by_slot(self, x: torch.Tensor) -> torch.Tensor:
        """(B, kv_heads, N, head_dim) -> (U, kv_heads, G, N, head_dim), 0 in places not taken."""
        if not self.in_order:
            places = x.new_zeros(self.prompts * self.group, *x.shape[1:])
            places[self.slot] = x
            x = places
        return x.unflatten(0, (self.prompts, self.group)).transpose(1, 2)
