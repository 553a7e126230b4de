"""Several processes as one: the little that torchrun leaves to do.

    ranks = Ranks.start(device=None)     # joins torchrun's process group, if there is one
    mine = ranks.share(jobs)             # this rank's slice
    everything = ranks.gather(results)   # all slices, in order, on every rank
    ranks.stop()

With one process every method does nothing, so the training loop reads as if there were no ranks.
"""

import json
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None) -> "Ranks":
        """Read torchrun's environment; device: cpu or cuda, default cuda where there is one."""
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("--device cuda: this PyTorch sees no GPU; use --device cpu")
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if world_size == 1:
            return cls(0, 1, torch.device(device))
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
        return cls(dist.get_rank(), world_size, torch.device(device))

    def stop(self) -> None:
        """Leave together: a rank that exits early can abort the others."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def share(self, rows: list) -> list:
        """This rank's slice; the last ranks' may be shorter, or empty."""
        size = -(-len(rows) // self.world_size)
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
