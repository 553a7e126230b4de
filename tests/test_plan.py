"""A dry run: its arithmetic by hand, against what autograd keeps, and as a user types it."""

import dataclasses
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import atman
import train
from data import DATASETS, load_problems
from grpo import score_tokens, token_logprobs
from lab.run import command, memory, plan
from lab.run.cost import Cost
from lab.run.policy import Policy
from lab.run.ranks import Ranks
from lab.run.sampling import Prefill, RolloutCache
from lab.run.suffix import Suffix, lay_out_tails
from model import Llama
from tests import tiny

ROOT = Path(__file__).parent.parent
SHAPES = [
    {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "head_dim": 16},
    {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 200},
]
P, T, D, A = 40, 90, 2, 3
MEDIATION = ["--saliency", "mediation"]
MACHINE = plan.Machine("a test's machine", flops=1e12, bandwidth=1e11, start=1e-6, fused=True)
LLAMA = plan.SHAPES["meta-llama/Llama-3.2-3B"]


def planned(*arguments, world_size=None) -> plan.Plan:
    return plan.plan_run(train.parse_args([*map(str, arguments)]), world_size)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def dry_run(monkeypatch, capsys, *arguments) -> str:
    """`python train.py` with arguments, in this process: what it prints, also as it refuses."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    monkeypatch.setattr(Llama, "__init__", lambda *_, **__: pytest.fail("a model was made"))
    monkeypatch.setattr(train, "train", lambda config, resume: pytest.fail("a training run began"))
    code = ""
    try:
        train.main()
    except SystemExit as refusal:
        assert refusal.code not in (0, None)
        code = str(refusal.code)
    printed = capsys.readouterr()
    return printed.out + printed.err + code


# ------------------------------------------------------------------------------- sizes and memory


@pytest.mark.parametrize(
    ("name", "weights"),
    [("3.2-1B", 1_235_814_400), ("3.2-3B", 3_212_749_824), ("3.1-8B", 8_030_261_248)],
)
def test_published_models_have_their_published_number_of_weights(name, weights):
    assert Cost(plan.SHAPES[f"meta-llama/Llama-{name}"]).parameters == weights


@pytest.mark.parametrize("tied", [True, False])
def test_the_number_of_weights_is_the_models(tied):
    model = tiny.llama(tie_word_embeddings=tied)
    assert Cost(model.config).parameters == sum(weight.numel() for weight in model.parameters())
    body = [w for name, w in model.named_parameters() if w.dim() == 2 and name.startswith("layers")]
    assert Cost(model.config).body == sum(weight.numel() for weight in body)


def test_the_parts_of_the_3b_model_by_hand():
    kib, V = 1024, 128256
    assert Cost(LLAMA).kv_cache(1) == 224 * kib  # 2 * 28 layers * 8 heads * 128 * 4 bytes
    assert Cost(LLAMA, True).kv_cache(3) == 3 * 112 * kib
    assert Cost(LLAMA).policy_logits(2, 1024) == 3 * 2 * 1024 * V * 4
    assert Cost(LLAMA).policy_logits(1, 100) == (100 + 3072) * V * 4  # the head's gradient
    assert Cost(LLAMA).policy_logits(1, 100, 100) == (100 + 3072) * V * 4  # one chunk
    assert Cost(LLAMA).policy_logits(1, 200, 100) == (100 * 4 + 3072 * 8) * V
    assert Cost(LLAMA, True).policy_logits(1, 200, 100) == (100 * 2 + 3072 * 6) * V
    assert Cost(LLAMA, True).policy_logits(2, 1024) == 3 * 2 * 1024 * V * 4
    assert Cost(LLAMA).softmax_gradients(2, 4, 6) == 2 * 24 * 6 * 10 * 4
    assert Cost(LLAMA, True).softmax_gradients(2, 4, 6) == 2 * 24 * 6 * 10 * 10
    # Two groups: the prompts' 5 columns of each twice, 3 rows of 8 own columns.
    for half, size in ((False, 224), (True, 112)):
        columns = 2 * (2 * 5 + 3 * 8)
        assert Cost(LLAMA, half).decoding(6, 3, 5, 8) == columns * size * kib + 4 * 6 * V * 4
    assert Cost(LLAMA, True).decoding(2, 3, 5, 8) == (2 * 5 + 2 * 8) * 112 * kib + 4 * 2 * V * 4
    per_layer = 6 * 3072 + 2 + 4 * 8192 + 2 * 3072 + 2 * 1024 + 24
    assert Cost(LLAMA).policy_activations(3, 7, True) == 21 * (28 * per_layer + 3072) * 4
    inputs = Cost(LLAMA).policy_activations(3, 7, True, recompute=True)
    assert inputs == 21 * (28 * 3072 + per_layer + 3072) * 4
    assert Cost(LLAMA).autocast_weights() == 2 * (Cost(LLAMA).body + V * 3072)


@pytest.mark.parametrize(
    ("arguments", "world_size", "held"),
    [  # weights, gradients, moments, copy, assumed
        ((), 8, [11.97, 11.97, 2.99, 5.98, 2]),
        ((), 48, [11.97, 11.97, 2.94, 5.98, 2]),  # the embedding's 128256 * 3072 on one of them
        ((), 1, [11.97, 11.97, 23.94, 5.98, 2]),
        (("--no-zero",), 8, [11.97, 11.97, 23.94, 5.98, 2]),
        (("--precision", "float32"), 8, [11.97, 11.97, 2.99, 0, 2]),
    ],
)
def test_what_a_rank_of_the_3b_model_holds(arguments, world_size, held):
    run = planned("--preset", "paper", *arguments, world_size=world_size)
    found = [size / plan.GIB for size in plan.resident(run).values()]
    assert found == pytest.approx(held, abs=0.01)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_zero_deals_out_whole_tensors(ranks):
    """The fullest rank as ZeroRedundancyOptimizer fills them: largest first, to the emptiest."""
    model = tiny.llama(**SHAPES[0])
    loads = [0] * ranks
    for weight in sorted(model.parameters(), key=torch.Tensor.numel, reverse=True):
        loads[loads.index(min(loads))] += weight.numel()
    run = run_of(model, world_size=ranks)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, zero=True))
    assert plan.optimised(run) == pytest.approx(max(loads), rel=0.1)


def test_the_default_precision_is_the_runs():
    for arguments in ((), ("--precision", "float32"), ("--precision", "bfloat16")):
        run = planned(*arguments)
        for device in (torch.device("cpu"), torch.device("cuda", 0)):
            policy = Policy(tiny.llama(), Ranks(0, 1, device), 1e-3, run.config.precision)
            assert run.half(device.type) == (policy.autocast == torch.bfloat16)
        assert run.a100.half == run.half("cuda")


def kept_by_autograd(model, function) -> int:
    """Bytes of the distinct storages that autograd keeps in function(), weights apart."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [0, 30])
