"""What the mask optimisation and sampling cost, beside the plain way and beside transformers.

    python -m tests.bench                    # CPU, one thread, about seven minutes
    python -m tests.bench --device cuda      # Llama-3.2-3B's shape in bfloat16, random weights

Random weights: the time does not depend on them. The variants of a table take turns in one process
and each shows its shortest time (CPU time on a CPU). Times change with the machine and with what
else it does; the ratios within a table hardly do.
Rows of transformers appear where it is installed.
"""

import argparse
import platform
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import atman
from atman import MaskConfig, rollout_saliency
from grpo import generate
from model import Llama, LlamaConfig, store_by_input
from tests import plain_masks

P, T, D, A = 100, 150, 1, 4  # tokens of prompt, reasoning, delimiter, answer
SHAPES = {  # name -> hidden size, intermediate size, layers, vocabulary
    "width 256": (256, 688, 6, 2048),
    "width 512": (512, 1376, 8, 32000),
}
LLAMA_3B = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
)


@torch.no_grad()
def random_model(config: LlamaConfig, dtype=torch.float32, device="cpu") -> Llama:
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(config).to(dtype)
    for weight in model.parameters():
        if weight.dim() == 2:  # large enough that attention and answers are not uniform
            weight.normal_(std=weight.shape[1] ** -0.5)
    return model


