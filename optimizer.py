"""The policy's AdamW, whole on every rank or sharded over them, and its state as named tensors.

    optimizer = make_optimizer(model, lr, ranks, zero=True)
    tensors = gather_state(optimizer, model, ranks)       # on rank 0: what a checkpoint keeps
    scatter_state(optimizer, model, ranks, tensors)       # back, on any number of ranks, or without

Sharding (ZeRO-1, Rajbhandari et al. 2020) gives each rank the moments of a part of the weights: 8
bytes a weight over the ranks in place of 8 on each. A named form, not PyTorch's own, lets a run go
on with another number of ranks, and lets safetensors hold it.
"""

import torch
import torch.distributed as dist

KEPT = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a weight


def make_optimizer(model, lr: float, ranks, zero: bool) -> torch.optim.Optimizer:
    """paper silent: AdamW's own betas and eps, no weight decay. Alone, zero changes nothing."""
    settings = {"lr": lr, "weight_decay": 0.0}
    if zero and ranks.world_size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **settings)
    return torch.optim.AdamW(model.parameters(), **settings)


def gather_state(optimizer, model, ranks) -> dict[str, torch.Tensor]:
    """'WEIGHT.KEY' -> tensor on the CPU of rank 0 ({} elsewhere); {} before the first step."""
    named, state, tensors = list(model.named_parameters()), here(optimizer).state, {}
    held = [n for n, (_, weight) in enumerate(named) if weight in state]
    by_rank = ranks.gather([held]) if here(optimizer) is not optimizer else [held]
    owner = {n: rank for rank, numbers in enumerate(by_rank) for n in numbers}
    for n, (name, weight) in enumerate(named):
        for key in KEPT if n in owner else ():
            if weight in state:
                tensor = state[weight][key].to(weight.device).contiguous()
            else:
                tensor = weight.new_empty(() if key == "step" else weight.shape)
            if owner[n] != 0:
                dist.broadcast(tensor, owner[n])
            if ranks.rank == 0:
                tensors[f"{name}.{key}"] = tensor.to("cpu", copy=True)  # no alias of the state
    return tensors


def scatter_state(optimizer, model, ranks, tensors) -> None:
    """Give each rank the state of its weights from rank 0's tensors, as gather_state made them.

    Raises ValueError, on rank 0, for tensors that are missing or of another shape.
    """
    (known,) = ranks.gather([bool(tensors)] if ranks.rank == 0 else [])
    if not known:  # saved before the first step
        return
    mine = {w for group in here(optimizer).param_groups for w in group["params"]}
    for name, weight in model.named_parameters():
        for key in KEPT:
            shape = () if key == "step" else weight.shape
            tensor = tensors.get(f"{name}.{key}", torch.empty(shape))
            if tensor.shape != shape or (ranks.rank == 0 and f"{name}.{key}" not in tensors):
                raise ValueError(f"the optimiser's state has no {name}.{key} of {tuple(shape)}")
            tensor = tensor.to(weight.device)
            if ranks.world_size > 1:
                dist.broadcast(tensor, 0)
            if weight in mine:
                # In the weight's own layout, so that AdamW rounds as it did; it keeps steps on the
                # CPU.
                kept = torch.empty(()) if key == "step" else torch.empty_like(weight)
                here(optimizer).state[weight][key] = kept.detach().copy_(tensor)


def here(optimizer) -> torch.optim.Optimizer:
    """The AdamW of this rank's part of the weights."""
    return getattr(optimizer, "optim", optimizer)