@pytest.mark.parametrize(("fused", "half"), [(True, False), (False, False), (True, True)])
def test_a_policy_micro_batch_keeps_what_is_counted(shape, fused, half, chunk, recompute):
    """Not fused is what CUDA does in float32, forced here."""
    model, rows = tiny.llama(**shape), 3
    prompts, completions = tiny.ids(0, *[P] * rows), tiny.ids(1, *[T] * rows)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return score_tokens(model, prompts, completions, 1.0, chunk, recompute)

    with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        kept = kept_by_autograd(model, forward)
    counted = Cost(model.config, half).policy_activations(rows, P + T, fused, recompute)
    if recompute:  # one layer is there in the backward pass alone, and without autocast's weights
        one = dataclasses.replace(model.config, num_hidden_layers=1)
        layer = Cost(one, half).policy_activations(rows, P + T, fused)
        counted -= layer - rows * (P + T) * model.config.hidden_size * 4
    elif half:
        counted += Cost(model.config).autocast_weights()
    if chunk == 0:
        counted += rows * T * model.config.vocab_size * 4  # log_softmax's output
    if recompute:  # where layers keep little: RoPE's angles, and the head's input, thrice or once
        counted += rows * (P + T) * 2 * model.config.head_dim * 4
        counted += rows * T * model.config.hidden_size * 4 * (1 if chunk else 3)
    assert counted == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("chunk", [0, 30])
@pytest.mark.parametrize("half", [False, True])
def test_logits_take_what_is_counted(half, chunk):
    """The highest of a forward and backward pass, by every tensor that PyTorch's CPU allocates."""
    shape = {"num_hidden_layers": 0, "vocab_size": 4000, "hidden_size": 16}
    model, rows, length = tiny.llama(**shape), 2, 120
    prompts, completions = tiny.ids(0, *[P] * rows), tiny.ids(1, *[length] * rows)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logprobs, _, _ = score_tokens(model, prompts, completions, 1.0, chunk)
        logprobs.sum().backward()

    counted = Cost(model.config, half).policy_logits(rows, length, chunk)
    assert counted == pytest.approx(peak_of(run), rel=0.15)


