"""This project's Llama against transformers' own. Run by hand where transformers is installed.

    pip install transformers
    python -m tests.transformers_parity            # both ways, through files; prints differences
    python -m tests.transformers_parity --model DIR  # a checkpoint's prompts, logits, greedy text
    python -m tests.transformers_parity --make     # write the fixtures in tests/parity/ again

Each fixture is a tiny random Llama as transformers saves it, with the logits that transformers
gets from it (outputs.safetensors); tests/test_parity.py needs those files alone.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from lab.run.checkpoint import load_llama, save_llama
from lab.run.sampling import generate

FIXTURES = Path(__file__).parent / "parity"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
SHAPES = {  # name -> (number format of the file, LlamaConfig's arguments)
    # Of 8 frequencies 4 are kept, 2 blended and 2 divided.
    "grouped-llama3-tied": (
        torch.bfloat16,
        {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {**LLAMA3, "rope_theta": 500.0},
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        },
    ),
    "untied-plain": (
        torch.float16,
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
        },
    ),
    # 10 is neither a power of two nor hidden size / heads.
    "head-dim-10": (
        torch.float32,
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "rope_parameters": {
                **LLAMA3,
                "rope_theta": 10000.0,
                "factor": 32.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 16.0,
            },
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        },
    ),
}
COMMON = {"vocab_size": 80, "intermediate_size": 44, "num_hidden_layers": 2}
COMMON |= {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": [2, 3]}
QUESTIONS = (  # no control tokens and no white space around them, which stay text or go here
    "Zoë pays $1,200.50 for 3/4 of it – how much is all of it?",
    'Two lines,\n\n    with <b>marks</b> & "quotes": is 3 < 4?',
    "Ann has 12 pears and buys 30 more. How many pears has she?",
)


def reference(directory, dtype=torch.float32, attention="eager"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention
    )


@torch.no_grad()
def reference_logits(directory, tokens, mask=None, **options) -> torch.Tensor:
    """transformers' logits (B, S, V), with mask (B, 1, S, S) added on top of the causal one."""
    model = reference(directory, **options)
    if mask is not None:
        causal = torch.full(mask.shape[-2:], torch.finfo(mask.dtype).min).triu(1)
        mask = mask + causal
    return model(tokens, attention_mask=mask).logits


def make() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(FIXTURES, ignore_errors=True)
    for number, (name, (dtype, shape)) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(number)
        model = LlamaForCausalLM(LlamaConfig(**COMMON | shape))
        frequencies = model.model.rotary_emb.inv_freq.clone()  # before .to() rounds them
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            values = 1.5 * noise * weight.shape[-1] ** -0.5 if weight.dim() == 2 else 1 + noise / 5
            weight.data.copy_(values)  # large enough that every part of them shows in the logits
        # and these small enough that float32 itself is well within 1e-5
        model.get_output_embeddings().weight.data *= 0.3
        model.to(dtype).save_pretrained(FIXTURES / name)
        tokens = torch.randint(COMMON["vocab_size"], (2, 28), generator=generator)
        mask = -4 * torch.rand(2, 1, 28, 28, generator=generator)
        outputs = {
            "frequencies": frequencies,
            "tokens": tokens,
            "mask": mask,
            "logits": reference_logits(FIXTURES / name, tokens),
            "masked_logits": reference_logits(FIXTURES / name, tokens, mask),
        }
        for attention in ("eager", "sdpa"):
            outputs[f"bfloat16_{attention}"] = reference_logits(
                FIXTURES / name, tokens, dtype=torch.bfloat16, attention=attention
            )
        save_file(outputs, FIXTURES / name / "outputs.safetensors")
        for file in (FIXTURES / name).iterdir():
            file.chmod(0o644)
        print(f"wrote {FIXTURES / name}")


@torch.no_grad()
def check() -> float:
    """Files of either side in the other's hands; returns the largest difference of logits."""
    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            outputs = load_file(FIXTURES / name / "outputs.safetensors")
            tokens = outputs["tokens"]
            expected = reference_logits(FIXTURES / name, tokens)
            for shards, size in {"one file": 10**9, "shards": 30_000}.items():
                theirs, ours = Path(folder, f"{name}-t-{size}"), Path(folder, f"{name}-o-{size}")
                reference(FIXTURES / name).save_pretrained(theirs, max_shard_size=size)
                save_llama(load_llama(theirs), ours, max_shard_bytes=size)
                files = len(list(ours.glob("*.safetensors")))
                here = (load_llama(theirs)(tokens) - expected).abs().max().item()
                there = (reference_logits(ours, tokens) - expected).abs().max().item()
                print(
                    f"{name:<20} {shards:<8} ({files:>2} saved here)  transformers' save, loaded "
                    f"here: {here:.1e}  our save, loaded there: {there:.1e}"
                )
                largest = max(largest, here, there)
    return largest


@torch.no_grad()
def check_model(directory: Path) -> float:
    """A chat checkpoint in both hands: ids of prompts, a greedy completion, float32 logits of both.

    Returns the largest difference of logits, over prompt and completion, as a part of the largest.
    """
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_directory(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    for question in QUESTIONS:
        prompt = tokenizer.encode_prompt(question)
        message = [{"role": "user", "content": question}]
        ids = theirs.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert prompt == ids, (prompt, ids)
    ours, model = load_llama(directory, torch.float32), reference(directory)
    completion = generate(ours, [prompt], 100, 0.0, tokenizer.eos_ids)[0]
    options = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": list(tokenizer.eos_ids)}
    out = model.generate(torch.tensor([prompt]), **options)
    assert out[0, len(prompt) :].tolist() == completion
    logits = model(out).logits
    difference = ((ours(out) - logits).abs().max() / logits.abs().max()).item()
    print(
        f"{directory}: the same ids of {len(QUESTIONS)} prompts and greedy completion in both "
        f"({len(completion)} tokens), logits {difference:.1e} of the largest apart at most"
    )
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--make", action="store_true", help="write the fixtures again")
    parser.add_argument("--model", type=Path, help="compare this chat checkpoint alone")
    args = parser.parse_args()
    if args.make:
        make()
    elif args.model:
        check_model(args.model)
    else:
        difference = max(check(), check_model(Path(__file__).parent.parent / "data" / "micro"))
        print(f"largest difference of logits: {difference:.1e}")
        assert difference < 1e-5
