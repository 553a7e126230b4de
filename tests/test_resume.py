"""What ends a run early costs nothing: kills, signals, damage, a full disk, and the way back.

Nearly all runs are train.main() in this process or in forks of it, which is faster than a process
each. The long form of the kills, by the clock too, is tests/kills.py.
"""

import errno
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from lab.measure.folder import EvalFolder
from lab.run import runs
from lab.run.checkpoint import file_weights, load_llama
from lab.run.policy import make_optimizer
from lab.run.ranks import Progress, Ranks, Stop
from lab.run.runs import RunFolder
from lab.run.session import Run
from lab.show import figures
from tests import commands, kills
from tests.commands import FORKS, ROOT, fork, read_lines
from tests.kills import SETTINGS, differences, kill_at, kill_one, timeless
from tests.scaling import LIMIT, apart
from train import parse_args

TINY = [*SETTINGS, "--steps", "3", "--save-every", "1"]  # the later flag counts
ALONE = Ranks(0, 1, torch.device("cpu"))


def go(*arguments) -> tuple[int, str]:
    """train.py in this process: its exit status and all it says."""
    return commands.go(train.main, *arguments)


def call_at(monkeypatch, label: str, phase: str, action) -> None:
    """Have action() called at the first count of that phase of that progress bar."""
    begin, due = Progress.phase, [action]

    def begin_phase(self, name, *arguments, **keywords):
        count = begin(self, name, *arguments, **keywords)

        def act_and_count(done):
            while due:
                due.pop()()
            count(done)

        return act_and_count if (self.label, name) == (label, phase) else count

    monkeypatch.setattr(Progress, "phase", begin_phase)