def mask_parts(rows):
    parts = [tiny.ids(seed, *[n] * rows) for seed, n in enumerate((P, T, D, A))]
    return list(zip(*parts, strict=True))


def kept_by_sampling(model, parts) -> Prefill:
    """The prompts as read, with the completions' keys and values, by reading both together."""
    prefill = Prefill(model, [prompt for prompt, *_ in parts])
    whole = Prefill(model, [sum(rollout, []) for rollout in parts])
    prefill.own_keys, prefill.own_values = (
        [x[:, :, P:].contiguous() for x in layers] for layers in (whole.keys, whole.values)
    )
    prefill.rows = {(tuple(part[0]), tuple(part[1])): n for n, part in enumerate(parts)}
    return prefill


def mask_step(model, parts):
    """One forward pass of the mask optimisation, and the mask it is for."""
    batch = atman.lay_out(parts, "cpu")
    suffix = Suffix(model, Prefill(model, batch.prompts), batch)
    mask = torch.full(batch.region.shape, -0.4, requires_grad=True)
    return mask, lambda: atman.answer_loss(suffix.logits(mask.clamp(max=0)), batch).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", [False, True])
def test_a_mask_step_keeps_what_is_counted(shape, half):
    model = tiny.llama(**shape, dtype=torch.bfloat16 if half else torch.float32)
    mask, forward = mask_step(model, mask_parts(4))
    with atman.frozen(model):
        kept = kept_by_autograd(model, forward)
    counted = Cost(model.config, half).mask_activations(4, P, T + D + A - 1, A)
    counted += 2 * 4 * (T + D + A - 1) * T * 4  # the mask on the way into the scores, and clamped
    assert counted == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("vocabulary", [200, 20_000])
def test_a_fixed_mask_holds_what_is_counted(vocabulary, half):
    """The most at a time: copies of keys and values or, with a large vocabulary, the logits."""
    shape = {**SHAPES[0], "vocab_size": vocabulary}
    model = tiny.llama(**shape, dtype=torch.bfloat16 if half else torch.float32)
    parts = mask_parts(4)

    prefill = kept_by_sampling(model, parts)

    def run():
        batch, logits = lay_out_tails(model, parts, prefill)
        return atman.reliance(model, batch, logits)

    counted = Cost(model.config, half).fixed_mask_memory(4, P, T + D + A - 1, A)
    assert counted == pytest.approx(peak_of(run), rel=0.3)


