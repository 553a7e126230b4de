"""One thread a process: tests run side by side, on a core each (pytest-xdist)."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in what tests start

import torch  # noqa: E402

torch.set_num_threads(1)
