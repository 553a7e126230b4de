"""Ranks.local_first on two machines of two ranks each (four processes), and where ranks meet."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

import ranks
from ranks import Ranks

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, sys, time
from ranks import Ranks

ranks = Ranks.start("cpu")

def body(name, failing):
    with ranks.local_first():
        if os.environ["LOCAL_RANK"] == "0":
            time.sleep(0.5)  # time enough for the others to come first, if they did not wait
        if ranks.rank == failing:
            raise OSError("no such file")
        with open(sys.argv[1], "a") as log:
            log.write(f"{name} {ranks.rank}\\n")

body("well", failing=None)
ranks.gather([])
try:
    body("ill", failing=2)
except (ValueError, OSError) as error:
    print(error)
ranks.stop()
"""


def test_a_machines_first_rank_goes_first_and_its_failure_ends_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, log],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, outputs
    lines = log.read_text().splitlines()
    assert set(lines[:2]) == {"well 0", "well 2"} and set(lines[2:4]) == {"well 1", "well 3"}
    assert lines[4:] == ["ill 0"]  # which could not know; nobody's turn came after that
    assert outputs[2][0] == "no such file\n"
    assert all("another rank failed" in outputs[rank][0] for rank in (0, 1, 3))


def test_one_process_has_nobody_to_wait_for():
    with Ranks.start("cpu").local_first():
        done = True
    assert done


def test_ranks_meet_anew_in_a_store_that_others_have_left(monkeypatch):
    """As after torchrun's restart: what the dead wrote must not be taken for the living's."""
    store = dist.HashStore()
    monkeypatch.setattr(ranks.dist, "rendezvous", lambda _: iter([(store, None, None)]))
    with ThreadPoolExecutor(3) as pool:
        for start in ("first", "second", "third"):
            waiting = pool.submit(ranks.meet, 0, 3)
            time.sleep(0.2)  # by now rank 0 has read what it found
            found = [pool.submit(ranks.meet, rank, 3) for rank in (1, 2)]
            zero, one, two = (each.result(timeout=30) for each in (waiting, *found))
            assert not two.check(["address of 1"])
            one.set("address of 1", start)
            assert zero.get("address of 1") == two.get("address of 1") == start.encode()
