"""The part that a mask can change equals the whole model, and costs what the arithmetic says."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import atman
from atman import MaskConfig
from lab.run.sampling import Prefill
from model import masked_attention
from lab.run.suffix import Suffix, SuffixAttention
from tests import bench, plain_masks, tiny

PARTS = (
    [*tiny.ids(1, 2, 4), tiny.ids(1, 2)[0]],  # prompts: the first and the last are equal
    tiny.ids(2, 5, 3, 7),  # reasonings
    tiny.ids(3, 1, 2, 1),  # delimiters
    tiny.ids(4, 1, 3, 2),  # answers
)


def random_additive(batch):
    generator = torch.Generator().manual_seed(5)
    H = -3 * torch.rand(batch.region.shape, generator=generator, dtype=torch.float64)
    return (H * batch.region).requires_grad_()


def suffix_of(model, batch):
    prefill = Prefill(model, PARTS[0])
    return Suffix(model, prefill, PARTS[0], batch.tokens, batch.answer_rows)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_loss_and_gradient_equal_the_whole_models(layers, tied):
    model = tiny.llama(
        dtype=torch.float64, num_hidden_layers=layers, tie_word_embeddings=tied
    ).requires_grad_(False)
    batch = atman.pack(*PARTS, "cpu")
    additive = random_additive(batch)
    loss = atman.answer_loss(suffix_of(model, batch).logits(additive), batch)

    def whole(tokens, mask, rows):
        logits = model(tokens, mask=mask)
        return logits.gather(1, rows[:, :, None].expand(-1, -1, logits.shape[2]))

    plain = plain_masks.answer_loss(whole, plain_masks.pack(*PARTS, "cpu"), additive)
    torch.testing.assert_close(loss, plain, atol=1e-12, rtol=0)
    found, expected = (torch.autograd.grad(each.sum(), additive)[0] for each in (loss, plain))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found * batch.region, expected, atol=1e-12, rtol=0)


def attention_inputs(dtype=torch.float64):
    """query (2, 4, 3, 8); own key, value (2, 2, 5, 8); H (2, 3, 4); bias (2, 3, 11); buffers."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    bias = random(2, 3, 11).masked_fill(torch.rand(2, 3, 11, generator=generator) < 0.2, -torch.inf)
    inputs = [random(2, 4, 3, 8), random(2, 2, 5, 8), random(2, 2, 5, 8), random(2, 3, 4)]
    return [x.requires_grad_() for x in inputs], bias, random(2, 2, 11, 8), random(2, 2, 11, 8)


def test_attention_and_its_backward_pass_equal_autograds():
    inputs, bias, keys, values = attention_inputs()
    query, key, value, additive = inputs
    # H's own columns begin after the 6 of the prompt; the bias holds H already.
    with_h = bias.clone()
    with_h[:, :, 6:10] += additive.detach()
    found = SuffixAttention.apply(query, key, value, additive, with_h, keys.clone(), values.clone())
    by_hand = bias + torch.nn.functional.pad(additive, (6, 1))
    all_keys = torch.cat((keys[:, :, :6], key), 2)
    all_values = torch.cat((values[:, :, :6], value), 2)
    expected = masked_attention(query, all_keys, all_values, by_hand[:, None])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(7)).double()
    for name, ours, theirs in zip(
        ("query", "key", "value", "H"),
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert theirs.abs().max() > 0.01, name
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [-4.0, -4.01, -4.02])
def test_half_precision_keeps_the_mask_and_the_softmax_in_float32(bias):
    """bfloat16 tells -4 from -4.02, but not from -4.01: H moves by a hundredth a step."""
    zero = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)
    value = torch.tensor([[[[8.0, 0.0], [0.0, 1.0]]]], dtype=torch.bfloat16)
    additive = torch.tensor([[[bias, 0.0]]], requires_grad=True)
    buffers = [torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16) for _ in range(2)]
    out = SuffixAttention.apply(
        zero, zero.expand(1, 1, 2, 2), value, additive, additive.detach().clone(), *buffers
    )
    weight = torch.sigmoid(torch.tensor(bias, dtype=torch.float64))  # of the first column
    expected = torch.stack((8 * weight, 1 - weight))
    assert out.dtype == torch.bfloat16
    # Attention is rounded once, and the output once: 2**-9 each, relative.
    torch.testing.assert_close(out.flatten().double(), expected, rtol=2**-8, atol=0)
    gradient = torch.tensor([[[[1.0, 3.0]]]], dtype=torch.bfloat16)  # 8 and 3 on the two weights
    (found,) = torch.autograd.grad(out, additive, gradient)
    kept = torch.stack((weight, 1 - weight)).bfloat16().double()
    towards = torch.tensor([8.0, 3.0], dtype=torch.float64)
    expected = kept * (towards - (kept * towards).sum())
    torch.testing.assert_close(found.flatten().double(), expected, rtol=1e-5, atol=1e-6)


