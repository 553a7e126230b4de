"""What a run would take, by arithmetic: nothing is loaded, downloaded or created.

    python train.py --preset paper --dry-run                     # planned for 8 GPUs
    python train.py --preset paper --dry-run --world-size 48     # as many as the paper's

Memory counts the tensors that model.py, atman.py, grpo.py and cache.py keep. Weights, gradients and
AdamW's moments are float32 always, the moments a rank's share of them with --zero. `half` is
--precision bfloat16, the default on a GPU: a bfloat16 copy of the weights samples and learns masks,
and the policy pass runs under autocast. Time is FLOP over a rate and bytes over a bandwidth.

h hidden, q = heads * head_dim, kv = kv_heads * head_dim, I intermediate, V vocabulary, L layers;
P prompt, C completion, S = P + C tokens; rows are rollouts at a time. Sizes are in bytes.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from data import DATASETS, load_problems
from model import LlamaConfig

FLOAT, BFLOAT = 4, 2  # bytes
GIB = 2**30

# What the paper says, in section 3.4 where no other is named; it is silent on the rest.
PAPER = dict(
    model="meta-llama/Llama-3.2-3B-Instruct", dataset="gsm8k", saliency="mask",  # 4
    mask_steps=200, mask_lr=1e-3, mask_betas=(0.6, 0.9999), mask_weight_decay=0.05,
    mask_init=-0.4, mask_upper_bound=0.0, mask_scale=10.0,  # init: 3.2
    saliency_weight=1.0, ratio="sequence", gate_saliency=False,  # 3.3
    saliency_sign="literal",  # Eq. 3 as printed; its text asks for restored
    questions=8, rollouts=8, max_new_tokens=1024, passes=2, micro_batch=2,
    lr=8e-7, clip_eps=0.2, epochs=5, world_size=48, eval_problems=500, eval_samples=4,  # eval: 4
)  # fmt: skip
NO_HYPERPARAMETER = {"preset", "data_dir", "out", "device", "spacy_model"}

# The published config.json files; the base models and -Instruct have the same.
SHAPES = {
    "meta-llama/Llama-3.2-1B": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64),
    "meta-llama/Llama-3.2-3B": LlamaConfig(128256, 3072, 8192, 28, 24, 8, 128),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        128256, 4096, 14336, 32, 32, 8, 128, tie_word_embeddings=False
    ),
}
# Problems of each split as published; micro: as data.micro_task.load makes them by default.
QUESTIONS = {
    "micro": {"train": 10_000, "heldout": 1000, "hard": 1000},
    "gsm8k": {"train": 7473, "test": 1319},
    "mmlu": {"auxiliary": 99_842, "dev": 285, "val": 1531, "test": 14_042},
}


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a rollout; answer includes delimiter and end token, prompts their template."""

    prompt: int
    reasoning: int
    answer: int
    longest_prompt: int
    source: str


LENGTHS = {
    "micro": Lengths(61, 64, 4, 110, "measured on data/micro"),
    "gsm8k": Lengths(150, 190, 5, 300, "assumed for Llama 3.2"),  # Table 1: 188 per trace
    "mmlu": Lengths(250, 200, 5, 1200, "assumed, not measured"),
}
LONGEST = 2.0  # a batch's longest completion over the mean: 1.8 to 2.9 on data/micro


@dataclass(frozen=True)
class Machine:
    """Rates that are reached, not peaks."""

    name: str
    flops: float  # products in the precision of the forward passes, FLOP/s
    bandwidth: float  # memory, bytes/s
    start: float  # until an operation runs, s
    fused: bool  # is attention without a mask one fused kernel (see policy_activations)
    half: bool = False  # are the forward passes in bfloat16


