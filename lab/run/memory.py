"""Memory: batch sizes that fit; where it is short, the flags to lower in place of a traceback.

    config = fit_batches(config, said, ranks, longest_prompt)
    check_room(model, rows=256, columns=1024)  # NoRoom, before `generate` takes it
    rows_that_fit(model, columns=1024, most=256)
    with room_for(eval_batch=256, max_new_tokens=1024):
        ...

Half of a setting is proposed where it is not known what would fit.
"""

import dataclasses
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lab.run.cost import FLOAT, Cost, is_out_of_memory
from lab.run.plan import BATCHES, GIB, SAFE, plan_run

CGROUP = Path("/sys/fs/cgroup")


def fit_batches(config, said, ranks, longest_prompt: int):
    """A train.Config with the batches, where not said, that fit the fullest of the ranks' GPUs.

    It is asked when the GPUs hold the weights and nothing else.
    """
    if ranks.device.type == "cpu" or said >= BATCHES.keys():
        return config
    plan = plan_run(config, ranks.world_size, said)
    lengths = dataclasses.replace(plan.lengths, longest_prompt=longest_prompt)
    free = min(ranks.gather([free_memory(ranks.device)])) + plan.cost.parameters * FLOAT
    fitted = dataclasses.replace(plan, lengths=lengths).fit(free)
    ranks.say(f"{free / GIB:.1f} GiB of GPU memory for all of it: {fitted.batches}")
    return fitted.config


class NoRoom(MemoryError):
    """rows completions of `columns` tokens are too many: only a share of them would fit."""

    def __init__(self, text: str, rows: int, columns: int, share: float):
        super().__init__(text)
        self.rows, self.columns, self.share = rows, columns, share


def check_room(model, rows: int, columns: int) -> None:
    """Raise NoRoom where completions have no room for keys and values, draws and tokens.

    It is asked before, because a system that promises more memory than it has ends the process
    without a word once the memory is used.
    """
    needed, free = rows * row_size(model, columns), free_memory(model.embed_tokens.weight.device)
    if needed > free:
        text = f"{rows:,} completions of {columns:,} tokens need {needed / 2**30:,.2f} GiB, "
        text += f"{free / 2**30:,.2f} are free"
        raise NoRoom(text, rows, columns, free / needed)


def rows_that_fit(model, columns: int, most: int) -> int:
    """How many completions of `columns` tokens free memory has room for: up to `most`, at least 1.

    A tenth of it stays free, and each row has its logits, a few times over.
    """
    row = row_size(model, columns) + 8 * FLOAT * model.config.vocab_size
    return max(1, min(most, int(SAFE * free_memory(model.embed_tokens.weight.device) / row)))


def row_size(model, columns: int) -> int:
    """Bytes of a completion's keys, values, draws and tokens."""
    half = model.embed_tokens.weight.dtype == torch.bfloat16
    return columns * (Cost(model.config, half).kv_cache(1) + FLOAT + 8)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or at most of the machine's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    most = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, TypeError):  # Linux
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        most.append(1024 * int(found[1]))
    old = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"
    for names in (("memory.max", "memory.current", "memory.stat"), old):  # a container's
        with suppress(OSError, ValueError, TypeError):  # the limit may be "max"
            limit, used, about = ((CGROUP / name).read_text() for name in names)
            cached = re.search(r"^inactive_file (\d+)", about, re.MULTILINE)  # it gives way
            most.append(int(limit) - int(used) + int(cached[1]))
    return max(0, min(most))


@contextmanager
def room_for(**settings: int):
    """Raise ValueError with these settings' flags, and what would fit, where memory is short.

    settings: name -> value, of which a lower one takes less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        flags = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
        asked, fitting = " ".join(f"{flag} {value}" for flag, value in flags.items()), []
        for flag, value in flags.items():
            if isinstance(error, NoRoom):  # of a batch that may not be full
                value = min(value, error.columns if flag == "--max-new-tokens" else error.rows)
            if less := int(value * getattr(error, "share", 0.5)):
                fitting.append(f"{flag} {less}")
        advice = f"try {' or '.join(fitting)}" if fitting else "try a smaller model"
        reason = str(error).partition("\n")[0] or "there is no memory left"
        raise ValueError(f"{asked}: too much for the memory ({reason}); {advice}") from None
