"""Checkpoint directories, read and written; what does not fit is refused with a sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.run.checkpoint import load_config, load_llama, save_llama
from model import Llama, LlamaConfig
from tests import tiny
from tests.test_files import contents, full_disk

ROOT = Path(__file__).parent.parent


def keys_of(folder, pattern="*.safetensors"):
    return {key: file for file in folder.glob(pattern) for key in load_file(file)}


def edit_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.fixture
def saved(tmp_path):
    save_llama(tiny.llama(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_save_and_load_bitwise(tmp_path, tied, limit):
    eos = (3, 5) if tied else (3,)
    changes = {"bos_token_id": 1, "eos_token_ids": eos, "max_position_embeddings": 99}
    model = tiny.llama(tie_word_embeddings=tied, rms_norm_eps=1e-3, **changes)
    save_llama(model, tmp_path / "new" / "folder", max_shard_bytes=limit)
    folder = tmp_path / "new" / "folder"
    loaded = load_llama(str(folder))
    assert tiny.same_weights(model, loaded)
    assert loaded.config == model.config
    assert not list(folder.glob("*.part"))
    expected = {f"model.{name}".replace("model.lm_head", "lm_head") for name in model.state_dict()}
    assert set(keys_of(folder)) == expected
    # Tied: one Parameter, and one tensor in the file.
    assert ("lm_head.weight" in expected) == (not tied)
    assert len(list(model.parameters())) == len(expected)
    files = list(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if limit == 10**9:
        assert [file.name for file in files] == ["model.safetensors"] and not index.exists()
        return
    content = json.loads(index.read_text())
    assert len(files) > 2
    assert content["weight_map"] == {key: file.name for key, file in keys_of(folder).items()}
    assert content["metadata"]["total_size"] == 4 * sum(w.numel() for w in model.parameters())
    for file in files:
        assert sum(4 * tensor.numel() for tensor in load_file(file).values()) <= limit


def test_saving_over_shards_is_what_loads_next(tmp_path):
    save_llama(tiny.llama(seed=1), tmp_path, max_shard_bytes=20_000)
    model = tiny.llama(seed=2)
    save_llama(model, tmp_path)
    assert tiny.same_weights(model, load_llama(tmp_path))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_number_formats_convert_on_loading(tmp_path, stored, wanted):
    model = tiny.llama(dtype=stored)
    save_llama(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {stored}
    written = json.loads((tmp_path / "config.json").read_text())["torch_dtype"]
    assert written == str(stored).removeprefix("torch.")
    loaded = load_llama(tmp_path, dtype=wanted)
    assert tiny.same_weights(loaded, model.to(wanted))


def test_float32_is_the_default(saved):
    save_llama(tiny.llama(dtype=torch.bfloat16), saved)
    assert {w.dtype for w in load_llama(saved).parameters()} == {torch.float32}


def test_tied_checkpoint_may_carry_a_head(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, saved / "model.safetensors")
    assert tiny.same_weights(tiny.llama(), load_llama(saved))


def test_angles_in_old_files_are_left_out(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, saved / "model.safetensors")
    assert tiny.same_weights(tiny.llama(), load_llama(saved))


def test_both_forms_of_rope_config(saved):
    old = load_config(saved)
    assert old.rope_scaling == tiny.LLAMA3 and old.rope_theta == 10000.0
    both = {**tiny.LLAMA3, "rope_theta": 10000.0}
    new_form = {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": both}
    edit_json(saved / "config.json", **new_form, torch_dtype=..., dtype="float32")
    assert load_config(saved) == old
    plain = {"rope_type": "default", "rope_theta": 7.0}
    edit_json(saved / "config.json", rope_parameters=plain)
    config = load_config(saved)
    assert config.rope_scaling is None and config.rope_theta == 7.0


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (7, ..., (7,)),
        ([7, 8], ..., (7, 8)),
        (None, ..., ()),
        (7, [7, 9], (7, 9)),  # generation_config.json knows all stop tokens of an Instruct model
        ([7, 8], 9, (9,)),
    ],
)
def test_stop_tokens(saved, config, generation, expected):
    edit_json(saved / "config.json", eos_token_id=config)
    edit_json(saved / "generation_config.json", eos_token_id=generation)
    assert load_config(saved).eos_token_ids == expected
    (saved / "generation_config.json").unlink()
    expected = () if config is None else (config,) if config == 7 else tuple(config)
    assert load_config(saved).eos_token_ids == expected


def test_absent_head_dim_and_kv_heads(saved):
    edit_json(saved / "config.json", head_dim=..., num_key_value_heads=...)
    config = load_config(saved)
    assert (config.head_dim, config.num_key_value_heads) == (8, 4)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere: no such directory"):
        load_llama(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        load_llama("nowhere")


def test_hub_names_are_fetched(saved, monkeypatch):
    def fetch(name, revision, **options):
        assert (name, revision) == ("owner/name", "v1")
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert tiny.same_weights(tiny.llama(), load_llama("owner/name@v1"))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        cut,
        lambda file: file.write_bytes(b"not a tensor in sight" * 99),
        lambda file: file.write_bytes(b""),
    ],
    ids=["missing", "truncated", "garbage", "empty"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_files_are_named(saved, name, damage):
    damage(saved / name)
    with pytest.raises(ValueError, match=f"{saved}/{name}"):
        load_llama(saved)


def test_damaged_shards_and_index_are_named(tmp_path):
    save_llama(tiny.llama(), tmp_path, max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    cut(shard)
    with pytest.raises(ValueError, match=str(shard)):
        load_llama(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=str(shard)):
        load_llama(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    cut(index)
    with pytest.raises(ValueError, match=str(index)):
        load_llama(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "model.bin"],
)
def test_index_may_only_name_files_beside_it(tmp_path, name):
    folder = tmp_path / "inner"
    save_llama(tiny.llama(), tmp_path)  # a readable checkpoint one level up
    save_llama(tiny.llama(), folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=f"{index}: weight_map must name files"):
        load_llama(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": ...}, "model_type is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; give an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_attention_heads": ...}, "num_attention_heads"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number above 0, not '2'"),
        ({"vocab_size": True}, "vocab_size"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": -1}, "rope_theta"),
        (
            {"rope_scaling": tiny.LLAMA3 | {"factor": "8"}},
            "factor must be a number above 0, not '8'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"intermediate_size": 1024}, "asks for"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unreadable_configs_are_named(saved, changes, message):
    edit_json(saved / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{saved}/.*config.json.*{message}"):
        load_llama(saved)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.update({"model.layers.2.extra": torch.ones(1)}), "model.layers.2.extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(1)}), r"model.norm.weight .*\(1,\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
            "model.norm.weight is in F8_E4M3; quantised",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "I8; quant"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "unexpected tensor model.layers.0.self_attn.q_proj.bias",
        ),
    ],
    ids=["missing", "surplus", "misshapen", "float8", "int8", "bias"],
)
def test_wrong_tensors_are_named(saved, edit, message):
    tensors = load_file(saved / "model.safetensors")
    edit(tensors)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"{saved}/model.safetensors: .*{message}"):
        load_llama(saved)


@pytest.fixture
def shards(tmp_path):
    """A checkpoint of several shards, and its index as shards hold it."""
    save_llama(tiny.llama(), tmp_path / "shards", max_shard_bytes=20_000)
    return tmp_path / "shards", keys_of(tmp_path / "shards")


def put(file, **tensors):
    """Set tensors of a file; ... takes one out."""
    content = load_file(file) | tensors
    save_file({key: value for key, value in content.items() if value is not ...}, file)


@pytest.mark.parametrize("value", [torch.zeros(32), torch.full((32,), torch.nan), torch.ones(3)])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_tensor_comes_from_the_file_that_the_index_names(shards, place, value):
    folder, files = shards
    key = "model.norm.weight"
    others = sorted({file for file in files.values() if file != files[key]})
    put(others[place], **{key: value})
    (folder / "model-00009-of-00009.safetensors").write_bytes(others[0].read_bytes())
    assert tiny.same_weights(tiny.llama(), load_llama(folder))
    put(files[key], **{key: ...})  # the other file's is not taken in its place
    with pytest.raises(ValueError, match=f"^{files[key]}: 1 tensors are missing, such as {key}"):
        load_llama(folder)


def test_a_tensor_that_the_index_leaves_out_is_named(shards):
    folder, files = shards
    index = folder / "model.safetensors.index.json"
    weight_map = {key: file.name for key, file in files.items() if key != "model.norm.weight"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"^{index}: 1 tensors .* model.norm.weight"):
        load_llama(folder)


@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [
        (torch.nan, torch.float32, torch.float32),
        (torch.inf, torch.float32, torch.float32),
        (-torch.inf, torch.bfloat16, torch.bfloat16),
        (torch.nan, torch.float16, torch.float32),
        (1e300, torch.float64, torch.float32),
        (-1e5, torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_values_that_are_no_weights_are_named(shards, name, value, stored, dtype):
    folder, files = shards
    tensor = load_file(files[name])[name].to(stored)
    tensor.view(-1)[7] = value
    put(files[name], **{name: tensor})
    with pytest.raises(ValueError, match=f"^{files[name]}: {name} has NaN, infinity or .*{dtype}"):
        load_llama(folder, dtype=dtype)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"]
    + ["special_tokens_map.json", "added_tokens.json", "tokenizer.json", "chat_template.jinja"],
)
def test_what_stands_in_the_place_of_a_file_is_named(saved, name, monkeypatch):
    file = saved / name
    if file.exists():
        monkeypatch.setattr("os.access", lambda path, mode: path != file)  # root may read all
        with pytest.raises(ValueError, match=f"^{file} may not be read by you"):
            load_llama(saved)
        monkeypatch.undo()
        file.unlink()
    file.symlink_to("../../blobs/0123")
    with pytest.raises(ValueError, match=f"^{file} is a broken link .to ../../blobs/0123"):
        load_llama(saved)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=f"^{file} is a folder"):
        load_llama(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_called_that(saved, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
    (saved / name).write_text(pointer)
    with pytest.raises(ValueError, match=f"^{saved / name} is a Git LFS pointer.*git lfs pull"):
        load_llama(saved)


@pytest.mark.parametrize("key", ["model.layers.9.mlp.up_proj.weight", "model.a.inv_freq_"])
def test_a_tensor_that_the_index_alone_has_is_named(shards, key):
    folder, files = shards
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    left_out = {"model.layers.0.self_attn.rotary_emb.inv_freq": "model.norm.weight"}
    left_out |= {"lm_head.weight": "model.norm.weight"}
    for added in (left_out, left_out | {key: "model.norm.weight"}):
        named = {name: files[like].name for name, like in added.items()}
        index.write_text(json.dumps({"weight_map": named | content["weight_map"]}))
        if key not in added:
            load_llama(folder)
    with pytest.raises(ValueError, match=f"^{files['model.norm.weight']}: 1 tensors are .*{key}$"):
        load_llama(folder)


def test_a_shard_that_is_a_broken_link_is_named(shards):
    folder, files = shards
    files["model.norm.weight"].unlink()
    with pytest.raises(ValueError, match=f"^{files['model.norm.weight']} is missing; fetch"):
        load_llama(folder)
    files["model.norm.weight"].symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"^{files['model.norm.weight']} is a broken link"):
        load_llama(folder)


def test_two_sets_of_weights_are_named(tmp_path):
    save_llama(tiny.llama(seed=1), tmp_path / "a", max_shard_bytes=20_000)
    save_llama(tiny.llama(seed=2), tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match="a has both model.safetensors and model.safetensors.ind"):
        load_llama(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="index.json is missing, beside model-00001-of"):
        load_llama(tmp_path / "a")


def test_a_tied_head_of_its_own_is_named(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"{saved}/model.safetensors: lm_head.weight differs"):
        load_llama(saved)
    tensors["lm_head.weight"] = torch.ones(3)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight has shape"):
        load_llama(saved)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("[enforce fail] not enough memory: you tried to allocate 9 bytes\nmore", ValueError,
         "GiB of weights do not fit on cpu .*not enough memory"),
        ("CUDA error: invalid device ordinal", RuntimeError, "invalid device"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_in_memory_are_named(text, kind, said, saved, monkeypatch):
    def broken(self, device):
        raise RuntimeError(text)

    monkeypatch.setattr(Llama, "to_empty", broken)
    with pytest.raises(kind, match=said):
        load_llama(saved)


def test_other_weight_formats_are_named(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=f"{saved}: has pytorch_model.bin but no"):
        load_llama(saved)


@pytest.mark.parametrize("stops", [64, -1, "2", [2, 99], []])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_stop_tokens_outside_the_vocabulary_are_named(saved, name, stops):
    edit_json(saved / "generation_config.json", eos_token_id=None)
    edit_json(saved / name, eos_token_id=stops)
    with pytest.raises(ValueError, match=f"{saved}/{name}: eos_token_id must be a token id below"):
        load_llama(saved)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_one_extra_shard_at_most(tmp_path):
    """Peak memory of a process that loads 100 MB in shards of 20 MB, tiny load before it aside."""
    shape = {"vocab_size": 10_000, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    big = Llama(LlamaConfig(**tiny.SHAPE | shape | {"num_hidden_layers": 5}))
    save_llama(big, tmp_path / "big", max_shard_bytes=20 * 10**6)
    save_llama(tiny.llama(), tmp_path / "tiny")
    script = """