# NVIDIA's data sheet: 312 TFLOP/s in bfloat16, 19.5 in float32 (PyTorch leaves TF32 off), 2.04
# TB/s. What part of them is reached is assumed.
A100 = {
    half: Machine(
        f"assumed 60% of {tera} TFLOP/s in {name}, 80% of 2.04 TB/s, 5 us to start an operation",
        0.6 * tera * 1e12, 0.8 * 2.04e12, 5e-6, fused=half, half=half,
    )
    for half, tera, name in ((False, 19.5, "float32"), (True, 312, "bfloat16"))
}  # fmt: skip
CARDS = {"A100-80GB": 79.1, "A100-40GB": 39.4}  # GiB that PyTorch sees of them
OVERHEAD = 2 * GIB  # CUDA's context, NCCL's buffers, what the allocator cannot use: assumed
# Counted on the 3B shape: 42 kernels among 90 calls in a mask step, 47 among 98 in a policy pass
OPERATIONS = 60  # kernels and views in a layer's forward, about
ANSWER = 4  # tokens of a gold answer, about: rows that the head runs on in a mask step
# Counted on the 3B shape: about 16 in a mask step, 11 in a policy pass
TRIPS = 12  # times that what autograd keeps passes through memory, temporaries included, about
CAST = "the matrices in bfloat16, of autocast"  # whatever the batch
BATCHES = {"masks": "mask-batch", "policy": "micro-batch", "evaluation": "eval-batch"}  # flags


# ---------------------------------------------------------------------------------- sizes, in bytes


def widths(shape: LlamaConfig) -> tuple[int, int, int, int]:
    """h, q, kv, I."""
    q, kv = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    return shape.hidden_size, q, kv, shape.intermediate_size


def body_weights(shape: LlamaConfig) -> int:
    """Number of weights in the layers' matrices: L (2 h q + 2 h kv + 3 h I)."""
    h, q, kv, inner = widths(shape)
    return shape.num_hidden_layers * h * (2 * q + 2 * kv + 3 * inner)


def parameters(shape: LlamaConfig) -> int:
    """Number of all weights: the layers', V h once or (untied head) twice, 2 L + 1 norms of h."""
    tables = shape.vocab_size * (1 if shape.tie_word_embeddings else 2)
    return body_weights(shape) + (tables + 2 * shape.num_hidden_layers + 1) * shape.hidden_size


def kv_cache(shape: LlamaConfig, columns: int, half: bool) -> int:
    """Keys and values of all layers: 2 L kv per column."""
    return columns * 2 * shape.num_hidden_layers * widths(shape)[2] * (BFLOAT if half else FLOAT)


def policy_activations(
    shape: LlamaConfig, rows: int, length: int, fused: bool, half: bool, recompute: bool = False
) -> int:
    """What autograd keeps of a policy micro-batch's layers.

    Per token and layer, in float32: 4 h (each norm's input and normalised input) and 2 factors of
    norms. In float32, or bfloat16 if half: the norms' outputs, 2 h, which autocast makes anew for
    each matrix that reads them, 5 h; 4 I (gate, silu(gate), up, their product); and attention.
    Fused: q, k, v, output, and a log-sum-exp per head in float32. Not fused: q, k, v, output, all q
    wide, since keys are repeated for the query heads, and heads * S weights. So it is on CUDA in
    float32: no fused kernel there takes grouped queries.
    recompute: each layer's input, h, and what one layer keeps, since it is run again.
    """
    h, q, kv, inner = widths(shape)
    layers, heads = shape.num_hidden_layers, shape.num_attention_heads
    attention = 2 * q + 2 * kv if fused else 4 * q + heads * length
    narrow = ((5 if half else 2) * h + 4 * inner + attention) * (BFLOAT if half else FLOAT)
    layer = narrow + (4 * h + 2 + (heads if fused else 0)) * FLOAT
    kept = layers * h * FLOAT + layer if recompute else layers * layer
    return rows * length * (kept + h * FLOAT)


def autocast_weights(shape: LlamaConfig) -> int:
    """Autocast's bfloat16 of every matrix, made once a micro-batch and kept by autograd.

    With recompute they go before the backward pass, whose layer is then counted too much.
    """
    return (body_weights(shape) + shape.vocab_size * shape.hidden_size) * BFLOAT


def policy_logits(
    shape: LlamaConfig, rows: int, completion: int, half: bool, chunk: int = 0
) -> int:
    """In float32 at a time: log_softmax's output, and two more for the entropy or in the backward.

    3 n V, n positions at a time. Or, where that is more, the logits' gradient, n V, and the head's,
    V h, before it is accumulated: 4 bytes, with chunks 8 (their sum and the next one's); half: in
    bfloat16 and then in float32, 6.
    """
    logits = rows * min(completion, chunk or completion) * shape.vocab_size
    head = shape.vocab_size * shape.hidden_size
    chunked = 0 < chunk < completion
    gradient = 6 if half else 8 if chunked else 4
    return max(3 * logits * FLOAT, logits * (BFLOAT if half else FLOAT) + head * gradient)