def test_an_older_forward_pass_cannot_go_backward():
    model = tiny.llama().requires_grad_(False)
    batch = atman.pack(*PARTS, "cpu")
    suffix = suffix_of(model, batch)
    additive = random_additive(batch).float().detach().requires_grad_()
    older = suffix.logits(additive).sum()
    newer = suffix.logits(additive).sum()
    torch.autograd.grad(newer, additive)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(older, additive)


def flop(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_costs_what_the_arithmetic_says(batch):
    """Products counted by PyTorch, against a sum by hand of what cannot be saved."""
    width, inner, layers, vocabulary = 64, 96, 3, 128
    shape = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner}
    model = tiny.llama(**shape, num_hidden_layers=layers, num_attention_heads=8)
    P, T, D, A = 20, 30, 2, 3
    parts = [[row] * batch for row in tiny.ids(8, P, T, D, A, vocab=vocabulary)]
    counts = [
        flop(lambda n=n: atman.optimize_masks(model, *parts, MaskConfig(steps=n))) for n in (1, 2)
    ]
    R, K = T + D + A - 1, P + T + D + A - 1
    heads, kv, head_dim = 8, 2, 8
    project_kv = 2 * width * kv * head_dim
    rest = 2 * width * heads * head_dim + 3 * width * inner  # q and o projections, MLP

    def product(rows, columns):
        return 2 * rows * columns * heads * head_dim

    def attention(rows):  # forward; back to the attention and queries, to own keys and values
        return 2 * product(rows, K) + 2 * product(rows, K) + 2 * product(rows, R)

    q_projection = width * heads * head_dim
    first = 4 * R * (rest - q_projection) + 3 * product(R, K)  # its q, k and v are constants
    middle = 4 * R * (project_kv + rest) + attention(R)
    last = 4 * R * project_kv + 4 * A * rest + attention(A)
    head = 4 * A * width * vocabulary
    assert counts[1] - counts[0] == batch * (first + (layers - 2) * middle + last + head)


def test_another_questions_long_prompt_costs_nothing():
    model = tiny.llama()
    longer = Prefill(model, [*PARTS[0], *tiny.ids(10, 50)])
    own = Prefill(model, PARTS[0])
    costs = [
        flop(lambda p=p: atman.optimize_masks(model, *PARTS, MaskConfig(steps=2), prefill=p))
        for p in (own, longer)
    ]
    assert costs[0] == costs[1] > 0


def test_saved_memory_is_below_two_fifths_of_the_plain_loops():
    model = tiny.llama(hidden_size=64, intermediate_size=176, num_hidden_layers=4)
    parts = [[row] * 2 for row in tiny.ids(9, 100, 150, 1, 4)]
    ours, plain = (
        bench.saved_bytes(lambda f=f: f(model, *parts, MaskConfig(steps=0)), model)
        for f in (atman.optimize_masks, plain_masks.optimize_masks)
    )
    assert ours < 0.4 * plain
