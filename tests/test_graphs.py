"""CUDA graphs and fused functions: equal to the plain ones, which run where they cannot."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lab.run import graphs
from lab.run.graphs import Graph, fused
from lab.run.sampling import generate
from tests import tiny
from tests.recorded import Recorded

CUDA = torch.device("cuda", 0)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: none is here")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(graphs, "ENABLED", True)
    monkeypatch.setattr(graphs, "failed", False)
    graphs.said.clear()


def fail(*arguments, **options):
    raise RuntimeError("not on this card\nand more about it")


@pytest.mark.parametrize(("device", "enabled"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_a_graph_calls_its_body_without_a_gpu_and_with_eager(monkeypatch, device, enabled):
    monkeypatch.setattr(graphs, "ENABLED", enabled)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    calls = []
    graph = Graph(lambda: calls.append(len(calls)), torch.device(device))
    for _ in range(5):
        graph.replay()
    assert calls == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_so_once(monkeypatch, capsys, rank):
    if rank:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    calls = []
    for start in (0, 3):
        graph = Graph(lambda: calls.append(len(calls)), CUDA)
        graph.warm = True
        for n in range(3):
            graph.replay()
            assert calls[-1] == start + n
        assert graphs.failed and graph.eager  # and no other capture is tried
    sentence = "could not be captured as a CUDA graph, so it runs eagerly: not on this card\n"
    assert capsys.readouterr().err == ("" if rank == "1" else f"note: a step {sentence}")


def test_what_a_function_is_called_with_decides_whether_it_is_fused(monkeypatch, capsys):
    compiled = []

    def compile_(function, dynamic):
        compiled.append(dynamic)
        return lambda x, y: ("fused", *function(x, y))

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(graphs, "find_spec", lambda name: name)
    pair = fused(lambda x, y: (x, y))
    here, there = torch.ones(2), SimpleNamespace(is_cuda=True)
    assert pair(here, 1) == (here, 1)
    assert compiled == []
    assert pair(there, 1) == pair(there, 1) == ("fused", there, 1)
    assert compiled == [True]
    monkeypatch.setattr(graphs, "ENABLED", False)
    assert pair(there, 1) == (there, 1)
    monkeypatch.setattr(graphs, "ENABLED", True)
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    assert fused(lambda x: (x,))(there) == (there,)
    assert compiled == [True] and capsys.readouterr().err == ""


def test_what_cannot_be_compiled_is_not_fused(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fail)
    monkeypatch.setattr(graphs, "find_spec", lambda name: name)

    def swiglu(gate):
        return gate

    there, function = SimpleNamespace(is_cuda=True), fused(swiglu)
    assert function(there) is function(there) is there
    said = capsys.readouterr().err
    assert said == "note: swiglu could not be compiled, so it runs eagerly: not on this card\n"


def test_the_stand_in_for_a_graph_repeats_operations_and_refuses_to_wait():
    """Recorded, with which other tests check a body: a number read by Python stays."""
    x, step, steps = torch.zeros(3), torch.zeros(1, dtype=torch.int64), []

    def body():
        steps.append(0)
        x.index_copy_(0, step, (x.sum() + len(steps))[None])
        step.add_(1).remainder_(3)

    graph = Recorded(body)
    for _ in range(4):
        graph.replay()
    # 0 + 1, 1 + 2, and with the 2 that was recorded: 1 + 3 + 2, 1 + 3 + 6 + 2
    assert steps == [0, 0] and x.tolist() == [12.0, 3.0, 6.0]
    for forbidden in (x.nonzero, x.sum().item, lambda: x[x > 0], lambda: torch.tensor([1.0])):
        with pytest.raises(AssertionError):
            with Recorded(forbidden):
                forbidden()


@on_cuda
def test_a_graph_on_a_gpu_does_what_its_body_does():
    x, steps = torch.zeros((), dtype=torch.float64, device=CUDA), []

    def body():
        steps.append(0)
        x.mul_(2).add_(1)

    graph = Graph(body, CUDA)
    for _ in range(6):
        graph.replay()
    assert x.item() == 63 and len(steps) == 2 and graph.graph is not None


@on_cuda
def test_a_body_that_waits_for_the_gpu_runs_eagerly(capsys):
    x = torch.zeros((), device=CUDA)
    graph = Graph(lambda: x.add_(x.item() + 1), CUDA)
    for _ in range(4):
        graph.replay()
    assert x.item() == 15 and "runs eagerly" in capsys.readouterr().err
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samples_on_a_gpu_are_the_same_as_graphs(monkeypatch, dtype):
    model = tiny.llama(dtype=dtype).to(CUDA)
    prompts = tiny.ids(20, *([2, 5, 3, 7] * 4))
    options = {"seed": 4, "eos_ids": [3], "complete": lambda n, ids: 50 if len(ids) > 50 else None}
    sampled = generate(model, prompts, 150, **options)
    assert not graphs.failed  # or eager was compared with eager
    monkeypatch.setattr(graphs, "ENABLED", False)
    assert generate(model, prompts, 150, **options) == sampled
    if dtype == torch.float64:
        assert generate(tiny.llama(dtype=dtype), prompts, 150, **options) == sampled


@on_cuda
def test_a_fused_function_on_a_gpu_has_the_plain_ones_numbers():
    plain = lambda gate, up: F.silu(gate) * up  # noqa: E731
    swiglu = fused(plain)
    for rows in (1, 2, 7, 64):
        gate, up = torch.randn(2, rows, 24, device=CUDA, dtype=torch.float64)
        torch.testing.assert_close(swiglu(gate, up), plain(gate, up))
