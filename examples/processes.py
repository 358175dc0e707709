"""Training in several processes, as torchrun starts them: DistributedDataParallel or FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """Those that train together; of one alone, the size is 1."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is this one that prints, draws and writes."""
        return self.rank == 0

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """This one's rows of a batch; of all, no two have the same."""
        return batch[self.rank :: self.size]

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of the values of all."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def gathered(self, value: Any) -> list[Any]:
        """The values of all, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def share(self, model: nn.Module, fsdp: bool) -> nn.Module:
        """The model as all of them train it: a whole one each, or (FSDP2) a part of it each.

        Gradients are the mean over the processes. What FSDP2 gathers at a time is a layer of the
        encoder or the decoder.
        """
        if self.size == 1:
            return model
        if not fsdp:
            return DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
        layers = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
        for layer in [module for module in model.modules() if isinstance(module, layers)]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun started, and this one's device; else, this one alone.

    They exchange numbers over NCCL on GPUs and over gloo on CPUs.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        yield Processes(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def whole(model: Any, build: Callable[[], Any]) -> Any:
    """The model in one piece, for measuring: itself, what DDP wraps, or, of FSDP2's, a copy.

    All processes call it.
    """
    if isinstance(model, DistributedDataParallel):
        return model.module
    state = model.state_dict()
    if not any(hasattr(value, "full_tensor") for value in state.values()):
        return model
    full = {name: value.full_tensor() for name, value in state.items()}
    copy = build().to(next(iter(full.values())).device)
    copy.load_state_dict(full)
    return copy


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and what the optimiser has of each, in one piece, whoever trains them.

    All processes call it; for FSDP2's, the first alone gets it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def set_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take what ``state_of`` gave, with as many processes or another number of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )  # fmt: skip
