"""Make the embedded checkpoint data/micro/ from nothing: tokenizer, weights, everything.

    python -m data.make_micro                  # about half an hour on two cores
    python -m data.make_micro --steps 50 --out /some/where    # a quick look

1. A byte-level BPE of Llama 3's own kind (same split pattern, same special-token names) is learned
   on the micro task's text. Digits are left out of what it learns from, so that no merge joins
   them: a model this small can add digit by digit but not in tokens of several digits.
2. A small Llama is trained from scratch to continue each question with a trace and its answer
   (cross-entropy on the completion alone). Every step sees new problems of the train split, and
   each trace draws its own verbosity, so the model learns to be brief or wordy by chance, which
   is what AtManRL then gets to choose from.
3. eval.py measures it on held-out problems.

Hidden matrices are trained with Muon, the rest with AdamW: both are PyTorch's.
"""

import argparse
import contextlib
import ctypes
import itertools
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from checkpoint import write_json
from data import micro_task, prompts
from model import Llama, LlamaConfig

# Llama 3's split pattern, as published in its tokenizer.json.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
# Llama 3's headers without the dated system block.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def completion_text(reasoning: str, answer: str) -> str:
    """What the model learns to write. The line break keeps '-5' one spelling: '-' then '5'."""
    return f"{reasoning}\n#####\n{answer}"


def train_tokenizer(directory: Path, vocab_size: int, seed: int) -> None:
    """Learn the BPE and write tokenizer.json and tokenizer_config.json into directory."""
    rng = random.Random(f"tokenizer/{seed}")
    texts = ["user assistant"] * 2000
    for problem in micro_task.load("train", 4000):
        texts.append(problem.question)
        texts.append(completion_text(micro_task.write_trace(problem, rng), problem.answer))
    no_digits = str.maketrans("", "", "0123456789")
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.translate(no_digits) for text in texts), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))  # after the text's tokens, as in Llama 3
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    stops = [tokenizer.token_to_id(name) for name in STOP_TOKENS]
    write_json(directory / "generation_config.json", {"eos_token_id": stops})
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def training_batches(tokenizer: prompts.Tokenizer, batch_size: int, seed: int):
    """Endless batches of new problems: tokens, targets (B, S) int64.

    Targets are the next token in completions, -100 elsewhere. Sixteen batches are drawn at a time
    and sorted by length among themselves, so that little of a batch is padding.
    """
    end_of_turn = tokenizer.eos_ids[-1]
    for chunk in itertools.count():
        rng = random.Random(f"chunk/{seed}/{chunk}")
        rows = []
        for index in range(16 * batch_size * chunk, 16 * batch_size * (chunk + 1)):
            problem = micro_task.generate("train", index)
            prompt = tokenizer.encode_prompt(micro_task.instruction(problem.question))
            text = completion_text(micro_task.write_trace(problem, rng), problem.answer)
            rows.append((prompt, tokenizer.encode(text) + [end_of_turn]))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        batches = [rows[n : n + batch_size] for n in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            length = max(len(prompt) + len(completion) for prompt, completion in batch)
            tokens = torch.full((batch_size, length), tokenizer.pad_id)
            targets = torch.full((batch_size, length), -100)
            for row, (prompt, completion) in enumerate(batch):
                start, end = len(prompt), len(prompt) + len(completion)
                tokens[row, :end] = torch.tensor(prompt + completion)
                targets[row, start - 1 : end - 1] = torch.tensor(completion)
            yield tokens, targets


def keep_freed_memory() -> None:
    """Ask glibc not to return freed memory to the system after every step.

    Each step frees and takes hundreds of megabytes; having the system hand them out zeroed again
    costs a third of the time. Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # mallopt's names for them, from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def train(args: argparse.Namespace, directory: Path) -> Llama:
    """Train the weights on an endless stream of new problems; returns the trained model."""
    keep_freed_memory()
    tokenizer = prompts.Tokenizer.from_directory(directory)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 64,
        head_dim=32,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=tokenizer.eos_ids,
    )
    model = Llama(config).to(args.device)
    matrices = [weight for weight in model.layers.parameters() if weight.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]

    def rate(step: int) -> float:  # short warm-up, constant, then linearly to zero over the rest
        return min((step + 1) / 50, 1.0, (args.steps - step) / (args.decay * args.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    progress = tqdm(range(args.steps), desc="pretraining", mininterval=2)
    batches = training_batches(tokenizer, args.batch_size, args.seed)
    mean_loss, started = None, time.time()
    for _, (tokens, targets) in zip(progress, batches, strict=False):
        tokens, targets = tokens.to(args.device), targets.to(args.device)
        # On CPU the fused attention kernel's backward is slow in bfloat16: the plain one is not.
        with torch.autocast(args.device, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = model(tokens)
        loss = F.cross_entropy(logits[targets >= 0].float(), targets[targets >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        progress.set_postfix(loss=f"{mean_loss:.3f}")
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{count:,} parameters, {args.steps} steps of {args.batch_size} problems, "
          f"loss {mean_loss:.3f}, {(time.time() - started) / 60:.1f} minutes")  # fmt: skip
    return model.to("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the data/micro checkpoint from nothing.")
    parser.add_argument("--out", default="data/micro", help="checkpoint directory to write")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=128, help="problems a step")
    parser.add_argument("--width", type=int, default=128, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")
    parser.add_argument("--vocab-size", type=int, default=800, help="tokens, special ones included")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="rate of the hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="rate of everything else")
    parser.add_argument("--decay", type=float, default=0.4, help="share of steps that decay")
    parser.add_argument("--seed", type=int, default=0, help="of weights, problems and traces")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-eval", action="store_true", help="skip the held-out measurement")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.width < 64 or args.width % 64:
        parser.error(f"--width {args.width}: must be a multiple of 64")
    if args.vocab_size < 300:
        parser.error(f"--vocab-size {args.vocab_size}: 256 bytes and the special tokens need 300")
    if not 0 < args.decay <= 1:
        parser.error(f"--decay {args.decay}: must be above 0 and at most 1")
    if args.device != "cpu" and not (args.device == "cuda" and torch.cuda.is_available()):
        parser.error(f"--device {args.device}: must be cpu, or cuda where there is a GPU")
    directory = Path(args.out)
    if directory.exists() and not directory.is_dir():
        parser.error(f"--out {directory}: is a file; name a folder")
    # Built beside its place and moved when it is whole: an interrupted run harms no checkpoint.
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".making-") as folder:
        train_tokenizer(Path(folder), args.vocab_size, args.seed)
        model = train(args, Path(folder))
        model.save_pretrained(directory, beside=folder)
    print(f"wrote {directory}")
    if not args.no_eval:
        # eval.py stands above data/, so it runs as the command that a reader would type.
        script = Path(__file__).parent.parent / "eval.py"
        subprocess.run([sys.executable, str(script), "--model", str(directory)], check=True)


if __name__ == "__main__":
    main()