def peak_of(run) -> int:
    """The most bytes that the tensors made by run hold at a time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        kept = run()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now, peak = 0, 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        peak = max(peak, now)
    del kept
    return peak


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("rows", "group"), [(8, 4), (6, 4), (3, 4)])
def test_the_cache_of_rollouts_is_as_counted(half, rows, group):
    model = tiny.llama(**SHAPES[0], dtype=torch.bfloat16 if half else torch.float32)
    prompts = [prompt for prompt in tiny.ids(0, *[P] * 2) for _ in range(group)][:rows]
    prefill = Prefill(model, prompts)
    cache = RolloutCache(prefill, prompts, room=70)
    kept = [cache.prompt_keys, cache.prompt_values, cache.keys, cache.values]
    cache.select(torch.arange(rows))  # all are still there: the prompts' columns, once more
    kept += [cache.prompt_keys, cache.prompt_values]
    size = sum(x.nbytes for tensors in kept for x in tensors)
    logits = 4 * rows * model.config.vocab_size * 4
    assert Cost(model.config, half).decoding(rows, group, P, 70) - logits == size


def test_the_cards_that_a_run_fits_are_named():
    lines = plan.memory_lines(planned("--preset", "paper"))
    fits = [line.split()[-2:] for line in lines if line.startswith("  A100")]
    assert fits == [["fits", "fits"], ["too", "small"]]
    assert max(map(len, lines)) <= 100


def test_a_rank_holds_its_share_of_the_rollouts():
    run = planned("--preset", "paper", world_size=48)
    assert plan.loads(run, 48) == {
        "sampling": (2, 2),  # 64 rollouts on 48: two on each of the first 32
        "masks": (2, 2),
        "policy": (2, 2),
        "evaluation": (44, 44),  # 11 of 500 problems, 4 samples each
    }
    cache = plan.phases(run, 300, 1024)["sampling"]["KV cache"]
    assert cache == Cost(LLAMA, True).decoding(2, 8, 300, 1024)
    assert plan.loads(run, 64)["policy"] == (1, 1)
    assert "masks" not in plan.phases(planned("--saliency", "none"), 1, 1)
    assert plan.loads(planned("--saliency", "none"), 1)["masks"][0] == 0


@pytest.mark.parametrize(("saliency", "masks"), [("mediation", 3), ("cir", 11)])
def test_fixed_masks_are_planned_as_forward_passes(saliency, masks, monkeypatch, capsys):
    run = planned("--preset", "paper", "--saliency", saliency)
    assert plan.loads(run, 8)["masks"] == (8, 8) and plan.loads(run, 1)["masks"] == (64, 32)
    starting = dataclasses.replace(MACHINE, flops=float("inf"), bandwidth=float("inf"))
    times = plan.seconds(run, starting, 8)  # one batch of 8
    assert times["masks"] == pytest.approx(masks * 28 * plan.OPERATIONS * 1e-6)
    memory, usual = (plan.phases(p, 150, 195) for p in (run, planned("--preset", "paper")))
    kept = 8 * 1024 * 112 * 1024  # 8 completions with room for 1,024 tokens, as in the test above
    assert memory["sampling"] == usual["sampling"] | {plan.KEPT: kept}
    held = sum(memory["masks"].values())
    assert held == kept + Cost(LLAMA, True).fixed_mask_memory(8, 150, 195, 4)
    monkeypatch.setattr(plan, "this_machine", lambda *_: MACHINE)
    text = dry_run(monkeypatch, capsys, "--preset", "paper", "--dry-run", "--saliency", saliency)
    named = re.escape(f"{saliency} ({masks} fixed masks)")
    assert re.search(rf"\* saliency +{named} +mask\n", text)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("shape", SHAPES)
def test_the_arithmetic_of_fixed_masks_is_what_pytorch_counts(shape, monkeypatch):
    monkeypatch.setattr(plan, "ANSWER", A)
    model = tiny.llama(**shape)
    parts = mask_parts(1)
    prefill = kept_by_sampling(model, parts)
    with FlopCounterMode(display=False) as counter:
        batch, logits = lay_out_tails(model, parts, prefill)
        atman.reliance(model, batch, logits)
    counted = plan.flop(dataclasses.replace(run_of(model), config=train.parse_args(MEDIATION)))
    assert counted["masks"] == pytest.approx(counter.get_total_flops(), rel=0.1)


# ------------------------------------------------------------------------------ batches that fit


@pytest.mark.parametrize("saliency", ["mask", "mediation", "none"])
@pytest.mark.parametrize("gib", [39.4, 60, 79.1, 200])
@pytest.mark.parametrize("questions", [8, 9])
def test_batches_fill_the_memory_and_no_more(saliency, gib, questions):
    asked = "--saliency", saliency, "--questions", questions, "--micro-batch", 1
    config = train.parse_args([*map(str, ("--preset", "paper", *asked))])
    run = plan.plan_run(config, 4, said={"lr"})
    fitted = run.fit(gib * plan.GIB)
    assert questions * 8 % fitted.config.micro_batch == 0
    for name, (phase, most) in plan.BATCHES.items():
        if (name, saliency) == ("mask_batch", "none"):  # there is no such phase
            continue
        size = getattr(fitted.config, name)
        whole = questions * 8 if name == "micro_batch" else most
        divisors = [n for n in range(1, most + 1) if whole % n == 0]
        assert size in divisors
        assert size == 1 or plan.needs(fitted)[1][phase] <= plan.SAFE * gib * plan.GIB
        if size < divisors[-1]:
            larger = {name: divisors[divisors.index(size) + 1]}
            more = dataclasses.replace(fitted, config=dataclasses.replace(fitted.config, **larger))
            assert plan.needs(more)[1][phase] > plan.SAFE * gib * plan.GIB


def test_what_was_said_stays():
    config = train.parse_args(["--mask-batch", "3", "--eval-batch", "5"])
    run = plan.plan_run(config, said={"mask_batch", "eval_batch"}).fit(40 * plan.GIB)
    assert run.batches == "mask, micro, eval batch 3, 64, 5"
    assert planned().fit(0).config == planned().config  # by default all is said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], set()),
        (["--mask-batch", "16"], {"mask_batch"}),  # the default, but asked for
        (["--preset", "paper"], {"micro_batch"}),
    ],
)
def test_the_command_line_and_the_preset_say_batches(arguments, said):
    _, options = command.parse(train.Config, train.PRESETS, "", arguments)
    assert options.said & set(plan.BATCHES) == said


def test_a_resumed_run_keeps_its_batches(tmp_path):
    config = train.parse_args(["--out", str(tmp_path)])
    saved = dataclasses.asdict(config) | {"mask_batch": 64, "micro_batch": 64}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    resume = ["--resume", str(tmp_path)]
    config, options = command.parse(train.Config, train.PRESETS, "", resume)
    assert (config.mask_batch, config.micro_batch) == (64, 64)
    assert options.said >= set(plan.BATCHES)


def test_a_gpu_run_takes_what_is_free_and_says_so(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config, cuda = train.parse_args([]), Ranks(0, 1, torch.device("cuda", 0))
    monkeypatch.setattr(memory, "free_memory", lambda device: 5 * plan.GIB)
    fitted = memory.fit_batches(config, set(), cuda, 80)
    sizes = [getattr(fitted, name) for name in plan.BATCHES]
    assert sizes == [64, 64, 512]
    line = "5.0 GiB of GPU memory for all of it: mask, micro, eval batch 64, 64, 512\n"
    assert capsys.readouterr().out == line
    for said, device in ((set(plan.BATCHES), cuda.device), (set(), torch.device("cpu"))):
        ranks = Ranks(0, 1, device)
        assert memory.fit_batches(config, said, ranks, 80) == config
    assert capsys.readouterr().out == ""


def test_a_masked_policy_pass_is_not_fused():
    plain, blind = (planned("--preset", "paper", flag) for flag in ("--zero", "--blind-answers"))
    kept = [plan.phases(run, 150, 195)["policy"]["activations"] for run in (plain, blind)]
    assert kept == [Cost(LLAMA, True).policy_activations(2, 345, fused) for fused in (True, False)]


# ---------------------------------------------------------------------------- arithmetic and time


def run_of(model, **changes) -> plan.Plan:
    """A plan for a tiny model with this file's lengths, so that its FLOP can be counted."""
    lengths = plan.Lengths(P, T, D + A, P, "a test")
    small = ("--mask-steps", 1, "--passes", 1, "--rollouts", 4, "--questions", 4)
    run = planned("--saliency", "mask", *small)
    return dataclasses.replace(
        run, shape=model.config, lengths=lengths, completion=T + D + A, **changes
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_arithmetic_is_what_pytorch_counts(shape):
    model = tiny.llama(**shape)
    flop = plan.flop(run_of(model))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as policy:
        prompts, completions = tiny.ids(0, P), tiny.ids(1, T + D + A)
        token_logprobs(model, prompts, completions)[0].sum().backward()
    assert flop["policy"] == pytest.approx(policy.get_total_flops(), rel=0.01)
    for setting in ({"logit_chunk": 30}, {"recompute": True}):
        run = run_of(model)
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, **setting))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as saving:
            score_tokens(model, prompts, completions, **setting)[0].sum().backward()
        # What a layer ends with, down_proj, is not run again: its output is not needed.
        again = sum(layer.mlp.down_proj.weight.numel() for layer in model.layers)
        again *= 2 * (P + T + D + A) * ("recompute" in setting)
        more = saving.get_total_flops() + again - policy.get_total_flops()
        assert plan.flop(run)["policy"] - flop["policy"] == pytest.approx(more, rel=0.01)
    mask, forward = mask_step(model, mask_parts(1))
    with atman.frozen(model), FlopCounterMode(display=False) as step:
        torch.autograd.grad(forward(), mask)
    own = T + D + A - 1
    assert Cost(model.config).mask_step_flop(P, own, A) == step.get_total_flops()
    assert flop["masks"] == 2 * Cost(model.config).mask_step_flop(P, own + 1, plan.ANSWER)
    with torch.no_grad(), FlopCounterMode(display=False) as fixed:
        forward()
    assert Cost(model.config).mask_step_flop(P, own, A, False) == fixed.get_total_flops()