import sys
from lab.run.checkpoint import load_llama
def peak():  # bytes; unlike getrusage's figure it forgets what ran before exec
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
load_llama(sys.argv[1] + "/tiny")
before = peak()
model = load_llama(sys.argv[1] + "/big")
print(peak() - before, sum(w.numel() * 4 for w in model.parameters()))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    peak, size = map(int, out.split())
    assert size > 90 * 10**6
    assert size / 2 < peak < size + 25 * 10**6


# Saving: the folder appears whole or not at all, with what belongs beside the weights


def test_what_belongs_beside_the_weights_goes_along(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    save_llama(tiny.llama(eos_token_ids=(2, 3)), source)
    tokenizer_files = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{ }",
        "special_tokens_map.json": "{  }",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in tokenizer_files.items():
        (source / name).write_text(text)
    (source / "optimizer.bin").write_text("not a part of the checkpoint")
    new_form = {"rope_theta": 10000.0, **tiny.LLAMA3}
    edit_json(source / "config.json", rope_parameters=new_form, rope_scaling=..., rope_theta=...)
    edit_json(source / "config.json", torch_dtype=..., dtype="bfloat16", pad_token_id=5)
    edit_json(source / "generation_config.json", temperature=0.6)
    target.mkdir()
    (target / "notes").mkdir()
    (target / "notes" / "mine.txt").write_text("keep me")
    (target / "model-00001-of-00001.safetensors").write_text("an older save's")
    (target / "model.safetensors.index.json").write_text("an older save's")
    for name in ("model_best.safetensors", "model-ema.safetensors"):
        (target / name).write_text("not named as a save names them")

    save_llama(load_llama(source), target)

    assert sorted(path.name for path in target.iterdir()) == sorted(
        [*tokenizer_files, "config.json", "generation_config.json", "model.safetensors", "notes"]
        + ["model_best.safetensors", "model-ema.safetensors"]
    )
    assert (target / "notes" / "mine.txt").read_text() == "keep me"
    for name, text in tokenizer_files.items():
        assert (target / name).read_text() == text
    config = json.loads((target / "config.json").read_text())
    assert config["pad_token_id"] == 5 and config["torch_dtype"] == "float32"
    assert config["rope_scaling"] == tiny.LLAMA3 and config["rope_theta"] == 10000.0
    assert "rope_parameters" not in config and "dtype" not in config
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "bos_token_id": None, "eos_token_id": [2, 3]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_saving_onto_itself_and_after_the_source_is_gone(tmp_path):
    save_llama(tiny.llama(), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    model = load_llama(tmp_path / "a")
    before = contents(tmp_path / "a")
    save_llama(model, tmp_path / "a")
    assert contents(tmp_path / "a") == before
    shutil.rmtree(tmp_path / "a")  # the tokenizer's file was read with the weights
    save_llama(model, tmp_path / "b")
    assert contents(tmp_path / "b") == before


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_llama(tiny.llama(), tmp_path / "target")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "target").iterdir()} == {0o640}


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    """safetensors reports a full disk by an error of its own."""
    save_llama(tiny.llama(seed=1), tmp_path / "target")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="target cannot be written .*File too large"):
        with full_disk(40_000):
            save_llama(tiny.llama(seed=2), tmp_path / "target")
    assert contents(tmp_path) == before