def small_model(shape: str) -> Llama:
    width, intermediate, layers, vocabulary = SHAPES[shape]
    heads = width // 64
    config = LlamaConfig(vocabulary, width, intermediate, layers, heads, heads // 2, 64)
    model = random_model(config)
    store_by_input(model)  # as from_pretrained does
    return model


def random_ids(vocabulary: int, *lengths, seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def rollouts(model, batch: int, reasoning=None, group=8) -> tuple[list, list, list, list]:
    """prompts, reasonings, delimiters, answers; `group` neighbours share a prompt."""
    vocabulary = model.config.vocab_size
    prompts = random_ids(vocabulary, *[P] * -(-batch // group), seed=1)
    prompts = [prompts[n // group] for n in range(batch)]
    reasonings = random_ids(vocabulary, *(reasoning or [T] * batch), seed=2)
    delimiters = random_ids(vocabulary, *[D] * batch, seed=3)
    return prompts, reasonings, delimiters, random_ids(vocabulary, *[A] * batch, seed=4)


def clock(device) -> float:
    """Seconds: of this process's CPU, or of the wall once the GPU is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step_seconds(optimize, device, steps=2) -> float:
    """The shortest of a few steps, from one step's end to the next one's."""
    ends = []
    optimize(MaskConfig(steps=steps + 1), lambda count: ends.append(clock(device)))
    return min(end - start for start, end in zip(ends, ends[1:], strict=False))


def take_turns(variants: dict, rounds: int) -> dict[str, float]:
    """name -> shortest seconds of `rounds` calls each, which return seconds."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, run in variants.items():
            best[name] = min(best[name], run())
    return best


def saved_bytes(run, *models) -> int:
    """What one step's forward pass keeps for its backward pass, weights aside."""
    kept, weights = {}, {w.untyped_storage().data_ptr() for m in models for w in m.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def transformers_logits(model: Llama, attention: str, best: bool):
    """logits(tokens, additive, rows) by transformers with the same weights; None: not installed.

    best: weights frozen, sdpa, the head on the answer's rows alone; else as a user would begin.
    """
    try:
        import transformers
    except ImportError:
        return None
    import tempfile

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention, dtype=next(model.parameters()).dtype
        ).to(next(model.parameters()).device)
    if best:
        theirs.requires_grad_(False)

    def logits(tokens, additive, rows):
        length = tokens.shape[1]
        causal = torch.full((length, length), torch.finfo(additive.dtype).min).triu(1)
        mask = additive + causal.to(additive)
        keep = {"logits_to_keep": rows[0]} if best else {}  # all rows are alike in these batches
        out = theirs(tokens, attention_mask=mask, use_cache=False, **keep).logits
        return out if best else out.gather(1, rows[:, :, None].expand(-1, -1, out.shape[2]))

    logits.model = theirs
    return logits


def bench_masks(shape: str, batch: int, rounds: int) -> None:
    model, device = small_model(shape), torch.device("cpu")
    parts = rollouts(model, batch)
    half = small_model(shape).to(torch.bfloat16)

    def plain(config, progress=None, logits=None):
        return plain_masks.optimize_masks(model, *parts, config, progress, logits)

    def ours(config, progress=None, model=model):
        return atman.optimize_masks(model, *parts, config, progress)

    variants = {
        "plain loop": plain,
        "ours": ours,
        "ours, bfloat16": lambda config, progress=None: ours(config, progress, half),
    }
    models = [model, half]
    for name, attention in {"eager": "eager", "best": "sdpa"}.items():
        logits = transformers_logits(model, attention, best=name == "best")
        if logits and (name, batch) != ("eager", 8):  # the plain loop's twin: once is enough
            variants[f"transformers, {name}"] = lambda c, p=None, f=logits: plain(c, p, f)
            models.append(logits.model)
    seconds = take_turns(
        {name: lambda run=run: step_seconds(run, device) for name, run in variants.items()}, rounds
    )
    flop, kept, results = {}, {}, {}
    config = MaskConfig(steps=2)
    for name, run in variants.items():
        with FlopCounterMode(display=False) as counter:
            kept[name] = saved_bytes(lambda run=run: run(MaskConfig(steps=0)), *models)
        once = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            results[name] = run(config)
        flop[name] = (counter.get_total_flops() - once) / config.steps
    plain_result = results["plain loop"]
    print(f"\n{shape}, {SHAPES[shape][2]} layers, vocabulary {SHAPES[shape][3]}, batch {batch}")
    print(f"  {'':<22}{'ms/step':>9}{'times':>7}{'by arithmetic':>15}{'saved MiB':>11}"
          f"{'mask differs':>14}{'reward':>9}")  # fmt: skip
    for name, result in results.items():
        mask = (result.mask - plain_result.mask).abs().max().item()
        rewards = [rollout_saliency(r, config).double() for r in (result, plain_result)]
        print(
            f"  {name:<22}{1e3 * seconds[name]:>9.1f}{seconds['plain loop'] / seconds[name]:>7.2f}"
            f"{flop['plain loop'] / flop[name]:>15.2f}{kept[name] / 2**20:>11.1f}"
            f"{mask:>14.0e}{(rewards[0] - rewards[1]).abs().max().item():>9.0e}"
        )


def bench_ragged(rounds: int) -> None:
    """32 rollouts of different length: one by one, in eights as they come, in eights by length."""
    model, device = small_model("width 256"), torch.device("cpu")
    lengths = (40 + 220 * torch.rand(32, generator=torch.Generator().manual_seed(5)) ** 2).int()
    parts = rollouts(model, 32, lengths.tolist())
    by_length = sorted(range(32), key=lambda n: lengths[n])

    def run(order, size):
        def seconds():
            total = 0.0
            for start in range(0, 32, size):
                chosen = [[part[n] for n in order[start : start + size]] for part in parts]
                total += step_seconds(
                    lambda c, p, chosen=chosen: atman.optimize_masks(model, *chosen, c, p), device
                )
            return total

        return seconds

    seconds = take_turns(
        {
            "one by one": run(range(32), 1),
            "eights as they come": run(range(32), 8),
            "eights by length": run(by_length, 8),
        },
        rounds,
    )
    print(f"\nwidth 256, 32 rollouts of {lengths.min()} to {lengths.max()} reasoning tokens")
    for name, value in seconds.items():
        times = seconds["one by one"] / value
        print(f"  {name:<22}{1e3 * value:>9.1f} ms a step of all, {times:.2f} times")


def bench_decoding(shape: str, batch: int, rounds: int, tokens: int = T + A) -> None:
    """Greedy, no stop token: the same number of steps everywhere."""
    model, device = small_model(shape), torch.device("cpu")
    prompts = rollouts(model, batch)[0]
    outputs = {}

    def ours():
        start = clock(device)
        outputs["ours"] = generate(model, prompts, tokens, temperature=0.0)
        return clock(device) - start

    variants, logits = {"ours": ours}, transformers_logits(model, "sdpa", best=True)
    if logits:
        inputs = torch.tensor(prompts)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        options |= {"attention_mask": torch.ones_like(inputs), "pad_token_id": 0}

        def theirs():
            start = clock(device)
            outputs["theirs"] = logits.model.generate(inputs, **options)[:, P:].tolist()
            return clock(device) - start

        variants["transformers"] = theirs
    seconds = take_turns(variants, rounds)
    line = f"  {shape}, batch {batch:>2}: {batch * tokens / seconds['ours']:>6.0f} tokens/s"
    if logits:
        equal = sum(a == b for a, b in zip(outputs["ours"], outputs["theirs"], strict=True))
        line += (
            f", transformers {batch * tokens / seconds['transformers']:>6.0f}: "
            f"{seconds['transformers'] / seconds['ours']:.2f} times; equal {equal} of {batch}"
        )
    print(line)


def bench_update() -> None:
    """A whole update of the micro preset."""
    import config as settings
    import train
    from data.prompts import Tokenizer
    from ranks import Progress, Ranks

    config, ranks = settings.parse_args([]), Ranks(0, 1, torch.device("cpu"))
    tokenizer, model = Tokenizer.from_directory(config.model), Llama.from_pretrained(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    questions = train.load_problems("micro", "train", limit=config.questions)
    bar = Progress("update", silent=True)
    print(f"\nan update of the micro preset, {config.questions} x {config.rollouts} rollouts")
    times = [clock(ranks.device)]
    sampled, prefill = train.sample_rollouts(model, tokenizer, questions, config, 0, ranks, bar)
    times.append(clock(ranks.device))
    train.learn_saliency(model, tokenizer, sampled, config, bar, prefill)
    times.append(clock(ranks.device))
    train.update_policy(
        model,
        optimizer,
        [rollout.prompt for rollout in sampled],
        [rollout.completion for rollout in sampled],
        torch.linspace(-1, 1, len(sampled)),
        passes=config.passes,
        micro_batch=config.micro_batch,
        ratio=config.ratio,
    )
    times.append(clock(ranks.device))
    names = ("sampling", "masks", "policy")
    parts = zip(names, times, times[1:], strict=False)
    print("  " + ", ".join(f"{name} {end - start:.2f} s" for name, start, end in parts))


def bench_cuda() -> None:
    """Llama-3.2-3B's shape: P=150, T=190, A=5, 8 rollouts a question, against measured limits."""
    global P, T, A
    P, T, A = 150, 190, 5
    device = torch.device("cuda", 0)
    model = random_model(LLAMA_3B, torch.bfloat16, device)
    big = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)

    def rate():  # FLOP per second of a large matrix product
        start = clock(device)
        for _ in range(10):
            big @ big
        return (clock(device) - start) / (10 * 2 * 8192**3)

    rate()
    peak = 1 / min(rate() for _ in range(5))
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def bandwidth():  # seconds per byte read or written
        start = clock(device)
        for _ in range(10):
            target.copy_(source)
        return (clock(device) - start) / (10 * 2 * 2**30)

    bandwidth()
    limit = 1 / min(bandwidth() for _ in range(5))
    print(f"matrix products {peak / 1e12:.0f} TFLOP/s, memory {limit / 1e12:.2f} TB/s (measured)")
    for batch in (1, 4, 8, 16):
        parts = rollouts(model, batch)
        torch.cuda.reset_peak_memory_stats()
        run = lambda c, p=None, parts=parts: atman.optimize_masks(model, *parts, c, p)  # noqa: E731
        seconds = min(step_seconds(run, device, 5) for _ in range(3))
        memory = torch.cuda.max_memory_allocated() / 2**30
        counts = []
        for steps in (1, 2):
            with FlopCounterMode(display=False) as counter:
                run(MaskConfig(steps=steps))
            counts.append(counter.get_total_flops())
        flop = counts[1] - counts[0]
        print(
            f"  masks, batch {batch:>2}: {1e3 * seconds:.1f} ms a step, "
            f"{flop / seconds / peak:.0%} of the matrix rate, peak {memory:.1f} GiB"
        )
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    prompts, tokens = rollouts(model, 64)[0], 200
    generate(model, prompts, 8, 0.0)
    start = clock(device)
    generate(model, prompts, tokens, 0.0)
    seconds = clock(device) - start
    print(
        f"  decoding, batch 64: {64 * tokens / seconds:.0f} tokens/s, "
        f"{weights * tokens / limit / seconds:.0%} of the bandwidth limit (weights alone)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.add_argument(
        "--only",
        choices=("masks", "ragged", "decoding", "update"),
        help="one table in place of all (CPU)",
    )
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}")
    if args.device == "cuda":
        print(torch.cuda.get_device_name())
        bench_cuda()
        return
    torch.set_num_threads(1)
    print(f"one thread; prompt {P}, reasoning {T}, delimiter {D}, answer {A} tokens")
    if args.only in (None, "masks"):
        for shape, batch, rounds in [
            ("width 256", 1, 6),
            ("width 256", 8, 3),
            ("width 512", 1, 2),
            ("width 512", 8, 1),
        ]:
            bench_masks(shape, batch, rounds)
    if args.only in (None, "ragged"):
        bench_ragged(2)
    if args.only in (None, "decoding"):
        print(f"\ngreedy decoding of {T + A} tokens, 8 rollouts a question")
        for shape in SHAPES:
            bench_decoding(shape, 8, 3 if shape == "width 256" else 2)
            bench_decoding(shape, 64, 2 if shape == "width 256" else 1)
    if args.only in (None, "update"):
        bench_update()


if __name__ == "__main__":
    main()
