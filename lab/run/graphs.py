"""On a GPU, a step as one launch and pointwise work as one kernel; elsewhere the plain code.

    graphs.ENABLED = not config.eager       # once, before anything runs
    step = Graph(body, device)              # body() reads and writes tensors at fixed addresses
    for _ in range(steps):
        step.replay()                       # does what body() does
    swiglu = fused(lambda gate, up: F.silu(gate) * up)

A small step leaves a GPU idle, because the processor takes longer to launch its kernels than they
run. A CUDA graph launches all of them at once; torch.compile makes one kernel of several.
"""

import functools
import sys
import warnings
from importlib.util import find_spec

import torch

from lab.run.ranks import named_rank

ENABLED = True  # --eager turns both off
failed, said = False, set()  # whether a capture has, and what `say_once` has told
# What the compiler says of a softmax over few columns, which is nobody's to mend
warnings.filterwarnings("ignore", r"\s*Online softmax is disabled")
AHEAD = 16  # replays before the host waits for them, so that a progress bar tells the truth


class Graph:
    """A body without arguments or result, of fixed shapes, over tensors at fixed addresses.

    The body may not wait for the GPU (no .item(), no index of bools), and what it leaves behind is
    in tensors from outside of it. Its Python lines do not run when it is replayed. What it takes of
    memory is its own until it is let go.
    """

    def __init__(self, body, device: torch.device):
        self.body, self.device, self.graph = body, device, None
        self.warm = False  # the first call runs eagerly: what is compiled, is compiled there
        self.eager = not ENABLED or device.type != "cuda" or failed
        self.replayed = 0

    def replay(self) -> None:
        """Do what the body does, once."""
        if self.graph is not None:
            self.graph.replay()
            self.replayed += 1
            if self.replayed % AHEAD == 0:
                torch.cuda.current_stream(self.device).synchronize()
        elif self.eager:
            self.body()
        elif not self.warm:
            self.warm = True
            side, current = side_stream(self.device), torch.cuda.current_stream(self.device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                self.body()
            current.wait_stream(side)
        else:
            self.capture()
            self.replay()

    def capture(self) -> None:
        """Record the body, which computes nothing meanwhile; where that fails, stay eager.

        After a failure nothing is captured any more: a capture that broke off may leave its memory
        behind (pytorch#180395).
        """
        global failed
        try:
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, such as nccl's, may do what a capture forbids. The outer
            # block puts the stream back, because the inner one does not when it fails.
            side = side_stream(self.device)
            options = {"stream": side, "capture_error_mode": "thread_local"}
            with torch.cuda.stream(side), torch.cuda.graph(graph, **options):
                self.body()
            self.graph = graph
        except RuntimeError as error:
            self.eager = failed = True
            # The first of two errors, when the end of the capture failed because of it
            say_once("a step could not be captured as a CUDA graph", error.__context__ or error)


@functools.cache
def side_stream(device: torch.device):
    """Where graphs are recorded and warm up, because a GPU's default stream can do neither."""
    return torch.cuda.Stream(device)


def even_shapes(device: torch.device) -> int:
    """What shapes are rounded up to one of: a GPU's fast matrix products want 16 to divide them."""
    return 16 if device.type == "cuda" else 1


def fused(function):
    """A function of tensors as one kernel, for whatever shapes, where CUDA and a compiler are."""
    compiled = None

    @functools.wraps(function)
    def call(*tensors):
        nonlocal compiled
        if not ENABLED or not tensors[0].is_cuda or compiled is function:
            return function(*tensors)
        try:
            if compiled is None:
                compiled = function
                if find_spec("triton"):
                    # A batch of one, and sizes that chance to be equal, are compiled apart.
                    torch._dynamo.config.recompile_limit = 32
                    compiled = torch.compile(function, dynamic=True)
            return compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            compiled = function
            say_once(f"{function.__name__} could not be compiled", error)
            return function(*tensors)

    return call


def say_once(what: str, error: BaseException) -> None:
    """What failed, that it runs eagerly, and the error's first line, on rank 0's stderr."""
    if what not in said and named_rank() == "0":
        reason = str(error).partition("\n")[0]
        print(f"note: {what}, so it runs eagerly: {reason}", file=sys.stderr, flush=True)
    said.add(what)
