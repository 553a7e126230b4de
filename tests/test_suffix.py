"""The part that a mask can change equals the whole model, and costs what the arithmetic says."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import atman
from atman import MaskConfig, lay_out, optimize_masks, plain_logits, rollout_saliency
from lab.run import graphs
from lab.run.sampling import Prefill
from lab.run.suffix import Suffix, SuffixAttention, learn_masks
from model import masked_attention
from tests import tiny
from tests.bench import saved_bytes
from tests.recorded import Recorded
from tests.tiny import suffix_logits

# Three ragged rollouts; the first and the last have the same prompt.
PROMPTS = [*tiny.ids(1, 2, 4), *tiny.ids(1, 2)]
REASONINGS, DELIMITERS, ANSWERS = tiny.ids(2, 5, 3, 7), tiny.ids(3, 1, 2, 1), tiny.ids(4, 1, 3, 2)
ROLLOUTS = list(zip(PROMPTS, REASONINGS, DELIMITERS, ANSWERS, strict=True))


def learn_plainly(model, rollouts, config):
    return optimize_masks(model, lay_out(rollouts, "cpu"), config)


def random_mask(batch):
    generator = torch.Generator().manual_seed(5)
    mask = -3 * torch.rand(batch.region.shape, generator=generator, dtype=torch.float64)
    return (mask * batch.region).requires_grad_()


# The same numbers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_loss_and_gradient_equal_the_whole_models(layers, tied):
    model = tiny.llama(
        dtype=torch.float64, num_hidden_layers=layers, tie_word_embeddings=tied
    ).requires_grad_(False)
    batch = lay_out(ROLLOUTS, "cpu")
    mask = random_mask(batch)
    losses, gradients = [], []
    for logits in (suffix_logits(model, batch), plain_logits(model, batch)):
        losses.append(atman.answer_loss(logits(mask), batch))
        gradients.append(torch.autograd.grad(losses[-1].sum(), mask)[0] * batch.region)
    torch.testing.assert_close(*losses, atol=1e-12, rtol=0)
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def group_of_eight():
    """Eight ragged rollouts of one question, all with the same gold answer."""
    generator = torch.Generator().manual_seed(8)
    lengths = torch.randint(9, 30, (8,), generator=generator).tolist()
    (prompt, answer), delimiters = tiny.ids(9, 12, 3), tiny.ids(10, *[1, 2] * 4)
    reasonings = tiny.ids(11, *lengths)
    return [(prompt, r, d, answer) for r, d in zip(reasonings, delimiters, strict=True)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_two_hundred_steps_equal_the_plain_loops(dtype, tolerance):
    """The paper's setting, ragged batch: the whole sequence at every step gives the same masks."""
    model, config, rollouts = tiny.llama(dtype=dtype), MaskConfig(), group_of_eight()[:3]
    ours = learn_masks(model, rollouts, config)
    plain = learn_plainly(model, rollouts, config)
    assert torch.equal(ours.region, plain.region)
    assert_equal_masks(ours, plain, tolerance)
    assert (plain.H - config.init * plain.region).abs().max() > 0.05
    for kind in ("mask", "attribution"):
        rewards, expected = (rollout_saliency(masks, config, kind) for masks in (ours, plain))
        assert expected.std() > 1e-3
        torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)


def assert_equal_masks(masks, expected, tolerance):
    for field in ("H", "attribution", "losses", "unmasked"):
        pair = getattr(masks, field), getattr(expected, field)
        torch.testing.assert_close(*pair, atol=tolerance, rtol=0, msg=lambda m, f=field: f + m)


CONFIGS = {
    "paper": MaskConfig(steps=12),
    "sparse": MaskConfig(steps=12, sparsity=1e-3),
    "stopping": MaskConfig(steps=12, lr=0.05, stop_at_unmasked=True),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("multiple", [1, 7, 16])
@pytest.mark.parametrize("rollouts", [ROLLOUTS, ROLLOUTS[2:]], ids=["ragged", "one"])
def test_a_step_replayed_as_a_graph_would_equals_the_plain_loop(
    rollouts, multiple, name, monkeypatch
):
    """All that a step carries on is in tensors that stay where they are, and nothing waits."""
    config = CONFIGS[name]
    expected = learn_plainly(tiny.llama(dtype=torch.float64), rollouts, config)
    # As on a GPU: its own kernel counts the steps, where PyTorch's Python would keep a number.
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, fused=True))
    model, batch, steps = tiny.llama(dtype=torch.float64), lay_out(rollouts, "cpu"), []

    def capture(step):
        steps.append(Recorded(step))
        return steps[0].replay

    logits = suffix_logits(model, batch, multiple)
    masks = optimize_masks(model, batch, config, logits, capture=capture)
    assert len(steps[0].calls) > 100
    assert_equal_masks(masks, expected, 1e-10)
    moved = (masks.H - config.init * masks.region).abs().amax((1, 2))
    assert moved.max() > 5e-3
    assert (moved.min() < 1e-6) == (name == "stopping" and len(rollouts) == 3)  # two stop at once


