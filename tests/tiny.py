"""Tiny seeded Llamas for tests, with weights large enough that every part of them shows."""

import torch

from lab.run.sampling import Prefill
from lab.run.suffix import Suffix
from model import Llama, LlamaConfig

# With theta 10000 and head_dim 8: the first frequency kept, the second blended, two divided.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "rope_scaling": LLAMA3,
    "tie_word_embeddings": True,
}


@torch.no_grad()
def llama(seed=0, dtype=torch.float32, gain=1.0, **changes) -> Llama:
    """A random Llama; gain scales all matrices, for sharper attention and larger losses."""
    model = Llama(LlamaConfig(**SHAPE | changes))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(
            gain * noise * weight.shape[-1] ** -0.5 if weight.dim() == 2 else 1 + noise / 5
        )
    return model.to(dtype)


@torch.no_grad()
def bigram(table) -> Llama:
    """A Llama without layers whose logits after token i are table[i]: sums by hand."""
    table = torch.tensor(table, dtype=torch.float32)
    size = len(table)
    shape = {"vocab_size": size, "hidden_size": size, "num_hidden_layers": 0, "rms_norm_eps": 0.0}
    model = llama(tie_word_embeddings=False, **shape)
    model.embed_tokens.weight.copy_(torch.eye(size))
    model.norm.weight.fill_(size**-0.5)  # undoes the norm of a one-hot vector
    model.lm_head.weight.copy_(table.T)
    return model


def ids(seed, *lengths, vocab=64) -> list[list[int]]:
    """Seeded ragged lists of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def next_logits(model, sequence) -> torch.Tensor:
    """Logits (V,) of the next token, float64, from the whole sequence: no cache, no padding."""
    return model(torch.tensor([sequence]))[0, -1].double()


def suffix_logits(model, batch, multiple=1):
    """What atman.plain_logits is, by way of Suffix."""
    return Suffix(model, Prefill(model, batch.prompts), batch, multiple).logits


def same_weights(left, right) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)
