"""The project's commands as tests run them: in this process, in a fork of it, or on their own.

A fork need not import torch and spaCy anew, which takes 5 seconds. So do the ranks of a job.
"""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what a run takes as a request
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def run(*command, ok=True):
    """Run a command in the repository with one thread; returns its output, checks its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    return output


def go(main, *arguments) -> tuple[int, str]:
    """A command's main() in this process, with one thread: its exit status and all it says."""
    said, threads = io.StringIO(), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in STOPS}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        torch.set_num_threads(1)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            said.write(str(end.code))
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, said.getvalue()


def done(main, *arguments) -> str:
    """What a command says that ends well in this process."""
    code, said = go(main, *arguments)
    assert code == 0, said
    return said


def refused(main, *arguments) -> str:
    """What a command says as it refuses."""
    code, said = go(main, *arguments)
    assert code != 0, said
    return said


def read_lines(path: Path) -> list[dict]:
    """A log's lines. AssertionError for a torn one."""
    content = path.read_text() if path.exists() else ""
    assert content == "" or content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def fork(body, *arguments, output: Path, **environment):
    """body(*arguments), a module's function, in a process of its own that is started here.

    What it says goes to the file `output`. Returns a multiprocessing.Process.
    """
    command = body, arguments, output, {"OMP_NUM_THREADS": "1", **environment}
    process = FORKS.Process(target=in_a_fork, args=command, daemon=False)
    process.start()
    return process


def in_a_fork(body, arguments, output: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    body(*arguments)


def run_ranks(count: int, body, *arguments, folder: Path) -> list[str]:
    """What each of `count` ranks says, two on each machine, as it runs body; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    outputs = [folder / f"output of rank {rank}" for rank in range(count)]
    ranks = [
        fork(body, *arguments, output=path, RANK=str(n), LOCAL_RANK=str(n % 2), **common)
        for n, path in enumerate(outputs)
    ]
    try:
        for rank in ranks:
            rank.join(100)
    finally:
        for rank in ranks:
            rank.kill()
    said = [path.read_text() for path in outputs]
    assert [rank.exitcode for rank in ranks] == [0] * count, said
    return said