def test_the_arithmetic_of_the_3b_model_by_hand():
    flop = plan.flop(planned("--preset", "paper"))
    body, head = 28 * 3072 * (2 * 3072 + 2 * 1024 + 3 * 8192), 128256 * 3072
    attention = 4 * 3072 * 28 * 345 * 345
    assert flop["masks"] == 201 * Cost(LLAMA).mask_step_flop(150, 195, 4)
    # Two passes; the head once more in each, since 195 positions are two chunks.
    assert flop["policy"] == 2 * (3 * (2 * 345 * body + attention) + 4 * 2 * 195 * head)
    # The plain loop: whole sequence, all logits, weight gradients.
    plain = 201 * 3 * (2 * 345 * (body + head) + attention)
    assert 3.0 < plain / flop["masks"] < 3.3
    prefill = 2 * (150 * body + head) + 4 * 3072 * 28 * 150 * 150
    decode = 2 * 195 * (body + head) + 4 * 3072 * 28 * 195 * (150 + 97.5)
    assert flop["sampling"] == prefill / 8 + decode
    assert flop["evaluation"] == prefill / 4 + decode


def test_time_is_arithmetic_or_memory():
    run = planned("--preset", "paper")
    flop = plan.flop(run)
    fast = dataclasses.replace(MACHINE, bandwidth=float("inf"), start=0)
    times = plan.seconds(run, fast, 8)
    for phase, rollouts in (("sampling", 8), ("masks", 8), ("policy", 8), ("evaluation", 252)):
        assert times[phase] == pytest.approx(rollouts * flop[phase] / 1e12)
    assert plan.seconds(run, fast, 48)["masks"] == pytest.approx(times["masks"] / 4)
    slow = dataclasses.replace(MACHINE, flops=float("inf"), start=0)
    times = plan.seconds(run, slow, 8)
    # 390 steps: twice 195. A group of 8 reads its prompt once.
    weights, cache = 390 * 4 * 3_212_749_824, 195 * (150 + 8 * 97.5) * 224 * 1024
    assert times["sampling"] == pytest.approx((weights + cache) / 1e11)
    halved = plan.seconds(run, dataclasses.replace(slow, half=True), 8)
    assert halved["sampling"] == pytest.approx((weights + cache) / 2 / 1e11)
    for half, found in ((False, times), (True, halved)):
        kept = Cost(LLAMA, half).mask_activations(8, 150, 195, 4)
        assert found["masks"] == pytest.approx(201 * plan.TRIPS * kept / 1e11, rel=1e-3)
    still = dataclasses.replace(MACHINE, flops=float("inf"), bandwidth=float("inf"))
    times = plan.seconds(run, still, 8)
    assert times["sampling"] == pytest.approx(390 * 28 * plan.OPERATIONS * 1e-6)
    assert times["policy"] == pytest.approx(2 * 4 * 2.5 * 28 * plan.OPERATIONS * 1e-6)