def tree(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def ends_like(folder: Path, whole: Path, *arguments) -> str:
    """Resume a run, see it end as the one that nothing happened to; what it said."""
    code, said = go("--resume", folder, *arguments)
    assert code == 0, said
    assert differences(whole, folder) == []
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three updates that nothing happened to. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, said = go(*TINY, "--resume", "auto", "--out", folder)
    assert code == 0 and "going on after" not in said, said
    return folder


@pytest.fixture(scope="module")
def after_two(tmp_path_factory):
    """The same, stopped in its third update: checkpoints of one and of two."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call_at(patch, "update 3/3", "sampling", lambda: signal.raise_signal(signal.SIGTERM))
        code, said = go(*TINY, "--out", folder)
    assert code == 143 and steps_kept(folder) == ["step-00000001", "step-00000002"], said
    return folder


@pytest.fixture
def stopped(after_two, tmp_path):
    """A copy of it, to change."""
    return Path(shutil.copytree(after_two, tmp_path / "run"))


# ------------------------------------------------------------------------------ kills and signals


class Fork:
    """What kills.start returns, as a fork of this process in place of a new one."""

    def __init__(self, folder, log, die_before=0, settings=()):
        arguments = [*settings, "--resume", "auto", "--out", str(folder)]
        self.process = fork(count_and_train, str(folder), die_before, arguments, output=log)

    def wait(self, seconds=None) -> int:
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def count_and_train(folder: str, die_before: int, arguments: list[str]) -> None:
    kills.count_file_operations(folder, die_before)
    sys.argv[1:] = arguments
    train.main()


def test_a_run_that_is_killed_again_and_again_loses_nothing(whole, tmp_path, monkeypatch):
    """In the first checkpoint's files, at its end, and in the last's, of one run.

    The first process is one as tests/kills.py starts it.
    """
    folder, log = tmp_path / "run", tmp_path / "log"
    for die_before, step in ((22, 1), (55, 1), (165, 3)):
        hit = kill_at(folder, log, die_before=die_before, settings=TINY)
        print(hit)
        assert f"step-0000000{step}" in hit
        monkeypatch.setattr(kills, "start", Fork)
    code, said = go(*TINY, "--resume", "auto", "--out", folder)
    assert code == 0, said
    assert differences(whole, folder) == []


def test_only_kills_that_hit_are_counted_and_notes_are_compared(stopped, tmp_path, monkeypatch):
    """tests/kills.py itself: one that comes too late is drawn again, for a new run."""
    seen, outcomes = [], iter([None, None, "hit", None, "hit", "hit"])

    def kill(folder, log, **moment):
        seen.append(moment)
        hit = next(outcomes)
        assert not folder.exists() or hit == "hit"
        folder.mkdir(exist_ok=True)
        return hit

    monkeypatch.setattr(kills, "kill_at", kill)
    draw = random.Random(0)
    assert kill_one(tmp_path, 2, draw, 10, 100) == (tmp_path / "run-2", ["hit"])
    assert len({moment["seconds"] for moment in seen}) == 3
    assert kill_one(tmp_path, 3, draw, 10, 100) == (tmp_path / "run-3", ["hit", "hit"])
    assert all(1 <= moment["die_before"] <= 100 for moment in seen[3:])

    other, name = Path(shutil.copytree(stopped, tmp_path / "other")), "checkpoints/step-00000002"
    assert differences(stopped, other) == []
    for key, value in (("step", 7), ("notes", {"skipped_in_a_row": 1}), ("environment", {})):
        state = json.loads((stopped / name / "state.json").read_text()) | {key: value}
        (other / name / "state.json").write_text(json.dumps(state))
        expected = [] if key == "environment" else [f"{name}/state.json"]
        assert differences(stopped, other) == expected


def test_a_signal_saves_and_says_so(whole, tmp_path, monkeypatch):
    """One run is stopped again and again; a step that was begun is finished."""
    run, arguments = tmp_path / "run", [*TINY, "--out", tmp_path / "run", "--save-every", "3"]
    for number, label, phase, kept in (
        (signal.SIGTERM, "update 1/3", "masks", []),
        (signal.SIGINT, "update 2/3", "sampling", ["step-00000001"]),
        (signal.SIGTERM, "update 2/3", "policy", ["step-00000001", "step-00000002"]),
        (signal.SIGINT, "held-out after 2", "sampling", ["step-00000001", "step-00000002"]),
    ):
        with monkeypatch.context() as patch:
            call_at(patch, label, phase, lambda number=number: signal.raise_signal(number))
            code, said = go(*arguments)
        done = int(kept[-1][-1]) if kept else 0
        assert code == 128 + number
        assert f"stopped by {number.name} after update {done} of 3; go on with --resume {run}" in (
            said
        )
        updates = [line for line in read_lines(run / "metrics.jsonl") if "outcome" in line]
        assert len(updates) == done
        assert (steps_kept(run) if kept else []) == kept
        arguments = ["--resume", run]
    code, said = go(*arguments)
    assert code == 0 and "going on after update 2" in said, said
    # Of the checkpoints only the last is as it was: the others were saved at other moments.
    differing = differences(whole, run)
    assert all(name == "config.json" or "step-0000000" in name for name in differing)
    assert not any("step-00000003" in name for name in differing)


def wait(ready: Path) -> None:
    Stop()
    ready.touch()
    time.sleep(60)


def test_a_second_signal_ends_at_once(tmp_path):
    process, deadline = fork(wait, tmp_path / "ready", output=tmp_path / "output"), time.time() + 20
    try:
        while not (tmp_path / "ready").exists():
            assert process.is_alive() and time.time() < deadline
            time.sleep(0.01)
        for _ in range(2):  # the second at once: the same request by another way
            os.kill(process.pid, signal.SIGTERM)
            process.join(1.2)
            assert process.is_alive()
        os.kill(process.pid, signal.SIGTERM)
        process.join(5)
        assert process.exitcode == -signal.SIGTERM
    finally:
        process.kill()


def launch_three(arguments: list[str], second: Path) -> None:
    """What torchrun --nproc-per-node=3 --max-restarts=1 train.py does, by forks.

    The rank in the middle dies in its second update, once there is a checkpoint of the first.
    """
    config = LaunchConfig(
        1, 1, 3, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1,
        monitor_interval=0.1, start_method=FORKS.get_start_method(),
    )  # fmt: skip
    elastic_launch(config, be_a_rank)(arguments, second)


def be_a_rank(arguments: list[str], second: Path) -> None:
    step = train.update_policy

    def die_in_the_second(*arguments, **keywords):
        if second.is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments, **keywords)

    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        train.update_policy = die_in_the_second
    sys.argv[1:] = arguments
    train.main()


def test_three_ranks_of_which_one_dies_end_like_one_process(whole, tmp_path):
    """torchrun starts them again by itself. The last has no rollout of its own.

    With the optimiser sharded, so that each rank gets its part back.
    """
    run, output = tmp_path / "run", tmp_path / "output"
    arguments = [*TINY, "--zero", "--out", str(run)]
    process = fork(launch_three, arguments, run / "checkpoints/step-00000001", output=output)
    process.join(240)
    process.kill()
    said = output.read_text()
    assert process.exitcode == 0, said
    assert said.count("on 3 x cpu") == 2 and said.count("going on after update 1") == 1
    alone, ranks = (read_lines(folder / "samples.jsonl") for folder in (whole, run))
    assert [sample["text"] for sample in alone] == [sample["text"] for sample in ranks]
    for a, b in zip(alone, ranks, strict=True):
        assert a["advantage"] == pytest.approx(b["advantage"], abs=1e-4)
    # AdamW hides a wrong scale of the gradient, so its norm is compared too.
    alone, ranks = (read_lines(folder / "metrics.jsonl") for folder in (whole, run))
    updates = [(a, b) for a, b in zip(alone, ranks, strict=True) if "gradient_norm" in a]
    assert len(updates) == 3
    for a, b in updates:
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
        assert a["clip_fraction"] == pytest.approx(b["clip_fraction"], abs=1e-6)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    weights = [load_file(folder / "checkpoint/model.safetensors") for folder in (whole, run)]
    assert apart(*weights) <= LIMIT  # float noise, which Adam's first steps enlarge
    assert apart(load_file(ROOT / "data/micro/model.safetensors"), weights[0]) > 1e-4


def test_a_restarted_run_must_know_its_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    for resume in ([], ["--resume", "auto"]):
        code, said = go(*TINY, *resume)
        assert code == 2 and "--out" in said


# -------------------------------------------------------------------------------- which run it is


def test_auto_goes_on_with_the_run_that_it_began(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    code, said = go(*TINY, "--resume", "auto", "--out", run)
    assert code == 0 and "going on after update 3" in said
    assert differences(whole, run) == []
    assert len((run / "commands.txt").read_text().splitlines()) == 2  # a line per start


def test_other_settings_are_refused_by_name(stopped):
    before = tree(stopped)
    for resume in (["--resume", stopped], ["--resume", "auto", "--out", stopped]):
        code, said = go(*resume, "--lr", "0.5", "--questions", "4", "--seed", "0")
        assert code == 2
        assert "questions (saved 2, now 4), lr (saved 0.0002, now 0.5);" in said
        assert "--override questions lr" in said and "seed" not in said.partition("error:")[2]
    code, said = go("--resume", stopped, "--lr", "0.5", "--seed", "1", "--override", "lr")
    assert code == 2 and "seed (saved 0, now 1);" in said and "--override lr seed" in said
    assert tree(stopped) == before


def test_an_override_trains_on(whole, tmp_path):
    """Two updates and then a third are a run of three."""
    assert go(*TINY, "--steps", "2", "--out", tmp_path / "run")[0] == 0
    ends_like(tmp_path / "run", whole, "--steps", "3", "--override", "steps")
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("content", "arguments", "named"),
    [
        (None, "--resume RUN", "holds no run"),
        ("{}", "--resume RUN", "lacks the setting shots"),
        ('{"steps": 3', "--resume RUN", "config.json cannot be used"),
        ('{"steps": 3', "--resume auto --out RUN", "config.json cannot be used"),
        ("[3]", "--resume RUN", "expected a JSON object; put it back"),
        ("3", "--resume RUN", "expected a JSON object; put it back"),
        ("-zero", "--resume RUN", 'it lacks the setting zero: another version wrote it; add "zero'),
        ("-mask_lr", "--resume auto --out RUN", "it lacks the setting mask_lr"),
        ({"speed": 1}, "--resume RUN", "this version has no setting speed"),
        ({"": None}, "--resume auto --out RUN", "this version has no setting "),
        ({"lr": "1e-4"}, "--resume RUN", 'config.json cannot be used (lr is "1e-4")'),
        ({"model": 3}, "--resume RUN", "(model is 3)"),
        ({"steps": True}, "--resume RUN", "(steps is true)"),
        ({"zero": 1}, "--resume RUN", "(zero is 1)"),
        ({"lr": math.nan}, "--resume RUN", "--lr nan: must be a number below"),
        ({"lr": 10**40}, "--resume RUN", f"--lr {10**40}: must be at most 2147483647"),
        ({"lr": 1}, "--resume RUN --lr 2", "lr (saved 1, now 2.0)"),
        ({"shots": 2}, "--resume RUN --shots 4", "shots (saved 2, now 4)"),
        ("whole", "--resume RUN --system Go", "system (saved None, now Go)"),
        ("whole", "--resume RUN --delimiter ####", "delimiter (saved #####, now ####)"),
        ({"shots": 65}, "--resume RUN", "--shots 65: must be at most 64"),
        ({"ratio": "word"}, "--resume RUN", "--ratio word: choose sequence, token"),
        ({"rollouts": 1}, "--resume RUN", "--rollouts 1: must be at least 2"),
        ("whole", "--resume RUN --override speed", "--override speed: no such setting"),
        ("whole", "--resume RUN --out elsewhere", "--out elsewhere is not the run"),
        ("whole", "--resume auto", "--resume auto looks for a run in --out"),
        ("whole", "--override steps", "--override is for a run that --resume goes on with"),
        ("whole", "--out RUN", "is not empty; name another folder, or --resume"),
    ],
)
def test_a_folder_that_cannot_be_resumed(content, arguments, named, whole, tmp_path):
    folder, config = tmp_path / "run", json.loads((whole / "config.json").read_text())
    folder.mkdir()
    if str(content)[0] == "-":
        content = json.dumps({key: value for key, value in config.items() if key != content[1:]})
    if isinstance(content, dict):
        content = json.dumps(config | content)
    if content is not None:
        content = json.dumps(config) if content == "whole" else content
        (folder / "config.json").write_text(content)
    before = tree(folder)
    code, said = go(*arguments.replace("RUN", str(folder)).split())
    assert code in (1, 2) and named in said and "Traceback" not in said
    assert tree(folder) == before


def test_an_evaluation_in_between_does_not_stand_for_the_last_one():
    """A run that was stopped after one, and is resumed with that step as its last."""
    run = Run.__new__(Run)
    run.config, run.steps, run.stop = SimpleNamespace(eval_every=10), 10, None
    run.ranks = SimpleNamespace(rank=1)
    run.history = [
        {"step": 0, "eval": {"problems": 300}},
        {"step": 10, "outcome": -0.5},
        {"step": 10, "eval": {"problems": 64}},
    ]
    assert not run.evaluation_due(0) and run.evaluation_due(10)
    run.history.append({"step": 10, "eval": {"problems": 300}})
    assert not run.evaluation_due(10) and run.evaluation(10)["problems"] == 300
    run.steps, run.history = 20, run.history[:3]
    assert not run.evaluation_due(10) and run.evaluation_due(20)


# --------------------------------------------------------------------------- one process at a time


def hold_folder(folder: Path, ready: Path) -> None:
    runs.hold(hold_folder, folder)
    ready.touch()
    time.sleep(60)


@pytest.fixture
def held(tmp_path):
    """Has another process hold a folder; returns that process."""
    processes = []

    def begin(folder: Path):
        folder.mkdir(exist_ok=True)
        ready, deadline = tmp_path / f"ready {len(processes)}", time.time() + 20
        processes.append(fork(hold_folder, folder, ready, output=tmp_path / "output"))
        while not ready.exists():
            assert processes[-1].is_alive() and time.time() < deadline
            time.sleep(0.01)
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()


@pytest.mark.parametrize("resume", ["--resume RUN", "--resume auto --out RUN"])
def test_a_run_that_another_process_holds_is_refused_until_that_is_killed(
    resume, held, stopped, capsys
):
    holder, before = held(stopped), tree(stopped)
    code, said = go(*resume.replace("RUN", str(stopped)).split())
    assert code == 1 and f"--out {stopped}: process {holder.pid} on {socket.gethostname()}" in said
    assert tree(stopped) == before
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)
    assert restored(stopped, capsys)[0] == 2


@pytest.mark.parametrize(
    "begin",
    [
        lambda folder: RunFolder(parse_args([*TINY, "--out", str(folder)]), ALONE, resume=True),
        lambda folder: RunFolder(parse_args([*TINY, "--out", str(folder)]), ALONE, resume=False),
        lambda folder: EvalFolder(folder, {"--seed": 0}),
    ],
    ids=["--resume auto", "a new run", "an evaluation"],
)
def test_a_folder_has_one_process_and_is_free_after_a_kill(begin, held, tmp_path):
    """None of them had written anything else yet."""
    holder = held(tmp_path / "out")
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is writing there; wait"):
        begin(tmp_path / "out")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)
    first = begin(tmp_path / "out")
    with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
        begin(tmp_path / "out")
    assert begin(tmp_path / "other").path != first.path
    del first
    begin(tmp_path / "out")


def test_without_locks_it_says_so_and_goes_on(stopped, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    runs.hold(no_locks, stopped)
    said = capsys.readouterr().err
    assert f"note: {stopped} cannot be locked (No locks available): start nothing else" in said


def test_every_rank_ends_where_another_process_holds_the_run(held, stopped, tmp_path):
    """Rank 0 alone takes the lock; the other ends by its own sentence, and not by waiting."""
    holder, outputs = held(stopped), [tmp_path / "rank 0", tmp_path / "rank 1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        fork(resume_it, str(stopped), output=path, RANK=str(n), LOCAL_RANK=str(n), **common)
        for n, path in enumerate(outputs)
    ]
    for rank in ranks:
        rank.join(60)
        rank.kill()
    said = [path.read_text() for path in outputs]
    assert [rank.exitcode for rank in ranks] == [1, 1], said
    assert f"process {holder.pid} on" in said[0] and "error on rank 1: another rank" in said[1]
    assert "Traceback" not in "".join(said)


def resume_it(folder: str) -> None:
    sys.argv[1:] = ["--resume", folder]
    train.main()


# ------------------------------------------------------------------------------------ the faults


def flip_byte(path: Path, place=0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a byte of the weights": lambda f: flip_byte(f / "model.safetensors"),
    "a byte of the optimiser": lambda f: flip_byte(f / "optimizer.safetensors"),
    "a byte of the random states": lambda f: flip_byte(f / "optimizer.safetensors", 0.9999),
    "a byte of its settings": lambda f: flip_byte(f / "config.json"),
    "the step": lambda f: (f / "state.json").write_text(
        (f / "state.json").read_text().replace('"step": 2', '"step": 3')
    ),
    "no model": lambda f: (f / "model.safetensors").unlink(),
    "no state": lambda f: (f / "state.json").unlink(),
    "cut short": lambda f: os.truncate(f / "optimizer.safetensors", 1000),
    "state cut short": lambda f: os.truncate(f / "state.json", 100),
    "garbage": lambda f: (f / "state.json").write_bytes(b"\xff\x00garbage"),
    "a list": lambda f: (f / "state.json").write_text("[]"),
    "an empty object": lambda f: (f / "state.json").write_text("{}"),
    "no files listed": lambda f: (f / "state.json").write_text('{"step": 2, "files": []}'),
}


def restored(folder: Path, capsys) -> tuple[int, str]:
    """What RunFolder.restore goes on from, and what it says."""
    saved = json.loads((folder / "config.json").read_text())
    config = parse_args(["--resume", str(folder)])
    assert config.steps == saved["steps"]
    model = load_llama(ROOT / "data/micro")
    optimizer = make_optimizer(model, config.lr, ALONE, zero=False)
    step, _ = RunFolder(config, ALONE, resume=True).restore(model, optimizer, ALONE)
    return step, capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, stopped, capsys):
    damage(stopped / "checkpoints/step-00000002")
    step, said = restored(stopped, capsys)
    assert step == 1
    assert "step-00000002: " in said and "trying the one before" in said


def test_the_one_before_leads_to_the_same_end(stopped, whole):
    """Also when there is a checkpoint of later that is none: it must not count among the kept."""
    shutil.copytree(stopped / "checkpoints/step-00000002", stopped / "checkpoints/step-00000009")
    flip_byte(stopped / "checkpoints/step-00000002/model.safetensors")
    said = ends_like(stopped, whole)
    assert "step-00000009: is a copy of the checkpoint of update 2; trying the one before" in said
    assert "model.safetensors is not as it was written; trying the one before" in said
    assert "going on after update 1" in said


def test_a_checkpoint_holds_the_settings(after_two):
    saved = json.loads((after_two / "config.json").read_text())
    for step in (1, 2):
        state = (after_two / f"checkpoints/step-0000000{step}/state.json").read_text()
        assert json.loads(state)["config"] == saved


def test_without_a_whole_checkpoint_nothing_is_overwritten(stopped):
    for step in (1, 2):
        flip_byte(stopped / f"checkpoints/step-0000000{step}/optimizer.safetensors")
    before = tree(stopped)
    code, said = go("--resume", stopped, "--lr", "1e-5", "--override", "lr")
    assert code == 1 and "none of its 2 checkpoints is whole; start a new run" in said
    assert tree(stopped) == before


BACKUPS = (  # what a user may call a copy; the run's own names have eight digits or more
    "step-old", "keep-step-2", "step-00000002.bak", "step-00000002 (copy)", "step-3", "step-",
    "step-00000003-wip", "00000003", "step-0000000३", "STEP-00000003", ".step-00000002", "step-0x3",
)  # fmt: skip


def test_copies_of_checkpoints_are_neither_restored_nor_deleted(stopped):
    """Copies of an older one, so that a run that took one of them would go back."""
    folder = stopped / "checkpoints"
    copies = [shutil.copytree(folder / "step-00000001", folder / name) for name in BACKUPS]
    (folder / "step-00000008").write_text("a file")
    before = {path: tree(path) for path in copies}
    code, said = go("--resume", stopped)
    assert code == 0 and "going on after update 2" in said and "trying" not in said, said
    own = {path.name for path in folder.iterdir()} - {path.name for path in copies}
    assert own == {"step-00000002", "step-00000003", "step-00000008"}
    assert {path: tree(path) for path in copies} == before


@pytest.mark.parametrize("kept", ["checkpoints/keep-step-2", "checkpoint"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(kept, stopped, capsys):
    """Its logs would be cut to nothing."""
    shutil.move(stopped / "checkpoints/step-00000002", stopped / kept)
    shutil.rmtree(stopped / "checkpoints/step-00000001")
    before = tree(stopped)
    with pytest.raises(ValueError, match="its checkpoints are gone; give one its name again"):
        restored(stopped, capsys)
    assert tree(stopped) == before


@pytest.mark.parametrize(
    ("line", "gone"),
    [
        ({"step": 1, "reward": 0.5}, False),  # a kill between it and its checkpoint
        ({"step": 0, "eval": {}}, False),
        ({"step": 1, "eval": {}}, True),
        ({"step": 2, "reward": 0.5}, True),
    ],
)
def test_a_run_that_has_saved_does_not_begin_anew_without_its_checkpoints(
    line, gone, stopped, capsys
):
    assert json.loads((stopped / "config.json").read_text())["save_every"] == 1
    for name in ("checkpoints", "checkpoint"):
        shutil.rmtree(stopped / name, ignore_errors=True)
    (stopped / "metrics.jsonl").write_text(json.dumps(line) + '\n{"st')
    before = tree(stopped)
    if gone:
        with pytest.raises(ValueError, match="its checkpoints are gone"):
            restored(stopped, capsys)
        assert tree(stopped) == before
    else:
        assert restored(stopped, capsys)[0] == 0


def test_settings_that_are_a_broken_link_are_called_that(stopped):
    (stopped / "config.json").unlink()
    (stopped / "config.json").symlink_to("nowhere")
    code, said = go("--resume", stopped)
    assert code == 2 and "config.json is a broken link (to nowhere)" in said


def test_a_folder_in_the_place_of_a_log_is_named(stopped, capsys):
    (stopped / "metrics.jsonl").unlink()
    (stopped / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match="metrics.jsonl is a folder, not a file"):
        restored(stopped, capsys)


@pytest.mark.parametrize(
    ("name", "place", "content", "line"),
    [
        ("metrics.jsonl", 0, b"x" * 10**6, 1),
        ("metrics.jsonl", 0, b"\xff\xfe", 1),
        ("metrics.jsonl", 1, b"3", 2),
        ("metrics.jsonl", 2, b"null", 3),
        ("metrics.jsonl", 1, b'{"outcome": 1}', 2),
        ("metrics.jsonl", 1, b"", 2),
        ("metrics.jsonl", 1, b'{"step": 1} {"step": 1}', 2),
        ("samples.jsonl", 5, b"what", 6),
        ("samples.jsonl", 7, b'{"step": "2"}', 8),
    ],
)
def test_a_log_that_something_else_wrote_is_named(name, place, content, line, stopped, capsys):
    """One line is replaced, and padding added so that the log is not shorter than it was."""
    lines = (stopped / name).read_bytes().splitlines()
    lines[place] = content
    (stopped / name).write_bytes(b"\n".join([*lines, b" " * 10**4]))
    before = tree(stopped)
    with pytest.raises(ValueError, match=re.escape(f"{stopped / name}, line {line}: is not what")):
        restored(stopped, capsys)
    assert tree(stopped) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_that_lost_lines_is_named(name, stopped):
    os.truncate(stopped / name, 100)
    before = tree(stopped)
    code, said = go("--resume", stopped)
    assert code == 1 and f"{stopped / name}: is shorter than the checkpoint says" in said
    assert tree(stopped) == before


def test_what_a_kill_leaves_behind_does_not_hurt(stopped, whole):
    """A save half written, an old folder not yet gone, lines of the step that was lost."""
    newest = stopped / "checkpoints/step-00000002"
    for leftover in (
        ".step-00000003.atmanrl-new",
        ".step-00000007.atmanrl-new",
        "..step-00000003.atmanrl-new.atmanrl-new",
        ".step-00000002.atmanrl-old",
    ):
        shutil.copytree(newest, newest.parent / leftover)
        (newest.parent / leftover / "state.json").unlink()
    (stopped / ".config.json.part").write_text('{"ste')
    with open(stopped / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "rew')
    ends_like(stopped, whole)


def test_another_world_is_said_and_goes_on(stopped, capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        step, said = restored(stopped, capsys)
    finally:
        torch.set_num_threads(threads)
    assert step == 2 and "note: threads was 1 when this run was saved" in said


@pytest.fixture
def largest_file():
    """Sets the largest size that a file may reach: writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_metrics_tears_no_line(stopped, whole, largest_file):
    metrics = stopped / "metrics.jsonl"
    lines = read_lines(metrics)
    largest_file(metrics.stat().st_size + 50)
    code, said = go("--resume", stopped)
    largest_file(resource.RLIM_INFINITY)
    assert code == 1 and f"{metrics}: cannot be written" in said and "Traceback" not in said
    left = read_lines(metrics)  # the last one did not fit, and is not there in part
    assert left and list(map(timeless, left)) == list(map(timeless, lines[: len(left)]))
    ends_like(stopped, whole)


def test_a_disk_that_is_full_for_a_checkpoint_or_a_small_file(stopped, whole, largest_file):
    """The system does not say which one it could not write."""
    (stopped / "commands.txt").write_text("python train.py\n" * 1000)
    kept, writes = tree(stopped / "checkpoints"), "cannot be written"
    for size, named in (
        (100, f"error: {stopped / 'config.json'} {writes} ("),
        (16000, f"error: {stopped / 'commands.txt'} {writes} ("),
        (20 * 2**10, writes),  # of the checkpoint: the tokenizer
        (2**20, writes),  # the weights
        (5 * 2**20, writes),  # the optimiser
    ):
        largest_file(size)
        code, said = go("--resume", stopped)
        largest_file(resource.RLIM_INFINITY)
        assert code == 1 and named in said and "Traceback" not in said
        assert sum(writes in x and "drawn no figure" not in x for x in said.splitlines()) == 1
        assert tree(stopped / "checkpoints") == kept
    ends_like(stopped, whole)


def test_a_disk_that_is_full_for_the_state_or_the_curves(stopped, whole, monkeypatch):
    """Files that come after larger ones; the error is the one for a file that is open."""
    json_text = runs.json_text

    def full(*_):
        raise OSError(28, "No space left on device")

    def full_for_the_state(content):
        return full() if "files" in content else json_text(content)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "json_text", full_for_the_state)
        code, said = go("--resume", stopped)
    named = f"error: {stopped / 'checkpoints/step-00000003'} cannot be written ([Errno 28] No space"
    assert code == 1 and named in said
    monkeypatch.setattr(figures, "new_figure", full)
    said = ends_like(stopped, whole)  # no picture is worth a run
    assert "note: curves has drawn no figure (OSError: [Errno 28] No space left" in said


