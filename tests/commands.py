"""The project's commands as tests run them: in a process of their own, or, faster, in this one."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
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