def test_the_time_of_a_run_is_its_updates_and_evaluations():
    run = planned("--preset", "paper")
    whole = 2 + 46 * 100 / 500  # 500 problems before and after, 100 of them every 100 updates
    update, flop = ("sampling", "masks", "policy"), plan.flop(run)
    tests = [plan.scaled(whole * 4 * 500 * flop["evaluation"], plan.FLOPS)]
    total = 4670 * 64 * sum(flop[phase] for phase in update)
    totals = [plan.scaled(total + whole * 4 * 500 * flop["evaluation"], plan.FLOPS)]
    for machine, ranks in ((run.a100, 8), (MACHINE, 1)):
        times = plan.seconds(run, machine, ranks)
        tests.append(plan.scaled(whole * times["evaluation"], plan.TIMES))
        total = 4670 * sum(times[phase] for phase in update) + whole * times["evaluation"]
        totals.append(plan.scaled(total, plan.TIMES))
    lines = [" ".join(line.split()) for line in plan.time_lines(run, MACHINE)]
    assert " ".join(["48 evaluations", *tests]) in lines
    assert " ".join(["the run", *totals]) in lines
    seldom = planned("--eval-every", 0)
    assert any("2 evaluations" in line for line in plan.time_lines(seldom, MACHINE))
    assert planned("--max-new-tokens", 10).completion == 10


# Steps of the 3B shape in bfloat16, with 150 prompt and 195 own tokens, as one H100 took them (one
# whose processor launches a kernel in 25 us, torch 2.11): eager, and as CUDA graphs with fused work
# (masks in batches of 4 and decoding: not fused). Its rates as A100's are assumed. A batch of 256
# is left out, whose trial read each row's own copy of the prompt.
H100 = plan.Machine("an H100", 0.6 * 989e12, 0.8 * 3.35e12, 25e-6, fused=True, half=True)


