"""Reasoners whose faithfulness is known, because their weights are set by hand.

Each is a Llama of one layer over data/micro's vocabulary. Its residual stream has a place for every
token id, ten for the digit that was read, and one for "the delimiter was seen". Head 0 reads a
digit, head 1 looks for the delimiter. The output head goes from a digit to the delimiter or, once
that was seen, to the end of text; and from the delimiter to the digit that was read.

    copier    reads the last number: its answer rests on the end of the reasoning alone
    bypass    reads the first number, which is the question's: its reasoning is decoration
    random    reads all numbers alike, the question's and those of the reasoning, and says the one
              that it likes best, by an order of liking that was drawn
"""

import math
import random

import torch

from data import Problem
from data.traces import Rollout, Trace, split_trace
from lab.run.sampling import generate
from model import Llama, LlamaConfig

HEAD_DIM, THETA = 16, 1e5  # pair j of dimensions, j and j + 8, turns by THETA^(-j/8) per token
RECENCY, CONTENT = 2, 6  # by 1.7 in 30 tokens, and by 0.005
READING = {  # how a number's score weighs how near it is, and that it is a number
    "copier": (24.0, 0.0),
    "bypass": (-24.0, 48.0),
    "random": (0.0, 24.0),
}


@torch.no_grad()
def reasoner(kind, tokenizer) -> Llama:
    vocab = tokenizer.vocab_size
    read, seen = vocab, vocab + 10  # places in the residual stream
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=vocab + 11,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        rope_theta=THETA,
        tie_word_embeddings=False,
    )
    model = Llama(config)
    for weight in model.parameters():
        weight.zero_()
    attention, out = model.layers[0].self_attn, model.lm_head.weight
    query, key = attention.q_proj.weight, attention.k_proj.weight
    value, output = attention.v_proj.weight, attention.o_proj.weight
    model.embed_tokens.weight[:, :vocab] = torch.eye(vocab)
    for norm in (model.norm, model.layers[0].input_layernorm):
        norm.weight.fill_(config.hidden_size**-0.5)  # undoes the norm of a one-hot vector

    newline, hashes = tokenizer.encode("\n#####\n")
    query[RECENCY, :vocab], query[CONTENT, :vocab] = (
        weight * math.sqrt(HEAD_DIM) for weight in READING[kind]
    )
    query[HEAD_DIM + CONTENT, :vocab] = 24 * math.sqrt(HEAD_DIM)
    key[HEAD_DIM + CONTENT, hashes] = value[HEAD_DIM, hashes] = output[seen, HEAD_DIM] = 1
    out[hashes, newline], out[tokenizer.eos_ids[0], seen] = 40, 70
    liking = [0.0] * 10
    if kind == "random":
        liking = random.Random(0).sample([n / 10 for n in range(10)], 10)
    for number in range(10):
        (digit,) = tokenizer.encode(str(number))
        key[RECENCY, digit] = key[CONTENT, digit] = 1
        value[number, digit], output[read + number, number] = 1 + liking[number], 1
        out[newline, digit], out[digit, hashes], out[digit, read + number] = 40, 100, 12
    return model


def rollout_of(trace: Trace, gold: str, question="", prompt=(0,), seed=(0,)) -> Rollout:
    """A trace by hand as the measures take it."""
    completion = trace.reasoning + trace.delimiter + trace.answer
    return Rollout(Problem("p", question, gold), list(prompt), completion, trace, seed=seed)


def planted_rollouts(model, tokenizer, count=16, seed=0) -> list[Rollout]:
    """Traces with three numbers, none of them the question's, that end in the model's own answer.

    8 prompt tokens, the second a number; 16 reasoning tokens, the last a number, all other words.
    """
    draw = random.Random(seed)
    words = [tokenizer.encode(word)[0] for word in (" pens", " coins", " in", " of", " at", " and")]
    prompts, reasonings, questions = [], [], []
    for _ in range(count):
        given, *numbers = draw.sample(range(1, 10), 4)
        prompt = [tokenizer.bos_id, *tokenizer.encode(str(given)), *draw.choices(words, k=6)]
        reasoning = draw.choices(words, k=16)
        places = [*sorted(draw.sample(range(0, 12, 3), 2)), 15]
        for place, number in zip(places, numbers, strict=True):
            (reasoning[place],) = tokenizer.encode(str(number))
        prompts.append(prompt)
        reasonings.append(reasoning)
        questions.append(tokenizer.decode(prompt))
    contexts = [a + b for a, b in zip(prompts, reasonings, strict=True)]
    said = generate(model, contexts, 5, 0, tokenizer.eos_ids)
    traces = [split_trace(a + b, tokenizer) for a, b in zip(reasonings, said, strict=True)]
    return [
        rollout_of(trace, trace.number, question, prompt, (seed, n))
        for n, (prompt, question, trace) in enumerate(zip(prompts, questions, traces, strict=True))
    ]
