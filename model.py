"""Llama 3 by hand, with an additive attention mask as an ordinary argument of forward.

    model = Llama.from_pretrained("data/micro")          # or meta-llama/Llama-3.2-3B-Instruct
    logits = model(tokens)                               # the plain model
    logits = model(tokens, mask=H)                       # Eq. 1: softmax(Q K^T / sqrt(d) + H) V

The mask is the only thing here that other Llamas do not have. It is added to the scores of every
layer and head before the softmax, so that the attention still sums to one; what is in the future
stays at minus infinity whatever the mask says. None is the plain model.

The files of a checkpoint are checkpoint.py's, hub names are hub.py's.

Shapes: B batch, S sequence (query and key positions), heads, kv_heads, head_dim, V vocabulary.
repeats = heads // kv_heads: query head i reads key/value head i // repeats.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoint import (
    LLAMA3_ROPE_KEYS,
    check_weights,
    config_json,
    read_companions,
    read_config,
    read_weights,
    write_checkpoint,
)
from hub import checkpoint_directory


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that the arithmetic depends on, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3", ...} or None
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, directory) -> "LlamaConfig":
        """From config.json and generation_config.json. ValueError naming what is wrong there."""
        return cls(**read_config(Path(directory)))


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Angle per position of each rotated pair, float32 (head_dim / 2,), with llama3 scaling.

    Wavelengths longer than the original context are slowed by `factor`, short ones are kept, and
    those between are blended (Llama 3.1's long-context recipe); it does not depend on the length
    of the sequence at hand.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_ROPE_KEYS)
    wavelengths = 2 * math.pi / frequencies  # in tokens
    kept = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    # In this order the float32 values are transformers' own, bit for bit.
    return (1 - kept) * frequencies / factor + kept * frequencies


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE, rotate-half form. x (B, heads, S, head_dim); cos, sin as Llama.angles gives them."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((right, left), dim=-1) * sin


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision up to float32; float64 stays, so that gradients can be checked in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Cast back before the weight, as Hugging Face does: F.rms_norm rounds differently in bf16.
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, bias, cache):
        query = self.queries(x, cos, sin)
        key, value = self.keys_values(x, cos, sin)
        if cache is not None:
            out = cache.attend(self.layer, query, key, value)
        elif bias is not None:
            out = masked_attention(query, key, value, bias)
        else:  # plain causal attention: PyTorch's fused kernel
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.output(out)

    def queries(self, x, cos, sin) -> torch.Tensor:
        """x (B, S, hidden) -> (B, heads, S, head_dim), rotated."""
        return rotate(self.split(self.q_proj(x)), cos, sin)

    def keys_values(self, x, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, S, hidden) -> two of (B, kv_heads, S, head_dim), keys rotated."""
        return rotate(self.split(self.k_proj(x)), cos, sin), self.split(self.v_proj(x))

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """(B, heads, S, head_dim) -> (B, S, hidden)."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


def masked_attention(query, key, value, bias) -> torch.Tensor:
    """Eq. 1 written out: softmax(Q K^T / sqrt(d) + H) V, softmax in float32.

    query (B, heads, S, head_dim); key, value (B, kv_heads, S, head_dim); bias, H with the future at
    minus infinity, broadcasts to (B, heads, S, S). Returns (B, heads, S, head_dim).
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, repeats = key.shape[1], heads // key.shape[1]
    # The query heads that share a key/value head become rows of one matrix product, not copies.
    grouped = query.reshape(batch, kv_heads, repeats * length, head_dim)
    scores = at_least_float32(grouped @ key.mT) * head_dim**-0.5
    scores = scores.view(batch, heads, length, -1) + bias  # (B, heads, S, S), Eq. 1
    attention = scores.softmax(-1).to(value.dtype)
    out = attention.view(batch, kv_heads, repeats * length, -1) @ value
    return out.view(batch, heads, length, head_dim)