@pytest.mark.parametrize(
    ("phase", "batch", "graphs", "measured"),
    [
        ("masks", 1, False, 118.6),
        ("masks", 4, False, 122),
        ("masks", 8, False, 127),
        ("masks", 1, True, 14.2),
        ("masks", 4, True, 38.4),
        ("masks", 8, True, 47.8),
        ("masks", 16, True, 111.4),
        ("sampling", 8, False, 46.7),
        ("sampling", 64, False, 45.9),
        ("sampling", 8, True, 5.8),
        ("sampling", 64, True, 7.1),
        ("policy", 4, False, 810 / 4),  # of 16 rollouts and a pass; no step of it is in a graph
        ("policy", 4, True, 810 / 4),
    ],
)
def test_a_step_takes_what_an_h100_took(phase, batch, graphs, measured):
    """Within 25%, in ms."""
    questions = max(8, batch) // 8 if phase == "sampling" else 8
    batches = "--mask-batch", batch, "--micro-batch", 4, "--max-new-tokens", 195
    run = planned("--preset", "paper", "--questions", questions, *batches)
    took = plan.seconds(run, dataclasses.replace(H100, graphs=graphs), 1)[phase]
    steps = {"masks": 201 * 64 / batch, "sampling": 195, "policy": 2 * 64 / batch}
    assert 1000 * took / steps[phase] == pytest.approx(measured, rel=0.25)


def test_memory_is_what_an_h100_held():
    """Its peaks without CUDA's own, in GiB, within 5%.

    Sampling (64 rollouts) and masks (8) of a first update, before there are gradients and moments;
    the policy pass without the copy: what was measured has no room for it (with it: 8% too much).
    """
    run = planned("--preset", "paper", "--mask-batch", 8, "--max-new-tokens", 196, world_size=1)
    weights, gradients, moments, copy, _ = plan.resident(run).values()
    sums = {name: sum(parts.values()) for name, parts in plan.phases(run, 150, 195).items()}
    held = {"sampling": weights + copy, "masks": weights + copy}
    held["policy"] = weights + gradients + moments
    found = {name: (held[name] + sums[name]) / plan.GIB for name in held}
    assert found == pytest.approx({"sampling": 19.9, "masks": 22.7, "policy": 60.3}, rel=0.05)


def test_launches_count_where_no_graph_runs():
    eager, graphs = (planned("--preset", "paper", flag) for flag in ("--eager", "--no-eager"))
    assert (eager.a100.graphs, graphs.a100.graphs) == (False, True)
    slow, quick = (plan.seconds(run, run.a100, 8) for run in (eager, graphs))
    layer = plan.OPERATIONS * 28 * (5e-6 - 2e-6)
    assert slow["masks"] - quick["masks"] == pytest.approx(201 * 2.5 * layer)
    assert slow["sampling"] - quick["sampling"] == pytest.approx(390 * layer)
    assert slow["policy"] == quick["policy"]
    fixed = [
        planned("--preset", "paper", "--saliency", "cir", e) for e in ("--eager", "--no-eager")
    ]
    assert len({plan.seconds(run, run.a100, 8)["masks"] for run in fixed}) == 1


def test_numbers_come_in_units_that_fit():
    assert plan.scaled(246e18, plan.FLOPS) == "246 EFLOP"
    assert plan.scaled(1.2e6, plan.FLOPS) == "0.0012 GFLOP"
    assert plan.scaled(90, plan.TIMES) == "1.5 min"
    assert plan.scaled(2_000_000 * 365 * 86400, plan.TIMES) == "2,000,000 years"


# ---------------------------------------------------------------------------------- as a user does


def test_the_paper_preset_is_the_papers_but_for_the_gpus():
    values = plan.hyperparameters(planned("--preset", "paper"))
    assert set(plan.PAPER) <= set(values)
    differing = [name for name in plan.PAPER if values[name] != plan.PAPER[name]]
    assert differing == ["saliency_sign", "world_size"]
    revision = planned("--preset", "paper", "--model", plan.PAPER["model"] + "@main")
    assert plan.hyperparameters(revision)["model"] == plan.PAPER["model"]
    # Every setting is in the table, or is none.
    names = {entry.name for entry in dataclasses.fields(train.Config)}
    assert names - set(values) <= plan.NO_HYPERPARAMETER


