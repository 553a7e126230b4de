"""Where ranks meet, Ranks.local_first on two machines of two ranks each (four processes), and
Run.together on a request to stop that comes to one rank of two (two processes).
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from lab.run import ranks
from lab.run.ranks import Interrupted, Ranks, Stop
from lab.run.session import Run
from tests.commands import run_ranks


def take_turns(log) -> None:
    """Twice in turn, where the second time rank 2 of 4 fails."""
    ranks = Ranks.start("cpu")

    def body(name, failing):
        with ranks.local_first():
            if os.environ["LOCAL_RANK"] == "0":
                time.sleep(0.5)  # time enough for the others to come first, if they did not wait
            if ranks.rank == failing:
                raise OSError("no such file")
            with open(log, "a") as file:
                file.write(f"{name} {ranks.rank}\n")

    body("well", failing=None)
    ranks.gather([])
    try:
        body("ill", failing=2)
    except (ValueError, OSError) as error:
        print(error)
    ranks.stop()


def test_a_machines_first_rank_goes_first_and_its_failure_ends_all(tmp_path):
    log = tmp_path / "log"
    outputs = run_ranks(4, take_turns, log, folder=tmp_path)
    lines = log.read_text().splitlines()
    assert set(lines[:2]) == {"well 0", "well 2"} and set(lines[2:4]) == {"well 1", "well 3"}
    assert lines[4:] == ["ill 0"]  # which could not know; nobody's turn came after that
    assert outputs[2] == "no such file\n"
    assert all("another rank failed" in outputs[rank] for rank in (0, 1, 3))


def test_one_process_has_nobody_to_wait_for():
    with Ranks.start("cpu").local_first():
        done = True
    assert done


def be_signalled() -> None:
    """A signal comes to rank 0 once what it has to say is settled."""
    run = Run.__new__(Run)  # its other fields serve a run's folder
    run.ranks, run.stop = Ranks.start("cpu"), Stop()
    gather = Ranks.gather

    def signalled(self, mine):
        Ranks.gather = gather
        if self.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return gather(self, mine)

    Ranks.gather = signalled
    for turn in range(3):
        try:
            with run.together():
                pass
        except Interrupted:
            print("interrupted in turn", turn)
            break
    if run.ranks.rank == 1:  # the same request, which reaches this rank as it saves
        os.kill(os.getpid(), signal.SIGTERM)
    print("saved")
    run.ranks.stop()


def test_a_signal_that_comes_while_ranks_agree_is_not_lost_and_ends_none_of_them(tmp_path):
    """It counts at the next look, and another rank's own first signal is not the second."""
    said = run_ranks(2, be_signalled, folder=tmp_path)
    assert said == ["interrupted in turn 1\nsaved\n"] * 2


def test_ranks_meet_anew_in_a_store_that_others_have_left(monkeypatch):
    """As after torchrun's restart: what the dead wrote must not be taken for the living's."""
    store = dist.HashStore()
    monkeypatch.setattr(ranks.dist, "rendezvous", lambda _: iter([(store, None, None)]))
    with ThreadPoolExecutor(3) as pool:
        for start in ("first", "second", "third"):
            jobs = [pool.submit(ranks.meet, 0, 3)]
            time.sleep(0.2)  # by now rank 0 has read what the earlier start left
            jobs += [pool.submit(ranks.meet, rank, 3) for rank in (1, 2)]
            stores = [job.result(timeout=30) for job in jobs]
            assert not stores[2].check(["address of 1"])
            stores[1].set("address of 1", start)
            assert {ours.get("address of 1") for ours in stores} == {start.encode()}


def test_a_rank_that_never_comes_is_named(monkeypatch):
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.6))
    monkeypatch.setattr(ranks.dist, "rendezvous", lambda _: iter([(store, None, None)]))
    with ThreadPoolExecutor(4) as pool:
        zero, there = (pool.submit(ranks.meet, rank, 4) for rank in (0, 2))
        try:
            with pytest.raises(ValueError, match=r"have not come within 0.01 minutes: 1, 3;"):
                zero.result(timeout=10)
            there.result(timeout=10)
        finally:  # should it still wait, then not for ever
            others = [pool.submit(ranks.meet, rank, 4) for rank in (1, 3) if not zero.done()]
        assert not others
