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
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
NUMBER_FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
    rope_theta inside. Absent fields take transformers' defaults for a Llama. Raises ValueError
    naming the file, the key and what is wrong with it.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}; only llama is read")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act is {raw['hidden_act']!r}; only silu is known")
    for flag in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(flag):
            raise ValueError(f"{path}: {flag} is set; this Llama has no such weights")

    def number(value, key: str, whole: bool = False):
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            kind = "whole number" if whole else "number"
            raise ValueError(f"{path}: {key} must be a {kind} above 0, not {value!r}")
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

    vocab_size, heads = whole("vocab_size"), whole("num_attention_heads")
    kv_heads = whole("num_key_value_heads", heads)
    head_dim = whole("head_dim", whole("hidden_size") // heads)
    if heads % kv_heads:
        raise ValueError(f"{path}: {heads} attention heads cannot share {kv_heads} key-value heads")
    if head_dim % 2:
        raise ValueError(f"{path}: head_dim {head_dim} is odd; RoPE turns pairs")
    eos_ids = read_stop_ids(directory)
    for token in eos_ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"{directory}: eos_token_id {token!r} is not in the vocabulary")
    return {
        "vocab_size": vocab_size,
        "hidden_size": whole("hidden_size"),
        "intermediate_size": whole("intermediate_size"),
        "num_hidden_layers": whole("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": number(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        "rope_theta": number(10000.0 if theta is None else theta, "rope_theta"),
        "rope_scaling": scaling,
        "max_position_embeddings": whole("max_position_embeddings", 2048),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": eos_ids,
    }


def read_stop_ids(directory: Path) -> tuple:
    """eos_token_id, an int or a list: generation_config.json's, where Instruct models list all."""
    eos = read_json(directory / "config.json").get("eos_token_id")
    path = directory / "generation_config.json"
    if path.exists():
        stops = read_json(path).get("eos_token_id")
        eos = eos if stops is None else stops
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def read_weights(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Fill `weights` (key in the files -> tensor, any float format) in place, tensor by tensor.

    The files are mapped, not read: beyond `weights` at most one shard is in memory. Where `weights`
    has no lm_head.weight (tied) a file may carry one all the same, as some tuned checkpoints do,
    and old ones the angles of RoPE: both are left out. Raises ValueError naming the file for a
    missing, surplus or misshapen tensor, one that is quantised, and a damaged file.
    """
    missing = set(weights)
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if key not in weights:
                        if key == "lm_head.weight" or key.endswith("rotary_emb.inv_freq"):
                            continue
                        raise ValueError(f"{path}: unexpected tensor {key}")
                    tensor, wanted = file.get_tensor(key), tuple(weights[key].shape)
                    if tensor.shape != wanted:
                        raise ValueError(
                            f"{path}: {key} has shape {tuple(tensor.shape)}, "
                            f"config.json asks for {wanted}"
                        )
                    if tensor.dtype not in NUMBER_FORMATS:
                        raise ValueError(
                            f"{path}: {key} is in {tensor.dtype}; quantised weights are not read"
                        )
                    weights[key].copy_(tensor)
                    missing.discard(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}); fetch the checkpoint again"
            ) from None
    if missing:
        raise ValueError(
            f"{directory}: the weights lack {len(missing)} tensors, for example {min(missing)}"
        )


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names. ValueError where there is neither."""
    index_path, single = directory / INDEX, directory / "model.safetensors"
    if not index_path.exists():
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pth", ".pt"))
        if others and not single.exists():
            raise ValueError(
                f"{directory} has {others[0]} but no model.safetensors; only safetensors files in "
                "Hugging Face's form are read: fetch or convert those"
            )
        return [single]
    where = read_json(index_path).get("weight_map")
    names = where.values() if isinstance(where, dict) else ()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index_path}: weight_map must name files of this directory")
    return [directory / name for name in sorted(set(names))]


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError naming the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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


def write_checkpoint(directory, config: dict, weights, beside=None, max_shard_bytes=5 * 10**9):
    """Write the whole directory; what else it held before is kept.

    config: as config_json makes it. weights: key -> tensor, one model.safetensors or shards of at
    most max_shard_bytes. beside: the directory whose tokenizer files go along, and whose
    config.json and generation_config.json settings, where these say nothing else; or None. Raises
    OSError, with `directory` as it was, when it cannot be written.
    """
    directory, beside = Path(directory), beside and Path(beside)
    carried = [beside / name for name in CARRIED_FILES] if beside else []
    if beside and not beside.is_dir():
        warnings.warn(f"{beside} is gone: {directory} gets no tokenizer files", stacklevel=2)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    if beside and (beside / "config.json").is_file():
        # Keys that mean the same as some of ours, in the other spelling, would contradict them.
        config = _without(read_json(beside / "config.json"), "rope_parameters", "dtype") | config
    if beside and (beside / "generation_config.json").is_file():
        known = {key: value for key, value in generation.items() if value is not None}
        generation |= read_json(beside / "generation_config.json") | known

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

    with written_whole(directory) as part:
        for entry in directory.iterdir() if directory.is_dir() else ():
            if entry.match("model*.safetensors") or entry.name == INDEX:
                continue  # an older save's, which a reader might take for the weights
            copy = shutil.copytree if entry.is_dir() else shutil.copy2
            copy(entry, part / entry.name)
        for entry in carried:
            if entry.is_file():
                shutil.copyfile(entry, part / entry.name)
        for name, keys in zip(names, shards, strict=True):
            tensors = {key: weights[key].detach().cpu().contiguous() for key in keys}
            try:
                save_file(tensors, part / name, metadata={"format": "pt"})
            except SafetensorError as error:  # how it reports a full disk
                raise OSError(f"{directory} cannot be written ({error})") from None
            os.chmod(part / name, 0o644)  # safetensors makes it the owner's alone
        if len(shards) > 1:
            total = sum(weight.numel() * weight.element_size() for weight in weights.values())
            where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        write_json(part / "config.json", config)
        write_json(part / "generation_config.json", generation)


@contextmanager
def written_whole(directory: Path):
    """A folder beside `directory` to write into; it takes that name when the body ends well.

    Until then `directory` is as it was, whatever happens: what is written reaches the disk before
    the names change. A kill between the two renames leaves the old folder as .NAME.old, and the
    next save puts it back first. Raises ValueError where `directory` is a file.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; name a folder to save to")
    part = directory.with_name(f".{directory.name}.part")
    old = directory.with_name(f".{directory.name}.old")
    directory.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not directory.exists():
        os.rename(old, directory)
    for leftover in (part, old):  # of a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for path in (*part.rglob("*"), part):
            sync(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if directory.exists():
        os.rename(directory, old)
    os.rename(part, directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _without(content: dict, *keys: str) -> dict:
    return {key: value for key, value in content.items() if key not in keys}