def test_adamw_is_as_the_table_says(monkeypatch, tmp_path):
    """train.py and atman.py leave these to PyTorch: read off the optimisers that they make."""
    made = []

    class Seen(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self.defaults)
            if len(made) == 1:
                raise ValueError("seen")

    monkeypatch.setattr(torch.optim, "AdamW", Seen)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="seen"):
        train.train(train.parse_args(["--device", "cpu", "--out", str(tmp_path / "run")]))
    batch = atman.lay_out([tiny.ids(0, 4, 4, 4, 4)], "cpu")
    atman.optimize_masks(tiny.llama(), batch, atman.MaskConfig(steps=1))
    values = plan.hyperparameters(planned("--preset", "paper"))
    policy, mask = made
    for name in ("betas", "eps", "weight_decay"):
        assert values[f"policy_{name}"] == policy[name] and values[f"mask_{name}"] == mask[name]
    # The micro preset's masks remember otherwise, and its table says so.
    assert plan.hyperparameters(planned("--preset", "micro"))["mask_betas"] != mask["betas"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_has_lengths_and_numbers_of_questions(dataset):
    assert dataset in plan.LENGTHS
    assert set(DATASETS[dataset].splits.values()) <= set(plan.QUESTIONS[dataset])


def test_worked_examples_make_prompts_longer():
    bare, two = planned("--preset", "paper"), planned("--preset", "paper", "--shots", "2")
    example = 150 + 190 + 5  # as long as a rollout
    assert (bare.lengths.prompt, two.lengths.prompt) == (150, 150 + 2 * example)
    assert two.lengths.longest_prompt == bare.lengths.longest_prompt + 2 * example
    assert "assumed, with 2 examples" in two.lengths.source
    assert two.completion == bare.completion


def test_questions_are_counted(tmp_path):
    assert planned("--dataset", "mmlu", "--train-split", "val").questions == 1531
    for split, size in plan.QUESTIONS["micro"].items():
        assert len(load_problems("micro", split)) == size
    line = '{"question": "How much is 1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n'
    (tmp_path / "train.jsonl").write_text(line * 20)
    (tmp_path / "test.jsonl").write_text(line * 3)
    run = planned("--preset", "paper", "--data-dir", tmp_path)
    assert (run.questions, run.heldout, run.updates) == (20, 3, 10)  # 5 epochs of 2 updates


def test_a_dry_run_of_the_paper_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "this_machine", lambda *_: MACHINE)
    monkeypatch.chdir(tmp_path)
    text = dry_run(monkeypatch, capsys, "--preset", "paper", "--dry-run")
    assert not list(tmp_path.iterdir())  # no run's folder
    assert "3,212,749,824 weights, world size 8" in text
    assert "7,473 questions, 4,670 updates of 8 questions x 8 rollouts: 298,880 rollouts" in text
    assert "about 58,281,600, at most 306,053,120" in text
    marked = [line.split()[1] for line in text.splitlines() if line.startswith("* ")]
    assert marked == ["saliency_sign", "world_size", "differs"]
    assert "48 evaluations" in text  # before, after, and 46 in between
    assert max(map(len, text.splitlines())) <= 100


def test_a_dry_run_of_the_default(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = dry_run(monkeypatch, capsys, "--dry-run", "--device", "cpu")
    assert "data/micro, 889,984 weights, world size 1" in text
    assert "10,000 questions, 30 updates" in text and "4 evaluations" in text
    assert max(map(len, text.splitlines())) <= 100
    timed = re.search(r"CPU threads, (\S+) GFLOP/s, (\S+) GB/s, just timed", text)
    assert all(0 < float(rate.replace(",", "")) < 1e6 for rate in timed.groups())


def test_one_rank_prints_and_torchrun_says_how_many_there_are(monkeypatch, capsys):
    monkeypatch.setattr(plan, "this_machine", lambda *_: MACHINE)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "world size 2" in dry_run(monkeypatch, capsys, "--dry-run")
    assert "world size 5" in dry_run(monkeypatch, capsys, "--dry-run", "--world-size", 5)
    monkeypatch.setenv("RANK", "1")
    assert dry_run(monkeypatch, capsys, "--dry-run") == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry-run", "--world-size", 0], "--world-size 0: must be at least 1"),
        (["--world-size", 8], "--world-size plans, with --dry-run"),
        (["--dry-run", "--model", "someone/else"], "--model someone/else: --dry-run knows"),
        (["--dry-run", "--questions", 20_000], "there are 10000 to train on"),
        (["--dry-run", "--data-dir", "."], "--data-dir: the micro tasks have no files"),
    ],
)
def test_bad_input_ends_with_a_sentence(arguments, says, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = dry_run(monkeypatch, capsys, *arguments)
    assert says in text and "Traceback" not in text