def mask_activations(
    shape: LlamaConfig, rows: int, prompt: int, own: int, answer: int, half: bool
) -> int:
    """What autograd keeps of a mask step (suffix.py), whose weights are frozen.

    K = prompt + own columns. Every layer: keys and values of all K. On all own rows but the last
    layer's, and on answer rows there: q, heads * K attention weights, h and 2 factors (the second
    norm), 3 I (gate, silu(gate), up); from the second layer on h and 2 factors for the first norm,
    on all own rows. Last norm and logits: 2 h and 3 V per answer row. Norms and logits are float32,
    the rest is bfloat16 if half.
    """
    h, q, kv, inner = widths(shape)
    layers, columns = shape.num_hidden_layers, prompt + own
    block_rows = (layers - 1) * own + answer
    narrow = layers * 2 * kv * columns
    narrow += block_rows * (q + shape.num_attention_heads * columns + 3 * inner)
    wide = ((layers - 1) * own + block_rows) * (h + 2) + answer * (2 * h + 3 * shape.vocab_size)
    return int(rows * (narrow * (BFLOAT if half else FLOAT) + wide * FLOAT))


def softmax_gradients(shape: LlamaConfig, rows: int, prompt: int, own: int, half: bool) -> int:
    """In the backward of a layer's attention, the scores' gradient: heads * own * K.

    In float32; half: also the weights in float32, and the gradient in bfloat16.
    """
    size = 2 * FLOAT + BFLOAT if half else FLOAT
    return rows * shape.num_attention_heads * own * (prompt + own) * size


def mask_step_flop(shape: LlamaConfig, prompt: int, own: int, answer: int) -> float:
    """Matrix products of a mask step, forward and backward through activations, per rollout.

    Layer 0's projections of q, k and v are constants, and its attention ends the backward pass; the
    last layer needs k and v of all own rows, the rest of it and the head only answer rows.
    """
    h, q, kv, inner = widths(shape)
    layers, columns = shape.num_hidden_layers, prompt + own
    rest = 2 * h * q + 3 * h * inner  # weights of q and o projections and MLP

    def products(rows):  # attention: 2 forward, 2 back over all columns, 2 over own ones
        return 2 * rows * q * (4 * columns + 2 * own)

    first = 4 * own * (rest - h * q) + 2 * own * q * 3 * columns
    middle = 4 * own * (2 * h * kv + rest) + products(own)
    last = 4 * own * 2 * h * kv + 4 * answer * rest + products(answer)
    return first + (layers - 2) * middle + last + 4 * answer * h * shape.vocab_size


