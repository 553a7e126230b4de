"""What a CUDA graph does, on a CPU: operations are recorded once, then run on the same tensors.

step = Recorded(body)
step.replay()   # runs the body as it stands, for lazy things to be made
step.replay()   # runs and records it
step.replay()   # runs what was recorded; the body's Python lines do not run again
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def waits(function, index=None) -> bool:
    """Whether the processor waits for the GPU: for a number, for a shape, or to send it data."""
    if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
        return any(x.dtype == torch.bool for x in tree_leaves(index) if x is not None)
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(tags & set(function.tags)) or function is torch.ops.aten.lift_fresh.default


class Recorded(TorchDispatchMode):
    def __init__(self, body):
        super().__init__()
        self.body, self.warm, self.calls = body, False, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        with self:  # in inference mode some operations are yet to be taken apart
            result = function.decompose(*arguments, **(keywords or {}))
        if result is not NotImplemented:
            return result
        assert not waits(function, *arguments[1:2]), f"{function} cannot be in a CUDA graph"
        result = function(*arguments, **(keywords or {}))
        if function.namespace != "profiler":
            self.calls.append((function, arguments, keywords or {}, result))
        return result

    def replay(self) -> None:
        if not self.warm:
            self.warm = True
            self.body()
        elif not self.calls:
            with self:
                self.body()
        else:
            with torch.no_grad():
                self.run_again()

    def run_again(self) -> None:
        for function, arguments, keywords, result in self.calls:
            again = function(*arguments, **keywords)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # Views and results in place are there already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