def scaled_product(left, right, scale: float) -> torch.Tensor:
    """scale * left @ right, batches of matrices; the scaling costs no pass of its own."""
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *attention_inputs):
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:  # tied: one Parameter, and one tensor in the file
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        # A plain attribute, not a buffer: model.to(bfloat16) must not round the angles.
        self.frequencies = rope_frequencies(config)
        self.companions = {}  # name -> bytes: files that a save carries along

    def forward(
        self,
        tokens,
        mask=None,
        cache=None,
        positions=None,
        head_rows=None,
        targets=None,
        temperature=1.0,
        logit_chunk=0,
        recompute=False,
    ):
        """Logits of the next token; with targets, their log-probabilities and the entropies.

        tokens (B, S) int64, right-padded. mask: additive, finite, float, (S, S), (B, 1, S, S) or
        (B, heads, S, S), on top of the causal one; a three-dimensional mask is refused, since it
        would broadcast over heads, not rollouts. cache, in place of a mask: one of cache.py's, that
        keeps keys and values and attends over what it kept. positions (B, S): where each token
        stands in its row (default: 0, 1, 2, ...). head_rows (B, N) int64: only these rows go
        through the output head. recompute: keep each layer's input alone for the backward pass and
        run the layer again there. Returns logits (B, S, V), or (B, N, V), in the model's dtype.
        With targets (B, N) or (B, S), see `target_logprobs`, in its place. Raises ValueError for a
        mask of another shape, or beside a cache.
        """
        batch, length = tokens.shape
        if mask is not None and cache is not None:
            raise ValueError("a mask over cached columns is not supported: give one or the other")
        if positions is None:
            positions = torch.arange(length, device=tokens.device).expand(batch, length)
        cos, sin = self.angles(positions)
        bias = None
        if mask is not None:
            check_mask(mask, batch, self.config.num_attention_heads, length)
            future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
            bias = mask.masked_fill(future, -torch.inf)  # whatever the mask says
        x = self.embed_tokens(tokens)  # (B, S, hidden)
        for layer in self.layers:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, bias, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, bias, cache)
        if head_rows is not None:
            x = x.gather(1, head_rows[:, :, None].expand(-1, -1, x.shape[-1]))
        if targets is not None:
            return self.target_logprobs(x, targets, temperature, logit_chunk)
        return self.head(x)

    def target_logprobs(self, x, targets, temperature=1.0, chunk=0):
        """Log-probability of each target and entropy of its distribution, float32, both (B, N).

        x (B, N, hidden): the last layer's output at the rows that predict targets (B, N);
        temperature divides the logits; the entropy, in nats, has no gradient. chunk: so many
        positions' logits are in memory at a time, made again in the backward pass; 0 is all.
        """

        def score(x, targets):
            logprobs = (at_least_float32(self.head(x)) / temperature).log_softmax(-1)  # (B, n, V)
            with torch.no_grad():
                entropy = -logprobs.exp().mul_(logprobs.clamp(min=-1e4)).sum(-1)  # 0 log 0 is 0
            return logprobs.gather(2, targets[:, :, None])[:, :, 0].float(), entropy.float()

        if chunk == 0 or x.shape[1] <= chunk:
            return score(x, targets)
        parts = [
            checkpoint(score, *part, use_reentrant=False)
            for part in zip(x.split(chunk, 1), targets.split(chunk, 1), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs, 1), torch.cat(entropies, 1)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's cos and sin (B, 1, S, head_dim) at positions (B, S), in the model's dtype.

        The left half of sin is negative: rotate need not negate.
        """
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, :, None] * self.frequencies  # (B, S, head_dim / 2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        dtype = self.embed_tokens.weight.dtype
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, N, V) of the last layer's output (B, N, hidden)."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(self.norm(x), head.weight)

    @classmethod
    def from_pretrained(cls, path_or_repo, dtype=torch.float32, device="cpu") -> "Llama":
        """A checkpoint directory, or a hub name such as meta-llama/Llama-3.2-1B-Instruct.

        Raises ValueError or FileNotFoundError with a sentence naming the file at fault: no such
        directory, another architecture, a damaged file, missing, surplus or misshapen tensors.
        """
        directory = checkpoint_directory(path_or_repo)
        config = LlamaConfig.from_directory(directory)
        with torch.device("meta"):  # shapes alone: no memory for what is about to be replaced
            model = cls(config).to(dtype)
        shapes = {key: tuple(weight.shape) for key, weight in model.file_weights().items()}
        check_weights(directory, shapes)
        try:
            model = model.to_empty(device=device)
        except RuntimeError as error:  # out of memory
            size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{directory}: {size / 2**30:.1f} GiB of weights do not fit on {device} ({reason})"
            ) from None
        if torch.device(device).type == "cpu":
            store_by_input(model)
        read_weights(directory, model.file_weights())
        model.companions = read_companions(directory)
        return model

    def save_pretrained(self, path, beside=None, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a directory that this project, transformers and vLLM load, whole or not at all.

        The tokenizer's files, and settings that the arithmetic does not depend on, are those beside
        the weights that this model was loaded from, or in the directory `beside`. Raises OSError or
        ValueError when `path` cannot be written.
        """
        weights = self.file_weights()
        config = config_json(self.config, next(iter(weights.values())).dtype)
        companions = self.companions if beside is None else read_companions(Path(beside))
        write_checkpoint(path, config, weights, companions, max_shard_bytes)

    def file_weights(self) -> dict[str, torch.Tensor]:
        """The weights under their names in Hugging Face files; a tied head is not among them."""
        return {
            name if name.startswith("lm_head.") else f"model.{name}": weight.detach()
            for name, weight in self.named_parameters()
        }


def store_by_input(model: nn.Module) -> None:
    """Lay the weights of all nn.Linear out in memory column by column; their shapes stay.

    A CPU multiplies the few rows of a decoding step a tenth faster so (8 rows; PyTorch with MKL),
    and many rows as fast as before.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.T.contiguous().T


def right_pad(rows, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged lists of ids as forward takes them: (B, longest) int64, and their lengths (B,).

    The padding, id 0, stands in every token's future and is never seen.
    """
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)
    return padded, torch.tensor([len(row) for row in rows], device=device)


def check_mask(mask, batch: int, heads: int, length: int) -> None:
    """Refuse a mask that would broadcast into something other than what it says."""
    fits = mask.is_floating_point() and mask.dim() in (2, 4) and mask.shape[-2:] == (length, length)
    if mask.dim() == 4:
        fits = fits and mask.shape[0] == batch and mask.shape[1] in (1, heads)
    if not fits:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} and {mask.dtype} does not fit {batch} sequences of "
            f"{length} tokens: give (S, S), (B, 1, S, S) or (B, heads, S, S) in a float format"
        )
