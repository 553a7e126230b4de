"""The Llama against a reference in plain float64 NumPy, and what its mask may and may not do."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from model import Llama, LlamaConfig, masked_attention, rope_frequencies
from tests import tiny

LAYOUTS = {
    "gqa-llama3-tied": {},
    "untied-plain-rope": {
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "rope_theta": 500.0,
        "num_hidden_layers": 3,
    },
    "head-dim-6": {"head_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 2},
    "head-dim-10": {"head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 3},
    "one-kv-head": {"num_key_value_heads": 1, "rms_norm_eps": 0.1},
}


def reference_frequencies(config):
    """Angle per position, as the Llama 3.1 release words it, by wavelength."""
    frequencies = []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        if config.rope_scaling:
            wavelength = 2 * math.pi / frequency
            context = config.rope_scaling["original_max_position_embeddings"]
            low, high = (config.rope_scaling[f"{end}_freq_factor"] for end in ("low", "high"))
            slow = frequency / config.rope_scaling["factor"]
            if wavelength > context / low:
                frequency = slow
            elif wavelength >= context / high:
                smooth = (context / wavelength - low) / (high - low)
                frequency = (1 - smooth) * slow + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def reference(model, tokens, mask=None):
    """Logits (S, V) of one sequence in plain float64; mask None or (heads, S, S)."""
    config = model.config
    w = {name: weight.detach().double().numpy() for name, weight in model.named_parameters()}
    length, heads, half = len(tokens), config.num_attention_heads, config.head_dim // 2
    # A rotated pair is a complex number turned by its angle: no cos, sin or halves to mix up.
    turn = np.exp(1j * np.outer(np.arange(length), reference_frequencies(config)))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w[name]

    def head(x, name, number):
        size = config.head_dim
        return x @ w[name][number * size : (number + 1) * size].T

    def rotated(x):
        return (x[:, :half] + 1j * x[:, half:]) * turn

    x = w["embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        part = f"layers.{layer}."
        y = norm(x, part + "input_layernorm.weight")
        outs = []
        for h in range(heads):
            shared = h * config.num_key_value_heads // heads
            query = rotated(head(y, part + "self_attn.q_proj.weight", h))
            key = rotated(head(y, part + "self_attn.k_proj.weight", shared))
            value = head(y, part + "self_attn.v_proj.weight", shared)
            rows = []
            for i in range(length):
                scores = (query[i] * key[: i + 1].conj()).real.sum(1) / math.sqrt(config.head_dim)
                if mask is not None:
                    scores = scores + mask[h, i, : i + 1]
                weights = np.exp(scores - scores.max())
                rows.append(weights / weights.sum() @ value[: i + 1])
            outs.append(np.stack(rows))
        x = x + np.concatenate(outs, 1) @ w[part + "self_attn.o_proj.weight"].T
        y = norm(x, part + "post_attention_layernorm.weight")
        gate, up = (y @ w[f"{part}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[part + "mlp.down_proj.weight"].T
    tied = config.tie_word_embeddings
    return norm(x, "norm.weight") @ w["embed_tokens.weight" if tied else "lm_head.weight"].T


def distance(logits, expected):
    return np.abs(logits.detach().double().numpy() - expected).max()


@torch.no_grad()
def full(model, row, **arguments):
    """Logits (S, V) of one sequence of ids, without a cache."""
    return model(torch.tensor([row]), **arguments)[0]


# The plain model


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_logits_and_masked_logits_equal_a_reference(layout):
    model = tiny.llama(**layout)
    (row,) = tiny.ids(1, 24)
    heads = model.config.num_attention_heads
    mask = 3 * torch.randn(1, heads, 24, 24, generator=torch.Generator().manual_seed(2))
    plain = reference(model, row)
    assert np.abs(plain).max() > 1  # large enough for 1e-5 to mean something
    assert distance(full(model, row), plain) < 1e-5
    masked = reference(model, row, mask[0].double().numpy())
    assert distance(full(model, row, mask=mask), masked) < 1e-5
    assert np.abs(masked - plain).max() > 0.1


@pytest.mark.parametrize("layout", ["gqa-llama3-tied", "untied-plain-rope"])
def test_every_weight_and_setting_shows(layout):
    model = tiny.llama(**LAYOUTS[layout])
    (row,) = tiny.ids(1, 24)
    expected = reference(model, row)
    for name, weight in model.named_parameters():
        kept = weight.detach().clone()
        weight.data.mul_(1.02)
        assert distance(full(model, row), expected) > 1e-4, name
        weight.data.copy_(kept)
    mlp = model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    assert distance(full(model, row), expected) > 1e-2
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    settings = [{"rms_norm_eps": 1e-2}, {"rope_theta": 9000.0}]
    if model.config.rope_scaling:
        settings += [{"rope_scaling": {**tiny.LLAMA3, "factor": 4.0}}, {"rope_scaling": None}]
    for setting in settings:
        changed = Llama(replace(model.config, **setting))
        changed.load_state_dict(model.state_dict())
        assert distance(full(changed, row), expected) > 1e-4, setting
    assert distance(full(model, row), expected) < 1e-5


BLENDED_3B = [0.0021184068, 0.001290548, 0.0007625413, 0.0004295567, 0.0002227634, 0.0000970829]


@pytest.mark.parametrize(
    "head_dim, kept, blended, divided, last",
    [(64, 15, 3, 14, 9.418306490260875e-08), (128, 29, 6, 29, 7.672314694673332e-08)],
    ids=["1B", "3B"],
)
def test_rope_frequencies_of_llama_3_2(head_dim, kept, blended, divided, last):
    scaling = {**tiny.LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    shape = tiny.SHAPE | {"head_dim": head_dim, "rope_theta": 500000.0, "rope_scaling": scaling}
    frequencies = rope_frequencies(LlamaConfig(**shape)).double().numpy()
    plain = np.array([500000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    unchanged, slowed = (np.isclose(frequencies, plain / f, rtol=1e-6, atol=0) for f in (1, 32))
    assert unchanged.tolist() == [True] * kept + [False] * (blended + divided)
    assert slowed.tolist() == [False] * (kept + blended) + [True] * divided
    assert frequencies[-1] == pytest.approx(last, rel=1e-6)
    if head_dim == 128:
        assert frequencies[29:35] == pytest.approx(BLENDED_3B, rel=1e-6)


def test_bf16_keeps_the_angles_in_float32():
    model = tiny.llama()
    before = model.frequencies.clone()
    model.to(torch.bfloat16)
    assert model.frequencies.dtype == torch.float32 and torch.equal(model.frequencies, before)
    (row,) = tiny.ids(1, 8)
    assert full(model, row).dtype == torch.bfloat16


def bf16(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@torch.no_grad()
def test_bf16_norm_rounds_before_the_weight():
    norm = tiny.llama(dtype=torch.bfloat16).norm
    x = bf16(64, 32, seed=1)
    scale = 1 / (x.float() ** 2).mean(1, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(norm(x), (x * scale).bfloat16() * norm.weight, atol=0, rtol=0)
    # What it would be otherwise: the order shows in many elements.
    assert ((x * scale * norm.weight.float()).bfloat16() != norm(x)).float().mean() > 0.1


def test_bf16_softmax_is_taken_in_float32():
    query, key, value = (bf16(1, 2, 40, 10, seed=n) * 3 for n in (2, 3, 4))
    future = torch.full((40, 40), -torch.inf).triu(1)
    out = masked_attention(query, key, value, future)
    scores = (query @ key.transpose(2, 3)).float() * 10**-0.5
    scores = scores + torch.full((40, 40), -torch.inf).triu(1)
    expected = (scores.exp() / scores.exp().sum(-1, keepdim=True)).bfloat16() @ value
    assert out.dtype == torch.bfloat16
    assert (out == expected).float().mean() > 0.98


# The mask


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_zero_mask_is_no_mask(dtype, tolerance):
    model = tiny.llama(dtype=dtype)
    tokens = torch.tensor(tiny.ids(3, 17, 17))
    plain = model(tokens)
    for shape in [(17, 17), (2, 1, 17, 17), (2, 4, 17, 17)]:
        masked = model(tokens, mask=torch.zeros(shape))
        torch.testing.assert_close(masked, plain, atol=tolerance, rtol=0)


def test_mask_shapes_mean_what_they_say():
    model = tiny.llama()
    rows = tiny.ids(3, 9, 9)
    for shape in [(9, 9), (2, 1, 9, 9), (2, 4, 9, 9)]:
        mask = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
        logits = model(torch.tensor(rows), mask=mask)
        spread = mask.expand(2, 4, 9, 9).double().numpy()
        for b in range(2):
            assert distance(logits[b], reference(model, rows[b], spread[b])) < 1e-5


@pytest.mark.parametrize(
    "shape",
    [
        (9,),
        (2, 9, 9),  # would broadcast over heads
        (4, 9, 9),
        (8, 8),
        (10, 10),
        (9, 1),
        (1, 9),
        (9, 10),
        (1, 1, 9, 9),
        (3, 1, 9, 9),
        (2, 2, 9, 9),
        (2, 1, 8, 8),
        (2, 1, 9, 1),
        (2, 1, 9, 10),
        (1, 2, 4, 9, 9),
    ],
    ids=str,
)
def test_other_mask_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        tiny.llama()(torch.zeros(2, 9, dtype=torch.int64), mask=torch.zeros(shape))


@pytest.mark.parametrize("masked", [False, True])
def test_future_tokens_never_change_earlier_logits(masked):
    model = tiny.llama()
    begging = 1e4 * torch.ones(12, 12).triu(1)  # for the future
    mask = torch.randn(12, 12, generator=torch.Generator().manual_seed(5)) + begging
    mask = mask if masked else None
    row, replacement = tiny.ids(6, 12, 12)
    for cut in (1, 5, 11):
        changed = full(model, row[:cut] + replacement[cut:], mask=mask)
        kept = full(model, row, mask=mask)
        torch.testing.assert_close(changed[:cut], kept[:cut], atol=1e-6, rtol=0)
        assert not torch.allclose(changed[cut:], kept[cut:], atol=1e-2)


def test_right_padding_does_not_change_a_row():
    model = tiny.llama()
    short, long = tiny.ids(7, 6, 15)
    logits = model(torch.tensor([short + [0] * 9, long]))
    torch.testing.assert_close(logits[0, :6], full(model, short), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], full(model, long), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(11, 11), (2, 1, 11, 11), (2, 4, 11, 11)])
def test_mask_gradient_over_visible_keys_sums_to_zero(shape):
    # Softmax does not see a constant added to all scores of a row: rows of attention sum to one.
    model = tiny.llama(dtype=torch.float64)
    generator = torch.Generator().manual_seed(8)
    mask = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = model(torch.tensor(tiny.ids(9, 11, 11)), mask=mask)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    assert torch.equal(mask.grad.triu(1), torch.zeros_like(mask))
    assert mask.grad.sum(-1).abs().max() < 1e-12 * mask.grad.abs().max() * 100
    assert (mask.grad.abs().amax(-1)[..., 1:] > 1e-3).all()


def test_a_mask_beside_a_cache_is_refused():
    with pytest.raises(ValueError, match="one or the other"):
        tiny.llama()(torch.tensor([[1, 2]]), mask=torch.zeros(2, 2), cache=object())


def test_head_rows_are_the_gathered_rows():
    model = tiny.llama()
    tokens = torch.tensor(tiny.ids(15, 9, 9))
    wanted = torch.tensor([[8, 0, 3], [5, 5, 2]])
    logits, everything = model(tokens, head_rows=wanted), model(tokens)
    assert logits.shape == (2, 3, 64)
    for b in range(2):
        for n in range(3):
            expected = everything[b, wanted[b, n]]
            torch.testing.assert_close(logits[b, n], expected, atol=1e-6, rtol=0)


# Log-probabilities of targets


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_target_logprobs_and_entropies_by_hand(temperature):
    """Token 3 has probability 0 after token 1: at temperature 0.5 its logit is minus infinity."""
    table = [[0.5, -1.0, 2.0, 0.0], [1.0, 1.5, 0.0, -3e38], [0.0] * 4, [3.0, 1.0, -2.0, 0.5]]
    tokens, targets = [[0, 1, 2], [3, 1, 1]], [[2, 3, 1], [0, 1, 2]]
    logprobs, entropies = tiny.bigram(table)(
        torch.tensor(tokens), targets=torch.tensor(targets), temperature=temperature
    )
    assert logprobs.shape == entropies.shape == (2, 3)
    for b, row in enumerate(tokens):
        for n, token in enumerate(row):
            logits = [x / temperature for x in table[token]]
            total = math.log(sum(math.exp(x) for x in logits))
            expected = logits[targets[b][n]] - total
            assert logprobs[b, n].item() == pytest.approx(expected, abs=1e-5) or expected < -1e37
            parts = [math.exp(x - total) * (x - total) for x in logits if x > -1e37]
            assert entropies[b, n].item() == pytest.approx(-sum(parts), abs=1e-5)
    assert logprobs[0, 1] < -1e37
    assert entropies[0, 2].item() == pytest.approx(math.log(4))  # all alike
    assert not entropies.requires_grad
