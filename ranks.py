"""Several processes as one: the little that torchrun leaves to do.

    ranks = Ranks.start(device=None)     # joins torchrun's process group, if there is one
    mine = ranks.share(jobs)             # this rank's slice
    everything = ranks.gather(results)   # all slices, in order, on every rank
    with ranks.local_first(): ...        # one rank of each machine runs this before its others
    ranks.stop()

    stop = Stop()                        # SIGTERM and SIGINT become a request to stop
    together(ranks, stop, work, ...)     # all ranks do it, or, when asked to stop, none goes on

With one process every method does nothing, so the training loop reads as if there were no ranks.
"""

import datetime
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None) -> "Ranks":
        """Read torchrun's environment; ValueError for a device that is not here."""
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        device = pick_device(device)
        if device.type == "cuda":
            if world_size > 1:  # torchrun's ranks of one machine take a GPU each
                device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}", "--nproc-per-node: device")
            torch.cuda.set_device(device)
        if world_size == 1:
            return cls(0, 1, device)
        # Long enough for the slowest rank's masks, and for rank 0 to write a large checkpoint;
        # torchrun notices a rank that has died.
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=meet(int(os.environ["RANK"]), world_size),
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            timeout=datetime.timedelta(hours=2),
        )
        return cls(dist.get_rank(), world_size, device)

    def stop(self) -> None:
        """Leave together: a rank that exits early can abort the others."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """The body runs in the first rank of each machine, then in the others: for downloads.

        Where a first rank fails, the ranks that wait for it, and the first ones elsewhere, get a
        ValueError: none is left waiting.
        """
        if self.world_size == 1:
            yield
            return
        # A group of its own, because a download may outlast the time that the usual one, which is
        # there to notice a rank that hangs, gives its members.
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        first, failed = os.environ.get("LOCAL_RANK", "0") == "0", torch.zeros(1)
        if first:
            try:
                yield
            except BaseException:
                dist.all_reduce(failed + 1, group=group)
                raise
        dist.all_reduce(failed, group=group)
        if failed:
            time.sleep(1)  # torchrun ends all ranks when one has ended, which must not be this one
            raise ValueError("another rank failed before this one's turn; its message says why")
        if not first:
            yield

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def share_size(self, total: int) -> int:
        """Rows that a full share of `total` has."""
        return -(-total // self.world_size)

    def share(self, rows: list) -> list:
        """This rank's slice; the last ranks' may be shorter, or empty."""
        size = self.share_size(len(rows))
        return rows[self.rank * size : (self.rank + 1) * size]

    def gather(self, mine: list) -> list:
        """Every rank's rows in order. They travel as JSON: no pickle between machines."""
        if self.world_size == 1:
            return mine
        text = bytearray(json.dumps(mine).encode())
        payload = torch.frombuffer(text, dtype=torch.uint8).to(self.device)
        sizes = [
            torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)
        ]
        dist.all_gather(sizes, torch.tensor([len(payload)], device=self.device))
        payload = F.pad(payload, (0, int(max(sizes)) - len(payload)))
        parts = [torch.zeros_like(payload) for _ in sizes]
        dist.all_gather(parts, payload)
        texts = [bytes(part[: int(n)].tolist()) for part, n in zip(parts, sizes, strict=True)]
        return [row for text in texts for row in json.loads(text)]


def pick_device(name: str | None, flag: str = "--device") -> torch.device:
    """cpu, cuda or cuda:N; None is cuda where there is one. A GPU comes with its index.

    Raises ValueError naming the flag for a device that is not here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    known = name == "cpu" or (kind == "cuda" and (index.isdecimal() or name == "cuda"))
    if not known or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        here = ", ".join(["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))])
        raise ValueError(f"{flag} {name}: not on this machine, which has {here}")
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(index or 0))


def meet(rank: int, world_size: int) -> dist.Store:
    """torchrun's store, with names of its own for this start of the ranks. All call it together.

    After a restart torchrun hands out the store of the start before (torch 2.13, pytorch#135712):
    in it a rank finds the address of one that has died, and fails or waits for it for ever. Nor
    do all nodes count restarts alike. So each start is named by its rank 0: the others leave a
    name that no process had before, and wait for the answer to that. ValueError, on rank 0, naming
    those that have not come within the store's timeout (30 minutes).
    """
    store, *_ = next(dist.rendezvous("env://"))
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", mine)
        start = store.get(f"start for {mine}").decode()  # waits until it is there
        store.set(f"met/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
    missing = set(range(1, world_size))
    patience = store.timeout.total_seconds()  # as long as the others wait for their answer
    deadline = time.monotonic() + patience
    while missing:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)))
            raise ValueError(
                f"of {world_size} ranks these have not come within {patience / 60:g} minutes: "
                f"{names}; see what was printed where they run"
            )
        for other in missing:  # answers those that have died, too, until the living have written
            if store.check([f"here/{other}"]):
                store.set(f"start for {store.get(f'here/{other}').decode()}", mine)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"met/{mine}/{other}"])}
    return dist.PrefixStore(mine, store)


class Interrupted(Exception):
    """The run was asked to stop."""


class Stop:
    """Turns SIGTERM and SIGINT into a request; the same once more ends the process as usual.

    Not within two seconds: a scheduler signals the whole job, and torchrun passes its own on.
    signal: the number of the one that came, to this rank or to another, 0 before.
    """

    def __init__(self):
        self.signal, self.came = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request)

    def request(self, number, frame) -> None:
        if self.signal == number and time.monotonic() - self.came > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.signal:
            self.signal, self.came = number, time.monotonic()


def together(ranks: Ranks, stop: Stop, work: Callable, *arguments, **keywords):
    """work(...) of every rank; Interrupted on all of them when any was asked to stop.

    work must not wait for other ranks: it may be left in the middle by Interrupted.
    """
    try:
        result = work(*arguments, **keywords)
    except Interrupted:
        result = None
    asked = max(ranks.gather([stop.signal]))
    if asked:
        if not stop.signal:  # another rank's: the first that comes to this one is the same request
            stop.signal, stop.came = asked, time.monotonic()
        raise Interrupted
    return result  # a signal that came during the gather stays, for the next look


class Progress:
    """One progress bar at a time, for the phases of a job one after the other; rank 0's only.

    stop: a request that ends a phase at its next count, by Interrupted.
    """

    def __init__(self, label: str, silent: bool = False, stop: Stop | None = None):
        self.label, self.silent, self.stop, self.bar = label, silent, stop, None

    def phase(self, name: str, total: int, unit: str = "rollout", whole: bool = False):
        """Start a phase of `total` units; returns the function that counts them.

        whole: it may not be left in the middle.
        """
        self.close()
        bar = self.bar = tqdm(
            total=total, desc=f"{self.label}: {name}", unit=unit, leave=False, disable=self.silent
        )
        shown = time.time()

        def count(done: int) -> None:
            nonlocal shown
            bar.update(done)
            if self.stop is not None and self.stop.signal and not whole:
                raise Interrupted
            if time.time() - shown > 2:  # keep the clock going where nothing ends for a while
                bar.refresh()
                shown = time.time()

        return count

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
