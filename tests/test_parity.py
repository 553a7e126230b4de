"""Logits against transformers' (stored by tests/transformers_parity.py): independent code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab.run.checkpoint import load_config, load_llama
from model import rope_frequencies

NAMES = ("grouped-llama3-tied", "head-dim-10", "untied-plain")
FIXTURES = [Path(__file__).parent / "parity" / name for name in NAMES]
each = pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)


@torch.no_grad()
def difference(model, outputs, masked=False) -> float:
    """Largest difference of logits from transformers' in float32."""
    logits = model(outputs["tokens"], mask=outputs["mask"] if masked else None)
    expected = outputs["masked_logits" if masked else "logits"]
    assert logits.shape == expected.shape
    return (logits - expected).abs().max().item()


@each
@pytest.mark.parametrize("masked", [False, True])
def test_float32_logits(fixture, masked):
    outputs = load_file(fixture / "outputs.safetensors")
    model = load_llama(fixture)
    assert difference(model, outputs, masked) <= 1e-5
    assert outputs["logits"].std() > 0.3  # or everything would be near


@each
@torch.no_grad()
def test_bfloat16_logits(fixture):
    """As near one of transformers' attention paths as its own two are to each other.

    In the mean over all logits: a single one may land on the other side of a rounding, and another
    processor's kernels round elsewhere, hence the quarter.
    """
    outputs = load_file(fixture / "outputs.safetensors")
    eager, sdpa = (outputs[f"bfloat16_{path}"].float() for path in ("eager", "sdpa"))
    between = (eager - sdpa).abs().mean()
    assert 0 < between < 0.02 * eager.std()
    model, tokens = load_llama(fixture, dtype=torch.bfloat16), outputs["tokens"]
    no_mask = torch.zeros(tokens.shape[1], tokens.shape[1])
    for mask in (None, no_mask):  # the fused kernel, and attention written out
        logits = model(tokens, mask=mask)
        assert logits.dtype == torch.bfloat16
        assert min((logits - path).abs().mean() for path in (eager, sdpa)) <= 1.25 * between


@torch.no_grad()
def interleave(model):
    """Meta's layout of q and k: the two halves of each head woven together."""
    for layer in model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
            heads = weight.view(-1, 2, model.config.head_dim // 2, weight.shape[1])
            weight.copy_(heads.transpose(1, 2).reshape(weight.shape))


def swap_gate_and_up(model):
    for layer in model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def wrong_factor(model):
    model.config.rope_scaling["factor"] *= 2
    model.frequencies = rope_frequencies(model.config)


def neighbouring_kv_head(model):
    """Query head i reads kv head i % kv_heads in place of i // repeats."""
    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    for layer in model.layers:
        weight = layer.self_attn.q_proj.weight
        heads = weight.view(config.num_key_value_heads, repeats, config.head_dim, -1)
        weight.data = heads.transpose(0, 1).reshape(weight.shape)


@pytest.mark.parametrize(
    "name, mistake",
    [
        *((fixture.name, interleave) for fixture in FIXTURES),
        *((fixture.name, swap_gate_and_up) for fixture in FIXTURES),
        ("grouped-llama3-tied", wrong_factor),  # the others have no scaling, or one kv head
        ("head-dim-10", wrong_factor),
        ("grouped-llama3-tied", neighbouring_kv_head),
    ],
)
def test_mistakes_show(name, mistake):
    fixture = FIXTURES[0].parent / name
    outputs = load_file(fixture / "outputs.safetensors")
    model = load_llama(fixture)
    mistake(model)
    assert difference(model, outputs) > 1e-3


@each
def test_frequencies_to_the_last_bit(fixture):
    stored = load_file(fixture / "outputs.safetensors")["frequencies"]
    assert torch.equal(rope_frequencies(load_config(fixture)), stored)
