"""Hub names through huggingface_hub's own code, against a stand-in for the hub on this machine."""

import ast
import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from lab.run.hub import INDEX, NO_NAME, checkpoint_directory, weights_directory

ROOT = Path(__file__).parent.parent
NAME = "owner/name"
MAIN, TAGGED = "a" * 40, "b" * 40  # commits
SHARDS = ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"]
WANTED = [*SHARDS, INDEX, "config.json", "generation_config.json", "tokenizer.json"]
WANTED += ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
UNWANTED = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "name-q4.gguf"]
UNWANTED += ["original/consolidated.00.pth", "original/tokenizer.model", "original/config.json"]
UNWANTED += ["adapter_model.safetensors", "model-4-of-bits/model.safetensors"]
PAGE = "https://huggingface.co/owner/name"
AGAIN = "run again with a network, or "
ELSEWHERE = "`hf download owner/name --local-dir DIR` elsewhere and --model DIR here"
HELD = "no such directory, no complete copy in the hub's cache, and "


class StandIn(ThreadingHTTPServer):
    """The few answers of the hub that a download asks for; `asked` lists the files sent."""

    request_queue_size = 64  # with the usual 5 some connections wait a second

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
        main = {path: f"{path} of main".encode() * 99 for path in WANTED + UNWANTED} | {
            INDEX: index
        }
        tagged = {"config.json": b"older", "model.safetensors": b"older weights"}
        self.files = {MAIN: main, TAGGED: tagged}
        self.revisions = {"main": MAIN, "v1": TAGGED, "refs/pr/1": TAGGED}
        self.refused = {}  # "info" or "files" -> (status, X-Error-Code, X-Error-Message)
        self.cut = None  # the file that stops coming halfway
        self.asked = []


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, urlsplit(self.path).path
        info = re.fullmatch(f"/api/models/{NAME}/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(f"/{NAME}/resolve/([^/]+)/(.+)", path)
        kind, status = ("info", 404) if path.startswith("/api") else ("files", 404)
        if kind in hub.refused:
            return self.refuse(*hub.refused[kind])
        if not (info or file):
            return self.refuse(status, "RepoNotFound", "Repository not found")
        revision = unquote(info[2] if info else file[1])
        commit = hub.revisions.get(revision, revision)
        if commit not in hub.files:
            return self.refuse(status, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = hub.files[commit]
        if info and info[1] == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer(json.dumps({"id": NAME, "sha": commit, "siblings": siblings}))
        if info:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{commit}{name}"}
                for name, content in files.items()
            ]
            return self.answer(json.dumps(tree))
        name = unquote(file[2])
        if self.command == "GET":
            hub.asked.append(name)
        tag = {"ETag": f'"{commit[:4]}{name}"', "X-Repo-Commit": commit}
        self.answer(files[name], tag, cut=name == hub.cut)

    do_HEAD = do_GET

    def refuse(self, status, code, message):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer("", headers, status)

    def answer(self, body, headers=None, status=200, cut=False):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            ranged = "Range" in self.headers  # the retries of a cut file: they get nothing at all
            self.wfile.write(body[: 0 if ranged else len(body) // 2] if cut else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module", autouse=True)
def session():
    """One network session for this file; it reads the proxies as the first test starts it."""
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, running, and an empty cache; no token and no setting of this machine."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    settings = {  # read from the environment as the package was imported, maybe by another test
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    point_to(server.url, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the retries
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def point_to(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def disconnect(monkeypatch):
    """From now on nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    point_to(f"http://127.0.0.1:{port}", monkeypatch)


def stored(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def refused(name=NAME, flag="--model"):
    """The sentence after "--model NAME: "."""
    with pytest.raises(FileNotFoundError) as refusal:
        checkpoint_directory(name, flag)
    sentence = str(refusal.value)
    assert sentence.startswith(f"{flag} {name}: ") and "\n" not in sentence
    return sentence.removeprefix(f"{flag} {name}: ")


# ------------------------------------------------------------------------------------------ local


def test_a_local_directory_wins_and_is_returned_as_it_is(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (NAME, f"{NAME}@v1"):
        Path(name).mkdir(parents=True)
        assert checkpoint_directory(name) == Path(name)
    assert checkpoint_directory(tmp_path) == tmp_path
    assert hub.asked == []


@pytest.mark.parametrize(
    "name",
    ["", "nowhere", "/no/where", "./nowhere", "../no/where", "a/b/c", "owner/name/", "owner/name@"]
    + ["owner/name@/x", "owner/na me", "hf://owner/name", "owner/na--me", "owner/name.git"],
)
def test_what_is_neither_a_directory_nor_a_hub_name(hub, name):
    assert refused(name) == NO_NAME
    assert refused(name, "--compare") == NO_NAME


def test_nothing_is_fetched_where_none_is_to_be(hub, tmp_path):
    assert checkpoint_directory(NAME, fetch=False) is None and hub.asked == []
    assert checkpoint_directory(tmp_path, fetch=False) == tmp_path
    with pytest.raises(FileNotFoundError, match="--model data/micro9: no such directory"):
        checkpoint_directory("data/micro9", fetch=False)


def test_what_stands_in_the_place_of_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/file").touch()
    assert refused("runs/file") == "a file; give the directory it is in"
    assert refused("x" * 999) == "cannot be opened (File name too long)"


@pytest.mark.parametrize("name", ["runs/checkpoint", "runs/checkpoint/", "a/longer/path"])
def test_a_save_cut_short_between_its_two_renames(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    previous = path.parent / f".{path.name}.atmanrl-old"
    previous.mkdir(parents=True)
    assert refused(name) == (
        "no such directory, a save was cut short; rename the checkpoint before it back: "
        f"mv {tmp_path / previous} {tmp_path / path}"
    )
    path.mkdir()
    assert checkpoint_directory(name) == path


@pytest.mark.parametrize(
    "name",
    ["data/micro", "data/micro2", "./data/micro", "data/micro/", "data//micro2", "data/x/../micro"],
)
def test_the_shipped_checkpoints_from_another_folder(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # nobody is asked
    shipped = ROOT / os.path.normpath(name)
    assert checkpoint_directory(name) == weights_directory(name) == shipped
    Path("data/x").mkdir(parents=True)
    Path(os.path.normpath(name)).mkdir()
    assert checkpoint_directory(name) == Path(name)  # what is here goes first


@pytest.mark.parametrize(
    "name", ["data/micro3", "data/micro@main", "data/micro-2", "data/micro2@v1"]
)
def test_no_hub_is_asked_for_a_name_like_the_shipped_ones(hub, tmp_path, monkeypatch, name):
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        said = f"no such directory, here or in {ROOT}, and no hub is asked for it"
        assert refused(name) == said and refused(name, "--compare") == said


def test_a_broken_link_in_the_place_of_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    Path("owner/name").symlink_to("../gone")
    Path("runs").symlink_to("/no/where")
    Path("itself").symlink_to("itself")
    then = "copy what it leads to, or fetch it again"
    assert refused("owner/name") == f"is a broken link (to ../gone): {then}"
    assert refused("runs/a") == f"lies behind runs, which is a broken link (to /no/where): {then}"
    assert refused("itself") == f"is a broken link (to itself): {then}"
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read all
    Path("mine").mkdir()
    assert refused("mine") == "may not be read by you: change its permissions"


def test_the_folder_of_a_run_stands_for_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / "config.json").touch()  # the settings of the run
    assert (
        weights_directory(str(run)) == run
    )  # nothing was saved yet: it is said of the folder named
    (run / "checkpoint/config.json").touch()
    assert weights_directory(str(run)) == run / "checkpoint"
    assert weights_directory(str(run / "checkpoint")) == run / "checkpoint"
    (run / INDEX).touch()  # weights of its own win
    assert weights_directory(str(run)) == run
    with pytest.raises(FileNotFoundError, match="--compare nowhere: "):
        weights_directory("nowhere", "--compare")


# --------------------------------------------------------------------------------------- download


def test_only_what_is_read_is_downloaded(hub):
    directory = checkpoint_directory(NAME)
    assert stored(directory) == sorted(WANTED) == sorted(hub.asked)
    for name in WANTED:
        assert (directory / name).read_bytes() == hub.files[MAIN][name]


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", TAGGED])
def test_a_pinned_revision(hub, revision, monkeypatch):
    directory = checkpoint_directory(f"{NAME}@{revision}")
    assert (directory / "model.safetensors").read_bytes() == b"older weights"
    assert stored(directory) == ["config.json", "model.safetensors"]
    hub.files[TAGGED] = hub.files[MAIN]  # cannot be for a commit; shows what is looked at
    assert checkpoint_directory(f"{NAME}@{revision}") == directory


@pytest.mark.parametrize("name", [NAME, f"{NAME}@v1", f"{NAME}@{TAGGED}"])
def test_without_a_network_the_copy_in_the_cache_serves(hub, name, monkeypatch):
    directory = checkpoint_directory(name)
    hub.asked.clear()
    assert checkpoint_directory(name) == directory and hub.asked == []
    disconnect(monkeypatch)
    assert checkpoint_directory(name) == directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_directory(name) == directory


def test_a_copy_in_the_cache_serves_when_the_hub_or_a_proxy_fails(hub, monkeypatch):
    directory = checkpoint_directory(NAME)
    for kind in ("info", "files"):
        hub.refused = {kind: (503, None, "down")}
        assert checkpoint_directory(NAME) == directory
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    huggingface_hub.close_session()  # the next one reads the proxies anew
    try:
        assert checkpoint_directory(NAME) == directory
    finally:
        huggingface_hub.close_session()


def test_a_download_cut_short(hub, monkeypatch):
    hub.cut = SHARDS[1]
    sentence = refused()
    assert sentence.startswith(f"{HELD}the hub did not deliver (")
    assert sentence.endswith(f"); {AGAIN}{ELSEWHERE}")
    hub.asked.clear()
    with monkeypatch.context() as without_network:
        disconnect(without_network)
        assert refused().endswith(f"; {AGAIN}{ELSEWHERE}")
        without_network.setattr(constants, "HF_HUB_OFFLINE", True)
        assert refused().endswith(f"HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE, or {ELSEWHERE}")
    hub.cut = None
    assert stored(checkpoint_directory(NAME)) == sorted(WANTED)
    assert SHARDS[1] in hub.asked and SHARDS[0] not in hub.asked  # only what was missing


def test_a_shard_that_the_repository_itself_lacks(hub):
    del hub.files[MAIN][SHARDS[1]]
    assert refused() == f"its copy in the hub's cache lacks {SHARDS[1]}; {AGAIN}{ELSEWHERE}"


@pytest.mark.parametrize("damage", [b"{", b"{}", b"\xff"])
def test_a_damaged_index_is_left_to_who_reads_it(hub, damage):
    hub.files[MAIN][INDEX] = damage
    assert stored(checkpoint_directory(NAME)) == sorted(WANTED)


@pytest.mark.parametrize("others", [["config.json", "pytorch_model.bin"], ["name.gguf"], []])
def test_a_repository_without_safetensors(hub, others):
    hub.files[MAIN] = {name: b"content" for name in others}
    assert refused() == (
        "its copy in the hub's cache lacks model.safetensors; name a repository with safetensors "
        "(.bin, .pth and .gguf are not read) or, if the download was cut short, run again with a "
        "network"
    )


@pytest.mark.parametrize(
    ("files", "found", "arguments", "needs"),
    [
        (["a.Q4_1.gguf", "b.gguf"], "a.Q4_1.gguf", ", gguf_file='a.Q4_1.gguf'", " and gguf are"),
        (["config.json", "training_args.bin", "pytorch_model.bin"], "pytorch_model.bin", "", " is"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
         "pytorch_model-00001-of-00002.bin", "", " is"),
        (["tokenizer.json", "weights.pt"], "weights.pt", "", " is"),
    ],
)  # fmt: skip
def test_a_folder_in_another_format_is_told_how_to_convert_it(
    files, found, arguments, needs, tmp_path
):
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / "model-notes.txt").touch()
    said = refused(str(tmp_path), "--compare")
    assert said.startswith(f"has {found} but no model.safetensors")
    assert f"where transformers{needs} installed" in said
    assert ("name it pytorch_model.bin before" in said) == (found == "weights.pt")
    command = said.split('python -c "')[1].split('"; then give OUT')[0]
    ast.parse(command)
    for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
        call = f"transformers.{kind}.from_pretrained({str(tmp_path)!r}{arguments})"
        assert f"{call}.save_pretrained('OUT')" in command
    (tmp_path / "model-00001-of-00002.safetensors").touch()  # then it is for who reads them
    assert checkpoint_directory(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.safetensors"])
def test_metas_own_files_are_not_to_be_renamed(tmp_path, name):
    (tmp_path / name).touch()
    assert refused(str(tmp_path)).endswith("are read; fetch the model in Hugging Face's form")


@pytest.mark.parametrize("name", ["llama.safetensors", "model.fp16.safetensors"])
def test_weights_under_another_name(tmp_path, name):
    (tmp_path / name).touch()
    advice = "if it is the model, rename it so"
    assert refused(str(tmp_path)) == f"has {name} but no model.safetensors; {advice}"


@pytest.mark.parametrize(
    "name",
    ["imatrix.bin", "name-imatrix.gguf", "tokenizer.bin", "training_args.bin", "optimizer.bin"]
    + [
        "optimizer.pt",
        "scheduler.bin",
        "scheduler.pt",
        "lr_scheduler.pt",
        "scaler.pt",
        "sampler.bin",
    ]
    + ["rng_state_0.pth", "random_states_0.pt", "mmproj-f16.gguf", "ggml-vocab-llama.gguf"]
    + ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer.safetensors", "vocab.bin"],
)
def test_what_a_trainer_leaves_is_not_taken_for_weights(tmp_path, name):
    (tmp_path / name).touch()
    assert checkpoint_directory(tmp_path) == tmp_path  # who reads it says what is missing
    (tmp_path / "zoptimus-tokenizer.gguf").touch()
    assert "has zoptimus-tokenizer.gguf but no model.safetensors" in refused(str(tmp_path))


@pytest.mark.parametrize(
    "files",
    [
        ["adapter_config.json", "adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.bin", "tokenizer.json", "training_args.bin"],
        ["adapter_config.json"],
        ["adapter_model.safetensors", "config.json", "optimizer.pt", "rng_state.pth"],
        ["adapter_config.json", "adapters.safetensors"],
        ["pytorch_lora_weights.safetensors"],
        ["adapter_0.pt", "config.json"],
        ["adapter_config.json", "adapter_model.safetensors", "base.Q4_K_M.gguf"],
    ],
)
def test_a_lora_adapter_is_called_that(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    said = "this is a LoRA adapter: merge it into its base model first (peft's merge_and_unload), "
    said += "then give that folder"
    assert refused(str(tmp_path)) == said
    (tmp_path / "model.safetensors").touch()
    if files == ["adapter_config.json"]:  # its settings alone, beside weights that have it in them
        assert checkpoint_directory(tmp_path) == tmp_path
    else:
        found = next(name for name in files if name != "adapter_config.json")
        assert refused(str(tmp_path)).startswith(said)
        assert refused(str(tmp_path)).endswith(f"have it in them, move {found} away")


def test_an_adapter_on_the_hub_is_called_that(hub):
    hub.files[MAIN] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"content"}
    assert refused().startswith("this is a LoRA adapter: merge it")
    assert hub.asked == ["adapter_config.json"]


# --------------------------------------------------------------------------------------- refusals

ABSENT = (
    "no such directory, and on the hub no such repository or a private one; check the spelling, or "
    "`hf auth login` (or set HF_TOKEN) as someone who may read it"
)
GATED = f"get access at {PAGE}, then `hf auth login` or set HF_TOKEN"
TOKEN = "the hub refuses the token; `hf auth login` again, or correct or unset HF_TOKEN"


@pytest.mark.parametrize(
    "kind, answer, sentence",
    [
        ("files", (401, "GatedRepo", "It is restricted."), f"gated (It is restricted.); {GATED}"),
        ("files", (403, "GatedRepo", "You are not in."), f"gated (You are not in.); {GATED}"),
        ("info", (404, "RepoNotFound", "Repository not found"), ABSENT),
        ("info", (401, "RepoNotFound", "Invalid username or password."), ABSENT),
        ("info", (401, None, "Invalid credentials in Authorization header"), TOKEN),
    ],
    ids=["gated", "not granted", "absent", "private", "token"],
)
def test_the_hub_says_no(hub, kind, answer, sentence):
    hub.refused = {kind: answer}
    assert refused() == sentence


def test_an_absent_repository_and_an_absent_revision(hub):
    assert refused("runs/chekpoint") == ABSENT
    for revision in ("v9", "c" * 40, "v1/../x"):
        assert refused(f"{NAME}@{revision}") == (
            f"no such revision; give a branch, tag or commit ({PAGE}/commits)"
        )


def test_nobody_listens(hub, monkeypatch):
    disconnect(monkeypatch)
    why = f"the hub did not deliver ([Errno {errno.ECONNREFUSED}] Connection refused)"
    sentence = f"{HELD}{why}; {AGAIN}{ELSEWHERE}"
    assert refused() == sentence
    assert refused(flag="--compare") == sentence.replace("--model", "--compare")
    assert refused(f"{NAME}@v1") == sentence.replace("name --local", "name --revision v1 --local")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused() == f"{HELD}HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE, or {ELSEWHERE}"


def test_the_hub_is_down_or_wants_another_kind_of_token(hub):
    why = re.escape(f"{HELD}the hub did not deliver (")
    hub.refused = {"info": (503, None, "down")}
    assert re.fullmatch(why + r".*503 .*\); run again .*", refused())
    hub.refused = {"info": (403, None, "Please enable access to gated repositories")}
    assert re.fullmatch(why + r"403 Forbidden: Please enable .*\); run again .*", refused())


FULL = "no space left for CACHE; free some, or set HF_HOME to a larger disk"


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.ENOSPC, "whatever the language"), FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), FULL),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), FULL),
        (
            PermissionError(errno.EACCES, "Permission denied", "/home/of/another"),
            "no permission for /home/of/another; set HF_HOME to a folder of your own",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "no permission for CACHE; set HF_HOME to a folder of your own",
        ),
        (
            ValueError("something else\nand more of it"),
            f"{HELD}the hub did not deliver (something else); {AGAIN}{ELSEWHERE}",
        ),
        (TimeoutError(), f"{HELD}the hub did not deliver (TimeoutError); {AGAIN}{ELSEWHERE}"),
    ],
    ids=["disk full", "quota", "xet", "not mine", "read-only", "unknown", "wordless"],
)
def test_the_disk_says_no_or_nobody_knows(hub, monkeypatch, error, sentence):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert refused() == sentence.replace("CACHE", constants.HF_HUB_CACHE)


def test_an_interrupt_is_not_explained_away(hub, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_directory(NAME)


# ------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("rank, shown", [(None, True), ("0", True), ("1", False)])
def test_bars_on_one_rank_of_a_machine(hub, monkeypatch, capfd, rank, shown):
    huggingface_hub.utils.enable_progress_bars()
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    checkpoint_directory(NAME)
    assert ("Fetching" in capfd.readouterr().err) == shown
    huggingface_hub.utils.enable_progress_bars()


def test_ranks_share_one_download_and_the_environment_is_the_hubs(hub, tmp_path):
    """Three processes as under torchrun, set up by the environment alone; then one offline."""
    code = f"from lab.run import hub; print(hub.checkpoint_directory({NAME!r}))"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def start(**more):
        environment = os.environ | settings | more
        environment.pop("HF_HUB_CACHE", None)
        command = [sys.executable, "-c", code]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )

    ranks = [start(LOCAL_RANK=str(rank)) for rank in range(3)]
    (directory,) = {rank.communicate()[0].strip() for rank in ranks}
    assert stored(Path(directory)) == sorted(WANTED) == sorted(hub.asked)
    hub.refused = {"info": (503, None, "down"), "files": (503, None, "down")}
    assert start(HF_HUB_OFFLINE="1").communicate()[0].strip() == directory
