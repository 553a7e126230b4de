"""A Llama's directory in Hugging Face's form, read and written.

    config.json                the shape; read_config also takes the keys that transformers 5 writes
    generation_config.json     the stop tokens, where it has them
    model.safetensors          the weights, or model-00001-of-00002.safetensors and so on, with
    model.safetensors.index.json    {"metadata": {"total_size": bytes}, "weight_map": {key: file}}
    tokenizer.json ...         not read here (data/prompts.py does), but carried along by a save

What is written loads in transformers, in vLLM and here. A directory appears whole or not at all.
What is read and does not fit ends with a ValueError that names the file and the reason: a model
that loads with a wrong reading of its files answers nonsense without an error.

In these files q_proj and k_proj are laid out for the rotate-half form of RoPE. Meta's own .pth
files are interleaved, hold other names, and are refused.
"""

import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hub import INDEX, set_aside

NUMBER_FORMATS = ("F64", "F32", "BF16", "F16")  # as safetensors spells them
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
LLAMA3_ROPE_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
CARRIED_FILES = (  # beside the weights: what a tokenizer of any reader may want
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


# --------------------------------------------------------------------------------------- reading


def read_config(directory: Path) -> dict:
    """LlamaConfig's fields from config.json, the stop tokens also from generation_config.json.

    Older files have `rope_scaling` beside `rope_theta`, newer ones `rope_parameters` with
    rope_theta inside. Absent settings take transformers' defaults for a Llama, absent sizes are
    refused. Raises ValueError naming the file, the key and what is wrong with it.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}; only llama is read")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act is {raw['hidden_act']!r}; only silu is known")
    for flag in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(raw.get(flag, False), bool):
            raise ValueError(f"{path}: {flag} must be true or false, not {raw[flag]!r}")
    for flag in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(flag):
            raise ValueError(f"{path}: {flag} is set; this Llama has no such weights")

    def number(value, key: str, whole: bool = False):
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            kind = "whole number" if whole else "number"
            raise ValueError(f"{path}: {key} must be a {kind} above 0, not {value!r}")
        if whole and value >= 2**31:
            raise ValueError(f"{path}: {key} {value} is no size of a Llama")
        return value

    def whole(key: str, default=None) -> int:
        value = raw.get(key)
        return number(default if value is None else value, key, whole=True)

    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling must be an object or null, not {rope!r}")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{path}: rope type {rope_type!r}; only default and llama3 are known")
    for holder in (raw, rope):
        if holder.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{path}: partial_rotary_factor is set; this Llama rotates all of it")
    scaling = None
    if rope_type == "llama3":
        scaling = {"rope_type": "llama3"}
        scaling |= {key: number(rope.get(key), f"llama3 rope's {key}") for key in LLAMA3_ROPE_KEYS}
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise ValueError(f"{path}: high_freq_factor must be above low_freq_factor")

    vocab_size, layers = whole("vocab_size"), whole("num_hidden_layers")
    heads = whole("num_attention_heads")
    if layers > 1000:
        raise ValueError(f"{path}: num_hidden_layers {layers} is no size of a Llama")
    kv_heads = whole("num_key_value_heads", heads)
    head_dim = whole("head_dim", whole("hidden_size") // heads)
    if heads % kv_heads:
        raise ValueError(f"{path}: {heads} attention heads cannot share {kv_heads} key-value heads")
    if head_dim % 2:
        raise ValueError(f"{path}: head_dim {head_dim} is odd; RoPE turns pairs")
    return {
        "vocab_size": vocab_size,
        "hidden_size": whole("hidden_size"),
        "intermediate_size": whole("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": number(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        "rope_theta": number(10000.0 if theta is None else theta, "rope_theta"),
        "rope_scaling": scaling,
        "max_position_embeddings": whole("max_position_embeddings", 2048),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": read_stop_ids(directory, raw, vocab_size),
    }


def read_stop_ids(directory: Path, config: dict, vocab_size: int) -> tuple[int, ...]:
    """eos_token_id, an int or a list: generation_config.json's, where Instruct models list all.

    config: what config.json holds, whose eos_token_id stands where the other file has none.
    """
    path, eos = directory / "config.json", config.get("eos_token_id")
    if (directory / "generation_config.json").exists():
        stops = read_json(directory / "generation_config.json").get("eos_token_id")
        if stops is not None:
            path, eos = directory / "generation_config.json", stops
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"{path}: eos_token_id {token!r} is not in the vocabulary")
    return ids


def check_weights(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse files that do not hold exactly these tensors (key in the files -> shape).

    Only the headers are read. Where there is to be no lm_head.weight (tied) a file may carry one
    all the same, as some tuned checkpoints do, and old ones the angles of RoPE. Raises ValueError
    naming the file for a missing, surplus, misshapen or quantised tensor, and a damaged file.
    """
    missing = set(shapes)
    paths = weight_files(directory)
    for path in paths:
        with opened(path) as file:
            for key in file.keys():
                part = file.get_slice(key)
                shape, number_format = tuple(part.get_shape()), part.get_dtype()
                tied = key == "lm_head.weight" and key not in shapes
                if key.endswith("rotary_emb.inv_freq"):
                    continue
                if key not in shapes and not tied:
                    raise ValueError(f"{path}: unexpected tensor {key}")
                wanted = shapes["model.embed_tokens.weight" if tied else key]
                if shape != wanted:
                    raise ValueError(
                        f"{path}: {key} has shape {shape}, config.json asks for {wanted}"
                    )
                if number_format not in NUMBER_FORMATS:
                    raise ValueError(
                        f"{path}: {key} is in {number_format}; quantised weights are not read"
                    )
                missing.discard(key)
    if missing:
        where = paths[0] if len(paths) == 1 else directory / INDEX
        raise ValueError(f"{where}: {len(missing)} tensors are missing, such as {min(missing)}")


def read_weights(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Fill `weights` (key in the files -> tensor, any float format) in place, tensor by tensor.

    The files are mapped, not read: beyond `weights` at most one shard is in memory. They must have
    passed check_weights. Raises ValueError naming the file where a tied model carries a head of its
    own: transformers would use that one.
    """
    paths = weight_files(directory)
    for path in paths:
        with opened(path) as file:
            for key in weights.keys() & file.keys():
                weights[key].copy_(file.get_tensor(key))
    if "lm_head.weight" in weights:
        return
    embedding = weights["model.embed_tokens.weight"]
    for path in paths:
        with opened(path) as file:
            if "lm_head.weight" not in file.keys():
                continue
            if not torch.equal(file.get_tensor("lm_head.weight").to(embedding), embedding):
                raise ValueError(
                    f"{path}: lm_head.weight differs from the embeddings it is tied to; set "
                    "tie_word_embeddings to false in config.json to use it"
                )


@contextmanager
def opened(path: Path):
    """A safetensors file; ValueError naming it when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}); fetch the checkpoint again"
        ) from None


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names. ValueError where it is not clear."""
    index_path, single = directory / INDEX, directory / "model.safetensors"
    if not index_path.exists():
        names = sorted(path.name for path in directory.iterdir())
        shards = [name for name in names if WEIGHT_FILE.fullmatch(name)]
        others = [name for name in names if name.endswith((".bin", ".pth", ".pt"))]
        if shards and not single.exists():
            raise ValueError(f"{index_path} is missing, beside {shards[0]}; fetch it again")
        if others and not single.exists():
            raise ValueError(
                f"{directory} has {others[0]} but no model.safetensors; only safetensors files in "
                "Hugging Face's form are read: fetch or convert those"
            )
        return [single]
    where = read_json(index_path).get("weight_map")
    names = set(where.values()) if isinstance(where, dict) else set()
    if not names or not all(
        isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name) for name in names
    ):
        raise ValueError(f"{index_path}: weight_map must name files of this directory")
    if single.exists() and single.name not in names:
        raise ValueError(
            f"{directory} has both {single.name} and {INDEX}, which names other files; "
            "delete the one that is out of date"
        )
    return [directory / name for name in sorted(names)]


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError naming the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}); fetch the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


# --------------------------------------------------------------------------------------- writing


def config_json(config, dtype: torch.dtype) -> dict:
    """A LlamaConfig as transformers and vLLM read it, in the keys that all their versions know."""
    eos = list(config.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_companions(directory: Path) -> dict[str, bytes]:
    """What a save carries along: the tokenizer's files, and all of config and generation_config.

    Read when the weights are, so that a source that is gone or changed later costs a save nothing.
    """
    names = (*CARRIED_FILES, "config.json", "generation_config.json")
    paths = [directory / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def write_checkpoint(directory, config: dict, weights, companions=None, max_shard_bytes=5 * 10**9):
    """Write the directory, whole or not at all; what else it held is kept.

    config: as config_json makes it. weights: key -> tensor, one model.safetensors or shards of at
    most max_shard_bytes. companions: as read_companions gives them; their settings stand where ours
    say nothing else. Raises OSError or ValueError, with `directory` as it was, when it cannot be
    written.
    """
    companions = dict(companions or {})
    before = json.loads(companions.pop("config.json", b"{}"))
    generation = json.loads(companions.pop("generation_config.json", b"{}"))
    for key in ("rope_parameters", "dtype"):  # our spellings of them would contradict these
        before.pop(key, None)
    for key in ("bos_token_id", "eos_token_id"):
        if config[key] is not None or key not in generation:
            generation[key] = config[key]

    shards, size = [[]], 0
    for key, weight in weights.items():
        bytes_needed = weight.numel() * weight.element_size()
        if shards[-1] and size + bytes_needed > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += bytes_needed
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names

    def of_an_older_save(name: str) -> bool:  # which a reader might take for the weights
        return bool(WEIGHT_FILE.fullmatch(name)) or name == INDEX

    with written_whole(directory, replaces=of_an_older_save) as part:
        for name, content in companions.items():
            (part / name).write_bytes(content)
        write_json(part / "config.json", before | config)
        write_json(part / "generation_config.json", generation)
        for name, keys in zip(names, shards, strict=True):
            tensors = {key: weights[key].detach().cpu().contiguous() for key in keys}
            save_file(tensors, part / name, metadata={"format": "pt"})
            # safetensors makes it the owner's alone; others may read what they may of config.json
            shutil.copymode(part / "config.json", part / name)
        if len(shards) > 1:
            total = sum(weight.numel() * weight.element_size() for weight in weights.values())
            where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


@contextmanager
def written_whole(directory: Path, replaces=lambda name: False):
    """A folder beside `directory` to write into; it takes that name when the body ends well.

    Until then `directory` is as it was, whatever happens: what is written reaches the disk before
    the names change. Then what else the old folder held, and `replaces` does not want gone, moves
    over. A kill in between leaves the old folder beside, and the next save puts all that right.
    Raises ValueError where `directory` is a file or the current directory, OSError where it cannot
    be made or replaced.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; name a folder to save to")
    if Path.cwd().is_relative_to(directory):
        raise ValueError(f"{directory} is in use as the current directory; save to another folder")
    part, old = directory.parent / f".{directory.name}.atmanrl-new", set_aside(directory)

    def move_over() -> None:
        for entry in old.iterdir():
            if not replaces(entry.name) and not os.path.lexists(directory / entry.name):
                os.rename(entry, directory / entry.name)
        shutil.rmtree(old)

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not directory.exists():  # a kill left it so
            os.rename(old, directory)
        elif old.exists():
            move_over()
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    except OSError as error:
        raise OSError(f"{directory}: cannot write beside it ({error}); save elsewhere") from None
    try:
        with writing(directory):
            yield part
            if directory.exists():
                shutil.copymode(directory, part)
            for path in (*part.rglob("*"), part):
                sync(path)
        if directory.exists():
            try:
                os.rename(directory, old)
            except OSError as error:  # such as a mount point
                raise OSError(f"{directory} cannot be replaced ({error}); save inside it") from None
        os.rename(part, directory)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        raise
    sync(directory.parent)
    if old.exists():
        move_over()


@contextmanager
def writing(path: Path):
    """An OSError of the body becomes one that says which path cannot be written.

    A full disk is reported without a name, and by safetensors as an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # a sentence already, from below
            raise
        raise OSError(f"{path} cannot be written ({error})") from None


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