@pytest.mark.parametrize("multiple", [16, 64])
def test_padding_changes_neither_loss_nor_gradient(multiple):
    model = tiny.llama(dtype=torch.float64, num_hidden_layers=3).requires_grad_(False)
    batch = lay_out(ROLLOUTS, "cpu")
    prefill = Prefill(model, [*PROMPTS, *tiny.ids(12, 40)])  # wider than the padded prompts of 16
    suffix = Suffix(model, prefill, batch, multiple)
    assert [x.shape[2] for x in suffix.keys] == [2 * multiple] * 3
    mask, found = random_mask(batch), []
    blind = torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
    for logits in (suffix.logits, plain_logits(model, batch)):
        for arguments in ((mask,), (mask, blind)):
            loss = atman.answer_loss(logits(*arguments), batch)
            found.append((loss, torch.autograd.grad(loss.sum(), mask)[0] * batch.region))
    for ours, plain in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("repeats", [1, 3])
def test_attention_and_its_backward_pass_equal_autograds(repeats):
    generator = torch.Generator().manual_seed(6)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # 2 rollouts, 2 key/value heads of width 8; 6 prompt columns, 5 own, 4 of them reasoning; 3 rows
    query, mask = random(2, 2 * repeats, 3, 8), random(2, 3, 4)
    key, value = random(2, 2, 5, 8), random(2, 2, 5, 8)
    inputs = [x.requires_grad_() for x in (query, key, value, mask)]
    unseen = torch.zeros(2, 3, 11, dtype=torch.float64)
    unseen.masked_fill_(torch.rand(2, 3, 11, generator=generator) < 0.2, -torch.inf)
    keys, values = random(2, 2, 11, 8), random(2, 2, 11, 8)
    bias = unseen + torch.nn.functional.pad(mask, (6, 1))
    ours = SuffixAttention.apply(*inputs, bias.detach(), keys.clone(), values.clone())
    all_keys = torch.cat((keys[:, :, :6], key), 2)
    all_values = torch.cat((values[:, :, :6], value), 2)
    theirs = masked_attention(query, all_keys, all_values, bias[:, None])
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weights = random(*ours.shape)
    for name, gradient, expected in zip(
        ("query", "key", "value", "mask"),
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        assert expected.abs().max() > 0.01, name
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_prompts_read_before_give_the_same_masks():
    model, config = tiny.llama(), MaskConfig(steps=3)
    prefill = Prefill(model, [*tiny.ids(12, 6), *PROMPTS[::-1]])  # another prompt among them
    masks = learn_masks(model, ROLLOUTS, config, prefill)
    expected = learn_masks(model, ROLLOUTS, config)
    torch.testing.assert_close(masks.H, expected.H, atol=1e-6, rtol=0)
    torch.testing.assert_close(masks.attribution, expected.attribution, atol=1e-6, rtol=0)


def test_an_older_forward_pass_cannot_go_backward():
    model = tiny.llama().requires_grad_(False)
    batch = lay_out(ROLLOUTS, "cpu")
    logits = suffix_logits(model, batch)
    mask = random_mask(batch).float().detach().requires_grad_()
    older, newer = logits(mask).sum(), logits(mask).sum()
    torch.autograd.grad(newer, mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(older, mask)


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-3), (torch.bfloat16, 3e-2)]
)
def test_graphs_and_fused_work_equal_eager_masks(dtype, tolerance, monkeypatch):
    """And, but for bfloat16, the CPU's, whose angles are rounded otherwise."""
    config, model = MaskConfig(steps=20), tiny.llama(dtype=dtype, num_hidden_layers=3)
    expected = learn_masks(model, group_of_eight(), config)
    captured, capture = [], graphs.Graph.capture
    monkeypatch.setattr(
        graphs.Graph, "capture", lambda graph: (captured.append(graph), capture(graph))
    )
    runs = []
    for enabled in (True, False):
        monkeypatch.setattr(graphs, "ENABLED", enabled)
        runs.append(learn_masks(model.cuda(), group_of_eight(), config))
    assert len(captured) == 1 and captured[0].graph is not None
    for field in ("H", "attribution", "losses"):
        found, eager, cpu = (getattr(masks, field).cpu() for masks in (*runs, expected))
        torch.testing.assert_close(found, eager, atol=tolerance, rtol=0)
        if dtype != torch.bfloat16:
            torch.testing.assert_close(found, cpu, atol=tolerance, rtol=0)