def test_something_in_the_way_of_a_checkpoint(stopped, whole):
    kept = tree(stopped / "checkpoints")
    obstacle = stopped / "checkpoints/.step-00000003.atmanrl-new"
    obstacle.write_text("a file")
    code, said = go("--resume", stopped)
    assert code == 1 and "step-00000003: cannot write beside it" in said
    obstacle.unlink()
    assert tree(stopped / "checkpoints") == kept
    ends_like(stopped, whole)


def test_a_read_only_folder_is_named(stopped, monkeypatch):
    before = tree(stopped)
    # For root everything is writable.
    monkeypatch.setattr(runs.os, "access", lambda _, mode: mode != os.W_OK)
    for arguments in (["--resume", stopped], ["--out", stopped.parent / "new"]):
        code, said = go(*arguments)
        assert code == 1 and f"--out {arguments[1]}: may not be written to" in said
    assert tree(stopped) == before


def test_a_data_file_that_is_gone_is_named(tmp_path):
    lines = [
        {"question": f"Ann has {n} pens and buys {n}. How many?", "answer": f"Sum.\n#### {2 * n}"}
        for n in range(3, 10)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    gsm8k = ["--dataset", "gsm8k", "--data-dir", tmp_path, "--steps", "1", "--max-new-tokens", "9"]
    code, said = go(*TINY, *gsm8k, "--out", run)
    assert code == 0, said
    (tmp_path / "train.jsonl").unlink()
    before = tree(run)
    code, said = go("--resume", run, "--steps", "2", "--override", "steps")
    assert code == 1 and "train.jsonl" in said and "Traceback" not in said
    assert tree(run) == before


# ------------------------------------------------------------------------------- what is kept


def test_the_last_ones_and_the_best_are_kept(tmp_path, monkeypatch):
    summarize, scores = train.summarize, iter([0.9, 0.2, 0.4, 0.4, 0.3, 1.0])
    monkeypatch.setattr(
        train, "summarize", lambda *arguments: summarize(*arguments) | {"pass@1": next(scores)}
    )
    drawn = []  # curves.png is made again after each evaluation
    monkeypatch.setattr(train, "curves", lambda history, path: drawn.append(history[-1]["step"]))
    code, said = go(*TINY, "--steps", "5", "--keep", "3", "--out", tmp_path / "run")
    assert code == 0 and drawn == [0, 1, 2, 3, 4, 5], said
    assert steps_kept(tmp_path / "run") == ["step-00000003", "step-00000004", "step-00000005"]
    # 0.9 and 1.0 are of more problems than those in between, of which the first 0.4 is the best.
    assert json.loads((tmp_path / "run/best/score.json").read_text()) == {"step": 2, "pass@1": 0.4}
    best = load_file(tmp_path / "run/best/model.safetensors")
    third = load_file(tmp_path / "run/checkpoints/step-00000003/model.safetensors")
    assert any(not torch.equal(best[key], third[key]) for key in best)
    model = load_llama(tmp_path / "run/best")  # in Hugging Face's form, as any other
    assert all(torch.equal(best[key], weight) for key, weight in file_weights(model).items())


def test_keeping_fewer_keeps_the_newest(stopped, whole):
    """A damaged checkpoint of later is no reason to drop the one just written."""
    later = stopped / "checkpoints/step-00000009"
    shutil.copytree(stopped / "checkpoints/step-00000002", later)
    flip_byte(later / "model.safetensors")
    code, said = go("--resume", stopped, "--keep", "1", "--override", "keep")
    assert code == 0 and steps_kept(stopped) == ["step-00000003"], said


def test_no_pickle_is_loaded(stopped, whole, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a pickle was loaded")

    for module, names in ((torch, ["load"]), (pickle, ["load", "loads", "Unpickler"])):
        for name in names:
            monkeypatch.setattr(module, name, fail)
    ends_like(stopped, whole)
    suffixes = {path.suffix for path in stopped.rglob("*") if path.is_file()}
    assert suffixes == {"", ".json", ".jsonl", ".safetensors", ".png", ".txt"}  # "": .lock