def decoding(shape: LlamaConfig, rows: int, group: int, prompt: int, room: int, half: bool) -> int:
    """The cache (cache.py), and 4 V per row in float32 to choose a token.

    Prompts' columns once a group of rows, twice when finished rows have been dropped; own columns
    for the longest completion allowed, from the start.
    """
    groups, places = -(-rows // group), min(rows, group)
    columns = groups * (2 * prompt + places * room)
    return kv_cache(shape, columns, half) + 4 * rows * shape.vocab_size * FLOAT


# ------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """A run: train.Config and what follows from it."""

    config: Any
    shape: LlamaConfig
    lengths: Lengths
    world_size: int
    questions: int  # to train on
    heldout: int  # to evaluate on
    updates: int
    rollouts: int  # of an update, over all ranks
    completion: int  # mean tokens

    def half(self, kind: str = "cuda") -> bool:
        """Is the precision of the forward passes bfloat16, on a device of this kind?"""
        return (self.config.precision or ("bfloat16" if kind == "cuda" else "float32")) != "float32"

    def a100(self) -> Machine:
        return A100[self.half()]


def plan_run(config, world_size: int | None = None) -> Plan:
    """What a train.Config asks for. Raises ValueError: unknown shape, or too few questions.

    world_size: default torchrun's, else 8 for the paper preset, 1 for others.
    """
    world_size = world_size or int(os.environ.get("WORLD_SIZE", 0))
    world_size = world_size or (8 if config.preset == "paper" else 1)
    shape = SHAPES.get(without_revision(config.model).removesuffix("-Instruct"))
    if Path(config.model).is_dir():
        shape = LlamaConfig.from_directory(Path(config.model))
    if shape is None:
        raise ValueError(
            f"--model {config.model}: --dry-run knows the shapes of {', '.join(SHAPES)} (and their "
            "-Instruct) and reads any other from a checkpoint directory; give one"
        )
    questions, heldout = (count(config, split) for split in (config.train_split, "heldout"))
    if questions < config.questions:
        raise ValueError(f"--questions {config.questions}: there are {questions} to train on")
    lengths, updates = LENGTHS[config.dataset], config.steps
    if config.epochs is not None:
        updates = config.epochs * (questions // config.questions)
    completion = min(lengths.reasoning + lengths.answer, config.max_new_tokens)
    heldout, rollouts = min(heldout, config.eval_problems), config.questions * config.rollouts
    return Plan(
        config, shape, lengths, world_size, questions, heldout, updates, rollouts, completion
    )


def without_revision(model: str) -> str:
    """OWNER/NAME of OWNER/NAME@REVISION; a directory's name as it is."""
    return model if Path(model).is_dir() else model.partition("@")[0]


def count(config, split: str) -> int:
    """Problems of a split: those in --data-dir, counted, or as many as are published."""
    if config.data_dir is not None:
        return len(load_problems(config.dataset, split, config.data_dir))
    return QUESTIONS[config.dataset][DATASETS[config.dataset].splits[split]]


def shares(plan: Plan, world_size: int) -> dict[str, tuple[int, int]]:
    """By phase: rollouts of a rank with a full share, and how many of them at a time."""
    config, share = plan.config, -(-plan.rollouts // world_size)
    samples = -(-plan.heldout // world_size) * config.eval_samples
    return {
        "sampling": (share, share),
        "masks": (share if config.learns_masks else 0, min(config.mask_batch, share)),
        "policy": (share, min(config.micro_batch, share)),
        "evaluation": (samples, min(config.eval_batch, samples)),
    }


def resident(plan: Plan) -> dict[str, int]:
    """What a rank holds all the time, in bytes.

    DDP's buckets are the gradients themselves, and stay; a single process has none while it samples
    and learns masks, which is not subtracted here.
    """
    weights = parameters(plan.shape)
    whole = " (ZeRO-1)" if sharded(plan) else ""
    copied = "bfloat16" if plan.half() else "none, they read the weights"
    return {
        "weights": weights * FLOAT,
        "gradients": weights * FLOAT,
        f"optimiser: AdamW's two moments{whole}": 2 * optimised(plan) * FLOAT,
        f"copy for sampling and masks: {copied}": weights * BFLOAT if plan.half() else 0,
        "CUDA, NCCL, allocator: assumed": OVERHEAD,
    }


def sharded(plan: Plan) -> bool:
    return plan.config.zero and plan.world_size > 1


def optimised(plan: Plan) -> int:
    """Weights whose moments the fullest rank holds: ZeRO-1 deals out whole tensors, largest first.

    So it is the even share, or the largest tensor, the embedding's V h, where that is more.
    """
    shape, weights = plan.shape, parameters(plan.shape)
    largest = max(shape.vocab_size, shape.intermediate_size) * shape.hidden_size
    return max(-(-weights // plan.world_size), largest) if sharded(plan) else weights


def phases(plan: Plan, prompt: int, completion: int) -> dict[str, dict[str, int]]:
    """Bytes on top of `resident` by phase and part; the phases follow each other."""
    config, shape, half, length = plan.config, plan.shape, plan.half(), prompt + completion
    n = {phase: batch for phase, (total, batch) in shares(plan, plan.world_size).items() if total}
    room = config.max_new_tokens
    cache = decoding(shape, n["sampling"], config.rollouts, prompt, room, half)
    found = {"sampling": {"KV cache": cache}}
    if "masks" in n:
        found["masks"] = {
            "activations": mask_activations(shape, n["masks"], prompt, completion, ANSWER, half),
            "a softmax's gradients": softmax_gradients(shape, n["masks"], prompt, completion, half),
        }
    rows, fused = n["policy"], plan.a100().fused
    found["policy"] = {
        "activations": policy_activations(shape, rows, length, fused, half, config.recompute),
        "logits": policy_logits(shape, rows, completion, half, config.logit_chunk),
    }
    if half:
        found["policy"][CAST] = autocast_weights(shape)
    cache = decoding(shape, n["evaluation"], config.eval_samples, prompt, room, half)
    found["evaluation"] = {"KV cache": cache}
    found["optimiser"] = {"AdamW's temporary": optimised(plan) * FLOAT}
    return found


def flop(plan: Plan) -> dict[str, float]:
    """Arithmetic at mean lengths by phase, per rollout; evaluation: per sample.

    Forward: 2 per weight and token, the head on its rows only; attention 4 q S per token and layer.
    Masks: steps + 1 times mask_step_flop. Policy: passes times 3 forwards, a fourth of the layers
    with recompute and of the head with logit_chunk. Sampling reads a prompt once for its group.
    """
    config, shape, P, C = plan.config, plan.shape, plan.lengths.prompt, plan.completion

    def matrices(tokens, head_rows):
        head = shape.vocab_size * shape.hidden_size
        return 2 * (body_weights(shape) * tokens + head * head_rows)

    def attention(tokens, context):
        return 4 * widths(shape)[1] * shape.num_hidden_layers * tokens * context

    prefill, decode = matrices(P, 1) + attention(P, P), matrices(C, C) + attention(C, P + C / 2)
    layers, head = matrices(P + C, 0) + attention(P + C, P + C), matrices(0, C)
    chunked = 0 < config.logit_chunk < C
    return {
        "sampling": prefill / config.rollouts + decode,
        "masks": (config.mask_steps + 1) * mask_step_flop(shape, P, C, ANSWER),
        "policy": config.passes * ((3 + config.recompute) * layers + (3 + chunked) * head),
        "evaluation": prefill / config.eval_samples + decode,
    }


def seconds(plan: Plan, machine: Machine, world_size: int) -> dict[str, float]:
    """Time of an update's phases on a rank with a full share, at mean lengths; of an evaluation.

    Decoding: the larger of arithmetic and memory (a step reads all weights, a token its cache).
    Else arithmetic, and TRIPS of what autograd keeps through memory. Both: starting OPERATIONS per
    layer, in a backward 1.5 times as many.
    """
    config, shape, P, C = plan.config, plan.shape, plan.lengths.prompt, plan.completion
    half, repeats = machine.half, {"masks": config.mask_steps + 1, "policy": config.passes}
    kept = {
        "masks": mask_activations(shape, 1, P, C, ANSWER, half),
        "policy": policy_activations(shape, 1, P + C, machine.fused, half)
        + policy_logits(shape, 1, C, half),
    }
    groups = {"sampling": config.rollouts, "evaluation": config.eval_samples}
    start = OPERATIONS * shape.num_hidden_layers * machine.start
    found = {}
    for phase, (total, batch) in shares(plan, world_size).items():
        arithmetic, batches = total * flop(plan)[phase] / machine.flops, -(-total // batch)
        if phase in repeats:
            trips = TRIPS * total * repeats[phase] * kept[phase] / machine.bandwidth
            found[phase] = arithmetic + trips + batches * repeats[phase] * 2.5 * start
        else:
            steps = batches * min(LONGEST * C, config.max_new_tokens)
            moved = steps * parameters(shape) * (BFLOAT if half else FLOAT)
            columns = C * total * (P / min(groups[phase], batch) + C / 2)  # a group's prompt: once
            moved += columns * kv_cache(shape, 1, half)
            found[phase] = max(arithmetic, moved / machine.bandwidth) + steps * start
    return found


def measured(plan: Plan, device: torch.device) -> Machine:
    """The machine at hand, one process: times a product, memory and a tiny operation (0.5 s)."""
    h, _, _, inner = widths(plan.shape)
    tokens = plan.config.micro_batch * (plan.lengths.prompt + plan.completion)
    tokens = max(1, min(tokens, int(4e9) // (2 * h * inner)))  # a large model's must end soon too
    half = plan.half(device.type)
    dtype = torch.bfloat16 if half else torch.float32
    x, weight = (torch.rand(n, device=device, dtype=dtype) for n in ((tokens, h), (h, inner)))
    one, two, out = torch.rand(3, 2**24, device=device)  # 64 MiB each: beyond caches
    tiny, threads = torch.rand(4, 4, device=device), torch.get_num_threads()

    def clock(line: str, **names) -> float:
        timer = Timer(line, globals={"torch": torch} | names, num_threads=threads)
        return min(timer.blocked_autorange(min_run_time=0.15).times)  # others may be at work

    flops = 2 * tokens * h * inner / clock("x @ weight", x=x, weight=weight)
    moved = 3 * out.numel() * FLOAT
    bandwidth = moved / clock("torch.mul(one, two, out=out)", one=one, two=two, out=out)
    where = f"{threads} CPU threads" if device.type == "cpu" else str(device)
    where += ", bfloat16" if half else ""
    rates = f"{flops / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.0f} GB/s, just timed"
    start, fused = clock("tiny * tiny", tiny=tiny), device.type == "cpu" or half
    return Machine(f"one process, {where}, {rates}", flops, bandwidth, start, fused, half)


# ------------------------------------------------------------------------------------ the report


def report(plan: Plan, here: Machine) -> str:
    """What `train.py --dry-run` prints, at most 100 columns wide."""
    config, lengths, rollouts = plan.config, plan.lengths, plan.updates * plan.rollouts
    lines = [
        f"A dry run: nothing is loaded. {config.model}, {parameters(plan.shape):,} weights, "
        f"world size {plan.world_size}",
        f"\n  {'setting':<24}{'this run':<36}paper",
    ]
    for name, value in settings(plan).items():
        said = PAPER.get(name, "-")
        mark = "*" if said not in ("-", value) else " "
        lines.append(f"{mark} {name:<24}{shown(value):<36}{shown(said)}")
    lines += [
        "* differs (Eq. 3 prints the sign literal, its text asks for restored); "
        "- the paper does not say",
        f"\n{plan.questions:,} questions, {plan.updates:,} updates of {config.questions} questions "
        f"x {config.rollouts} rollouts: {rollouts:,} rollouts",
        f"tokens to sample: about {rollouts * plan.completion:,}, at most "
        f"{rollouts * config.max_new_tokens:,}",
        f"mean tokens: prompt {lengths.prompt}, reasoning {lengths.reasoning}, answer with its "
        f"delimiter {lengths.answer} ({lengths.source})",
        f"longest: prompt {lengths.longest_prompt}, completion {config.max_new_tokens}; a batch is "
        "padded to its longest rollout",
    ]
    return "\n".join([*lines, "", *memory_lines(plan), "", *time_lines(plan, here)])


def settings(plan: Plan) -> dict[str, Any]:
    """Every hyperparameter of the run under the names of PAPER."""
    config, mask = plan.config, dataclasses.asdict(plan.config.mask())
    values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    values |= {f"mask_{key}": value for key, value in mask.items()}
    values["mask_upper_bound"] = 0.0  # atman.optimize_masks clamps there
    values |= {"mask_eps": 1e-8, "policy_betas": (0.9, 0.999), "policy_eps": 1e-8}  # AdamW's own
    values |= {"policy_weight_decay": 0.0, "gradient_clipping": "none"}  # train.py
    values["model"] = without_revision(config.model)  # the title has all of it
    values |= {"steps": plan.updates, "world_size": plan.world_size}
    values["precision"] = config.precision or "bfloat16 on cuda, float32 on cpu"
    return {name: value for name, value in values.items() if name not in NO_HYPERPARAMETER}


def shown(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def memory_lines(plan: Plan) -> list[str]:
    """Parts, phases and peak at mean lengths and at the longest, and the batches that would fit."""
    held = resident(plan)
    mean = phases(plan, plan.lengths.prompt, plan.completion)
    longest = phases(plan, plan.lengths.longest_prompt, plan.config.max_new_tokens)
    batches = {phase: batch for phase, (_, batch) in shares(plan, plan.world_size).items()}
    total = sum(held.values())
    peaks = [total + max(sum(p.values()) for p in case.values()) for case in (mean, longest)]

    def row(label, *cells):
        cells = [f"{cell / GIB:.2f}" if isinstance(cell, int) else cell for cell in cells]
        return f"{label:<64}" + "".join(f"{cell:>12}" for cell in cells)

    lines = [row("memory of a GPU in GiB", "mean", "longest")]
    lines += [row(f"  {part}", size, size) for part, size in held.items()]
    for phase, parts in mean.items():
        for part, size in parts.items():
            several = f", {batches[phase]} rollouts" if phase in batches and part != CAST else ""
            lines.append(row(f"  in {phase}: {part}{several}", size, longest[phase][part]))
    lines.append(row("  peak: the largest phase on top of what is always there", *peaks))
    for card, usable in CARDS.items():
        fits = ["fits" if peak <= usable * GIB else "too small" for peak in peaks]
        lines.append(row(f"  {card}, {usable} GiB usable", *fits))
        least = total + sum(longest["optimiser"].values())  # whatever the batches
        if least > usable * GIB:
            needs = f"weights, gradients and AdamW alone need {least / GIB:.1f} GiB"
            lines.append(f"    {needs} on each GPU: a smaller model or a larger card")
            continue
        for phase, flag in BATCHES.items():
            needed, room = sum(longest.get(phase, {}).values()), usable * GIB - total
            if needed > room > 0:
                most = largest_batch(plan, phase, flag.replace("-", "_"), batches[phase], room)
                hint = f"--{flag} {most} would fit" if most else f"not even --{flag} 1 would fit"
                lines.append(f"    {phase} at the longest: {hint}")
    return lines


def largest_batch(plan: Plan, phase: str, setting: str, tried: int, room: float) -> int:
    """The largest batch below `tried` that a phase has room for at the longest; 0 for none."""
    for batch in range(tried - 1, 0, -1):
        config = dataclasses.replace(plan.config, **{setting: batch})
        smaller = dataclasses.replace(plan, config=config)
        parts = phases(smaller, plan.lengths.longest_prompt, config.max_new_tokens)[phase]
        allowed = phase != "policy" or plan.rollouts % batch == 0  # config.py asks for a divisor
        if allowed and sum(parts.values()) <= room:
            return batch
    return 0


def time_lines(plan: Plan, here: Machine) -> list[str]:
    """Arithmetic, and time on A100s and here, of an update and of the run."""
    config, share = plan.config, shares(plan, 1)
    between = (plan.updates - 1) // config.eval_every if config.eval_every and plan.updates else 0
    evaluations = 2 + between * min(1, config.eval_every_problems / plan.heldout)  # whole ones
    work = {phase: total * flop(plan)[phase] for phase, (total, _) in share.items()}
    columns = [work, seconds(plan, plan.a100(), plan.world_size), seconds(plan, here, 1)]
    tests = [evaluations * column.pop("evaluation") for column in columns]
    table = {phase: [column[phase] for column in columns] for phase in work}
    table["an update"] = [sum(column.values()) for column in columns]
    table[f"{2 + between} evaluations"] = tests
    table["the run"] = [
        plan.updates * update + test for update, test in zip(table["an update"], tests, strict=True)
    ]
    title = f"{'about, at mean lengths':<40}{'arithmetic':>16}"
    lines = [f"{title}{f'{plan.world_size} x A100-80GB':>20}{'here':>20}"]
    for name, (arithmetic, *times) in table.items():
        cells = "".join(f"{scaled(time, TIMES):>20}" for time in times)
        lines.append(f"  {name:<38}{scaled(arithmetic, FLOPS):>16}{cells}")
    return lines + [
        f"  A100-80GB: {plan.a100().name}",
        f"  here: {here.name}",
        "  Estimated, not measured; loading, saving and what GPUs tell each other are left out.",
    ]


FLOPS = {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9}
TIMES = {"years": 365 * 86400, "days": 86400, "h": 3600, "min": 60, "s": 1}


def scaled(value: float, units: dict[str, float]) -> str:
    """Three digits in the largest unit of which there is one."""
    unit = next((unit for unit, size in units.items() if value >= size), list(units)[-1])
    value /= units[unit]
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
