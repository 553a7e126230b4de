"""What is kept of prompts and rollouts gives the logits of the whole sequence."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab.run.sampling import Prefill, RolloutCache
from tests import tiny

PROMPTS = tiny.ids(1, 4, 7, 1)
GROUPS = [1, 0, 1, 2, 1, 0]  # which prompt each rollout starts from: uneven, and in no order


@torch.no_grad()
def last_logits(model, row):
    return model(torch.tensor([row]))[0, -1]


@torch.no_grad()
def test_each_distinct_prompt_is_read_once():
    model, read = tiny.llama(), []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape))
    prefill = Prefill(model, [PROMPTS[n] for n in GROUPS])
    assert read == [(3, 7)]
    rows = prefill.rows([PROMPTS[n] for n in GROUPS])
    assert [prefill.lengths[row].item() for row in rows] == [len(PROMPTS[n]) for n in GROUPS]
    for number, row in zip(GROUPS, rows, strict=True):
        expected = last_logits(model, PROMPTS[number])
        torch.testing.assert_close(prefill.logits[row], expected, atol=1e-5, rtol=0)


def test_what_was_not_read_or_is_empty_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        Prefill(tiny.llama(), [[1], []])
    with pytest.raises(KeyError):
        Prefill(tiny.llama(), [[1]]).rows([[2]])


@pytest.mark.parametrize("prompts", [PROMPTS, tiny.ids(2, 5, 5, 5)], ids=["ragged", "even"])
@pytest.mark.parametrize("groups", [GROUPS, [0, 0, 1, 1, 2, 2], [0, 1, 2]])
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_decoding_equals_the_whole_sequence(prompts, groups, layers):
    model = tiny.llama(num_hidden_layers=layers)
    rows = [
        prompts[n] + own for n, own in zip(groups, tiny.ids(3, *[9] * len(groups)), strict=True)
    ]
    starts = torch.tensor([len(prompts[n]) for n in groups])
    starting = [prompts[n] for n in groups]
    cache = RolloutCache(Prefill(model, starting), starting, room=9)
    left = torch.arange(len(groups))
    for step in range(9):
        if step == 3:  # some end: what is left goes on, in another order
            keep = torch.tensor([2, 0, 1][: len(groups) - 1])
            cache.select(keep)
            left = left[keep]
        token = torch.tensor([[rows[n][starts[n] + step]] for n in left])
        logits = model(token, cache=cache, positions=starts[left, None] + step)
        assert logits.shape == (len(left), 1, 64)
        for n, found in zip(left.tolist(), logits[:, 0], strict=True):
            expected = last_logits(model, rows[n][: starts[n] + step + 1])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert cache.length == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_softmax_of_a_half_precision_model_is_float32(dtype):
    model, entered = tiny.llama(dtype=dtype), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._softmax.default:
                entered.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    prefill = Prefill(model, [PROMPTS[1]] * 2)
    cache = RolloutCache(prefill, [PROMPTS[1]] * 2, room=2)
    with Record():
        logits = model(torch.tensor([[1], [2]]), cache=cache, positions=torch.tensor([[7], [7]]))
    assert logits.dtype == dtype
    assert entered == [torch.float32] * 2  # one a layer


def test_a_group_shares_its_prompts_memory():
    model = tiny.llama()
    prompts = [PROMPTS[1]] * 8
    prefill = Prefill(model, prompts)
    assert [key.shape for key in prefill.keys] == [(1, 2, 7, 8)] * 2
    cache = RolloutCache(prefill, prompts, room=3)
    assert [key.shape for key in cache.keys] == [(1, 2, 8, 3, 8)] * 2
    assert all(a is b for a, b in zip(cache.prompt_keys, prefill.keys, strict=True))


def test_prompts_without_rollouts_left_are_let_go():
    starting = [PROMPTS[n] for n in GROUPS]  # of 7, 4, 7, 1, 7 and 4 tokens
    cache = RolloutCache(Prefill(tiny.llama(), starting), starting, room=3)
    assert cache.keys[0].shape[:3] == (3, 2, 3) and cache.hidden.shape == (3, 7)
    cache.select(torch.tensor([0, 4, 3]))  # two of 7 tokens, one of 1
    assert cache.keys[0].shape[:3] == cache.values[1].shape[:3] == (2, 2, 2)
    assert cache.prompt_keys[1].shape[0] == cache.prompt_values[0].shape[0] == 2
    assert cache.hidden.isinf().sum(1).tolist() == [0, 6]
