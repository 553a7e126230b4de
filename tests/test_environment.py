"""What users' shells, schedulers and machines do to a command: its work is done all the same, or a
sentence says before it what is wrong.
"""

import io
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from lab.run import memory, ranks
from lab.run.command import sentences
from lab.run.memory import NoRoom, check_room, is_out_of_memory, room_for
from lab.run.ranks import Progress, Ranks, Stop, place
from lab.run.sampling import generate
from lab.show import explain, figures
from tests import tiny
from tests.commands import ROOT, done, fork, go, refused

SMALL = ["--model", "data/micro", "--mask-steps", 1]
TRAIN = [*SMALL, "--steps", 1, "--questions", 2, "--rollouts", 2, "--micro-batch", 4,
         "--eval-problems", 2, "--eval-samples", 1, "--eval-every", 0]  # fmt: skip
EVAL = [*SMALL, "--limit", 2, "--samples", 1, "--faithfulness", "off"]
QUESTION = "Tom has 5 pens. He buys 3 more. How many now?"
HISTORY = [{"step": 0, "eval": {"pass@1": 0.5, "pass@4": 0.75, "tokens": 60.0}}]

# Pictures


DRAW = f"""
import sys; from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from lab.show.figures import curves
curves({HISTORY!r}, Path("curves.png"))
print("went on")
"""


def test_figures_are_the_same_whatever_a_user_has_set(tmp_path):
    """Each in a process of its own, because matplotlib reads its settings as it is imported."""
    notebook = "module://matplotlib_inline.backend_inline"
    settings = {  # name: (environment, matplotlibrc)
        "tex": ({"MPLBACKEND": notebook}, b"text.usetex: True\nfont.family: No Font\nbackend: x\n"),
        "latin-1": ({"MPLBACKEND": ""}, b"caf\xe9: 1\n"),
    }
    figures.curves(HISTORY, tmp_path / "curves.png")
    processes = {}
    for name, (environment, rc) in settings.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "matplotlibrc").write_bytes(rc)
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", DRAW], cwd=tmp_path / name, env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "went on\n"), err
        picture = tmp_path / name / "curves.png"
        if name == "latin-1":  # which ends matplotlib's import
            assert "note: curves has drawn no figure (UnicodeDecodeError" in err
            assert not picture.exists()
        else:
            assert picture.read_bytes() == (tmp_path / "curves.png").read_bytes(), err