# Half precision


@pytest.mark.parametrize("added", [-4.0, -4.01, -4.02])
def test_half_precision_keeps_the_mask_and_the_softmax_in_float32(added):
    """bfloat16 tells -4 from -4.02, but not from -4.01: H moves by a hundredth a step."""
    zero = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)
    value = torch.tensor([[[[8.0, 0.0], [0.0, 1.0]]]], dtype=torch.bfloat16)
    mask = torch.tensor([[[added, 0.0]]], requires_grad=True)
    buffers = [torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16) for _ in range(2)]
    out = SuffixAttention.apply(zero, zero.expand(1, 1, 2, 2), value, mask, mask.detach(), *buffers)
    weight = torch.sigmoid(torch.tensor(added, dtype=torch.float64))  # of the first column
    expected = torch.stack((8 * weight, 1 - weight))
    assert out.dtype == torch.bfloat16
    # Attention is rounded once, and the output once: 2**-9 each, relative.
    torch.testing.assert_close(out.flatten().double(), expected, rtol=2**-8, atol=0)
    d_out = torch.tensor([[[[1.0, 3.0]]]], dtype=torch.bfloat16)  # 8 and 3 on the two weights
    (gradient,) = torch.autograd.grad(out, mask, d_out)
    kept = torch.stack((weight, 1 - weight)).bfloat16().double()
    towards = torch.tensor([8.0, 3.0], dtype=torch.float64)
    expected = kept * (towards - (kept * towards).sum())
    torch.testing.assert_close(gradient.flatten().double(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_the_order_within_a_group():
    """The same weights, rounded to bfloat16, computed with in float32 and in bfloat16."""
    rounded = tiny.llama(hidden_size=64, dtype=torch.bfloat16)
    rollouts, config = group_of_eight(), MaskConfig.in_steps(50)
    ranks = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.llama(hidden_size=64)
        model.load_state_dict(rounded.state_dict())
        masks = learn_masks(model.to(dtype), rollouts, config)
        assert masks.H.dtype == torch.float32
        ranks.append(rollout_saliency(masks, config).argsort().argsort().float())
    assert torch.corrcoef(torch.stack(ranks))[0, 1] >= 0.97  # Spearman


# The costs


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
    rollouts = [tiny.ids(8, P, T, D, A, vocab=vocabulary)] * batch
    counts = [flop(lambda n=n: learn_masks(model, rollouts, MaskConfig(steps=n))) for n in (1, 2)]
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
    model, config = tiny.llama(), MaskConfig(steps=2)
    prefills = Prefill(model, PROMPTS), Prefill(model, [*PROMPTS, *tiny.ids(10, 50)])
    own, longer = (flop(lambda p=p: learn_masks(model, ROLLOUTS, config, p)) for p in prefills)
    assert own == longer > 0


def test_saved_memory_is_about_half_of_the_plain_loops():
    model = tiny.llama(hidden_size=64, intermediate_size=176, num_hidden_layers=4)
    rollouts = [tiny.ids(9, 100, 150, 1, 4)] * 2
    ours, plain = (
        saved_bytes(lambda f=f: f(model, rollouts, MaskConfig(steps=0)), model)
        for f in (learn_masks, learn_plainly)
    )
    assert ours < 0.55 * plain


def test_suffix_reads_no_prompt_again():
    model = tiny.llama()
    batch = lay_out(ROLLOUTS, "cpu")
    prefill = Prefill(model, PROMPTS)
    model.register_forward_pre_hook(lambda *call: pytest.fail("the whole model ran"))
    Suffix(model, prefill, batch).logits(torch.zeros_like(batch.region, dtype=torch.float32))