def test_no_figure_ends_training_or_an_evaluation(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to process string with tex")

    monkeypatch.setattr(figures, "as_png", fail)
    run, evaluated = tmp_path / "run", tmp_path / "eval"
    said = done(train.main, *TRAIN, "--out", run)
    assert said.count("has drawn no figure (RuntimeError: Failed to process") == 2
    assert "accuracy (pass@1)" in said and (run / "checkpoint/model.safetensors").exists()
    said = done(evaluation.main, *EVAL, "--out", evaluated)
    assert "has drawn no figure" in said and not list(evaluated.glob("*.png"))
    assert (evaluated / "results.json").exists() and (evaluated / "report.html").exists()


# Pipes, terminals, names


def without_readers(main, arguments) -> None:
    """A command whose output and errors nobody reads: `| head` once it has gone."""
    for number in (1, 2):
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
    sys.stdout, sys.stderr = open(1, "w", encoding="ascii"), open(2, "w", encoding="ascii")
    sys.argv = ["command", *map(str, arguments)]
    main()


def without_descriptors(main, arguments) -> None:
    """A command that is started with its output and errors closed: >&- 2>&-."""
    for number in (1, 2):
        os.close(number)
    sys.stdout = sys.stderr = None
    sys.argv = ["command", *map(str, arguments)]
    main()


@pytest.mark.parametrize("body", [without_readers, without_descriptors])
def test_finished_work_is_kept_where_nobody_reads(body, tmp_path):
    run, evaluated, page = (tmp_path / name for name in ("run", "eval", "page.html"))
    commands = [
        (train.main, [*TRAIN, "--out", run], run / "checkpoint/model.safetensors"),
        (explain.main, [*SMALL, "--question", QUESTION, "--html", page], page),
        (evaluation.main, [*EVAL, "--out", evaluated], evaluated / "report.html"),
    ]
    for main, arguments, result in commands[: 3 if body is without_readers else 2]:
        process = fork(body, main, arguments, output=tmp_path / "said")
        process.join(100)
        assert process.exitcode == 0 and result.exists()


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", b"\\xe9 \\u2192\n"), ("latin-1", b"\xe9 \\u2192\n"), ("utf-8", "é →\n".encode())],
)
def test_what_an_output_cannot_write_shows_as_its_number(encoding, printed, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with sentences():
        print("é →")
    assert out.buffer.getvalue() == printed


def test_output_that_cannot_be_written_is_dropped(monkeypatch):
    full, closed = open("/dev/full", "w"), io.StringIO()
    closed.close()
    for stream in (full, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        with sentences():
            print("there is no room for this", flush=True)
        assert sys.stdout is stream
    full.close()  # nor is there an error left for the end of the process


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (train.main, ["--out", "r\udcfcn"]),
        (train.main, ["--resume", "auto", "--out", "r\udcfcn"]),
        (train.main, ["--model", "mod\udce8le"]),
        (evaluation.main, ["--model", "data/micro", "--compare", "data/micro2", "\udcff"]),
        (evaluation.main, ["--model", "data/micro", "--out", "r\udcfcn"]),
        (explain.main, ["--model", "data/micro", "--question", QUESTION, "--html", "\udcfc.html"]),
    ],
)
def test_a_name_that_is_no_text_is_refused_before_any_work(main, arguments, monkeypatch):
    arguments = list(map(str, arguments))
    if main is explain.main:
        main = lambda: explain.main(arguments)  # noqa: E731
    said = refused(main, *arguments)
    assert f"{arguments[-2]} " in said or "--compare" in said
    assert f"{ascii(arguments[-1])}: is no text in the encoding" in said
    assert not (ROOT / arguments[-1]).exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_progress_is_a_line_a_minute(monkeypatch):
    """120 units of 20 seconds each, by a clock of the test's own."""
    said, clock = {}, SimpleNamespace(now=0.0)
    clock.time = lambda: clock.now
    monkeypatch.setattr(ranks.tqdm, "monitor_interval", 0)
    for kind in (io.StringIO, Terminal):
        monkeypatch.setattr(sys, "stderr", kind())
        bar = Progress("update 1/9")
        for name, units in (("masks", 120), ("policy", 2)):
            count = bar.phase(name, units, "step")
            bar.bar._time, bar.bar.start_t, bar.bar.last_print_t = clock.time, clock.now, clock.now
            for _ in range(units):
                clock.now += 20.0
                count(1)
            bar.bar.set_postfix(loss=1.5, refresh=False)
        bar.close()
        said[kind] = sys.stderr.getvalue()
    lines = said[io.StringIO].splitlines()
    assert len(lines) == 120 * 20 // 60 and "\r" not in said[io.StringIO]
    assert lines[0].startswith("update 1/9: masks: 3 of 120 [01:00<") and lines[0].isascii()
    assert lines[-1].startswith("update 1/9: masks: 120 of 120 [40:00<")
    assert said[Terminal].count("\r") > 120  # where a bar is redrawn


# What schedulers set and send


VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK",
             "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE",
             "MV2_COMM_WORLD_SIZE")  # fmt: skip
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets these variables, and no other that a scheduler might have set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(*pair) for pair in variables.items()]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MASTER}, "RANK is 2, not below WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "one", **MASTER}, "RANK is 'one', not a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0", **MASTER, "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", **MASTER, "MASTER_PORT": "99999"},
         "MASTER_ADDR 127.0.0.1 MASTER_PORT 99999: the ranks cannot meet there"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is 4, but WORLD_SIZE is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
        ({"PMIX_SIZE": "2"}, "PMIX_SIZE is 2"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE is 2"),
        ({"TORCHELASTIC_MAX_RESTARTS": "often"}, "TORCHELASTIC_MAX_RESTARTS is 'often'"),
    ],
)  # fmt: skip
def test_a_variable_that_says_too_little_is_named(variables, says, environment, tmp_path):
    environment(variables)
    said = refused(train.main, *TRAIN, "--out", tmp_path / "run")
    assert says in said and "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", **MASTER},
        {"WORLD_SIZE": "", "RANK": ""},
        {"RANK": "0"},
        {"LOCAL_RANK": "7", **MASTER},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a job's script, which srun has not started
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_process_that_is_plainly_alone_runs_alone(variables, environment):
    environment(variables)
    assert place() == (0, 1) and Ranks.start("cpu").world_size == 1


def test_what_torchrun_sets_is_taken(environment):
    environment({"WORLD_SIZE": "4", "RANK": "3", **MASTER, "SLURM_STEP_NUM_TASKS": "2"})
    assert place() == (3, 4)


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "2", "RANK": "0", **MASTER}, {"OMPI_COMM_WORLD_SIZE": "2"}]
)
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (evaluation.main, ["--model", "data/micro"]),
        (explain.main, ["--model", "data/micro", "--question", QUESTION]),
    ],
)
def test_a_command_of_one_process_is_not_started_several_times(
    main, arguments, variables, environment
):
    environment(variables)
    said = refused(main, *arguments)
    assert f"{list(variables)[0]} is 2" in said and "is one process: start it with python" in said


@pytest.mark.parametrize("local", ["1", "x", ""])
def test_a_local_rank_without_a_gpu_is_named(local, environment, monkeypatch):
    environment({"WORLD_SIZE": "4", "RANK": "3", **MASTER, "LOCAL_RANK": local})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK"):
        Ranks.start(None)


def test_a_hangup_is_a_request_to_stop_unless_nohup_ignores_it():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for handler, asked in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
            signal.signal(signal.SIGHUP, handler)
            stop = Stop()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Memory


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.empty(2**50, dtype=torch.uint8),
        lambda: np.empty(2**55),
        lambda: bytearray(2**62),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to")),
    ],
)
def test_memory_that_is_not_there_is_a_sentence_with_half_of_the_flag(take):
    with pytest.raises(ValueError, match="^--micro-batch 9: too much .*; try --micro-batch 4$"):
        with room_for(micro_batch=9):
            take()
    with pytest.raises(ValueError, match="; try a smaller model"):
        with room_for(mask_batch=1):
            take()
    with pytest.raises(SystemExit, match="error: not enough memory"):
        with sentences():
            take()


def test_another_error_is_none_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"), room_for(micro_batch=8):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_what_would_fit_does_fit(monkeypatch):
    """2 layers of 2 heads of 8 numbers, keys and values, 4 bytes each; a draw and a token."""
    model = tiny.llama()
    token = 2 * 2 * 2 * 8 * 4 + 4 + 8  # bytes
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * token)
    check_room(model, 10, 10)
    with pytest.raises(NoRoom):
        check_room(model, 10, 11)
    with pytest.raises(ValueError, match="--batch-size 64 --max-new-tokens 40: too much") as error:
        with room_for(batch_size=64, max_new_tokens=40):
            generate(model, [[1, 2]] * 10, 40)
    # Of the batch of 10, and of 40 tokens each, a quarter
    assert re.search("; try --batch-size 2 or --max-new-tokens 10$", str(error.value))
    check_room(model, 2, 40)
    check_room(model, 10, 10)
    # A row of 40 tokens has logits besides, 8 times 4 bytes of each token of the vocabulary
    row = 40 * token + 32 * model.config.vocab_size
    monkeypatch.setattr(memory, "free_memory", lambda device: 10 * row)
    assert [memory.rows_that_fit(model, 40, most) for most in (256, 8)] == [9, 8]
    assert memory.rows_that_fit(model, 10**9, 256) == 1


def test_the_memory_of_this_machine_is_finite():
    assert 2**20 < memory.free_memory(torch.device("cpu")) < 2**60
    with pytest.raises(NoRoom, match="1 completions of 1,000,.* GiB, .* are free"):
        check_room(tiny.llama(), 1, 10**30)


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [("4000", 3000, 500, 1500), ("4000", 4500, 100, 0), ("max", 3000, 500, None)],
)
@pytest.mark.parametrize(
    "names",
    [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ],
)
def test_what_a_container_may_still_take(names, limit, used, cached, free, tmp_path, monkeypatch):
    """Its limit less what it uses, of which the files that nobody reads now give way."""
    (tmp_path / "memory").mkdir()
    about = f"anon 9\nfile 700\ninactive_file {cached}\nactive_file 1\n"
    for name, text in zip(names, (limit, str(used), about), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    found = memory.free_memory(torch.device("cpu"))
    assert found == free if free is not None else found > 2**20


@pytest.mark.parametrize(
    ("main", "arguments", "flag"),
    [
        (evaluation.main, [*EVAL, "--batch-size", 256], "--batch-size 256"),
        (train.main, TRAIN, "--eval-batch 256"),
    ],
)
def test_too_long_completions_end_a_command_with_their_flag(
    main, arguments, flag, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**16)
    code, said = go(main, *arguments, "--max-new-tokens", 200, "--out", tmp_path / "out")
    assert code == 1 and f"error: {flag} --max-new-tokens 200: too much for the memory (" in said
    assert re.search(r"; try --max-new-tokens \d+$", said)
