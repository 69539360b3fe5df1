"""Training of one model by several processes: FSDP2 shards parent and child, and each process gets micro-batches.

Every process stores an equal shard of every tensor and gathers one block of each model at a time. It computes its share
of a step's micro-batches. Gradients and loss terms are summed over all processes, so a step differs from that of a
single process only in the order of the sums. The backward pass recomputes each block's activations (activation
checkpointing), so the activations and autocast's copies of the weights are freed after each block.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from puzzle_core.device import default_device, on_device
from puzzle_core.model.checkpoint import Checkpoint
from puzzle_core.model.parent import empty_model, fill, tensor_shapes
from puzzle_core.model.recompute import recompute_blocks
from puzzle_core.model.remote.configuration_puzzle import PuzzleConfig
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM


class ShardedGroup(NamedTuple):
    """The processes that train one model together, seen from one of them."""

    mesh: DeviceMesh

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which writes files and reports progress."""
        return self.mesh.get_rank() == 0

    def share(self, parts: Sequence[list[int]]) -> list[tuple[list[int], int]]:
        """Select this process's micro-batches of a step, each with its weight, 1 or 0.

        All processes get the same number of micro-batches, because each forward and backward pass is collective. A
        process that has too few computes the first one again with weight 0.
        """
        rank, size = self.mesh.get_rank(), self.mesh.size()
        rounds = range(rank, -(-len(parts) // size) * size, size)
        return [(parts[number], 1) if number < len(parts) else (parts[0], 0) for number in rounds]

    def sum(self, terms: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sum loss terms over all processes."""
        total = torch.stack(list(terms.values())).double()
        dist.all_reduce(total)
        return dict(zip(terms, total.tolist(), strict=True))

    def leader_value(self, value: bool) -> bool:
        """Broadcast the value of rank 0 to all processes."""
        broadcast = torch.tensor(int(value), device=default_device())
        dist.broadcast(broadcast, 0)
        return bool(broadcast.item())

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather a sharded tensor; all processes must call this. A tensor that is not sharded is returned as it is."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def shard(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Take this process's shard of a full tensor, with the sharding of `like`."""
        if not isinstance(like, DTensor):
            return tensor
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

    def load(self, config: PuzzleConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> PuzzleForCausalLM:
        """Load a sharded model in evaluation mode; each process reads one tensor at a time and keeps its shard.

        What lies outside the blocks stays gathered after a forward pass, because losses apply the head to its result.

        Raises:
            ArtifactError: the checkpoint's tensors differ from those that its config requires.
        """
        checkpoint.check(tensor_shapes(config))
        model, device = empty_model(config), default_device()
        recompute_blocks(model)
        for module in (*model.model.layers, model):
            sharded = fully_shard(module, mesh=self.mesh, reshard_after_forward=module is not model)
            assert isinstance(sharded, FSDPModule)
            sharded.set_gradient_divide_factor(1.0)  # gradients are summed: the loss terms already have their weights
            sharded.set_force_sum_reduction_for_comms(True)
        placeholders = model.state_dict()

        def place(name: str, tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(dtype).to(device)
            return self.shard(tensor, placeholders[name]) if name in placeholders else tensor

        fill(model, config, checkpoint, checkpoint.headers, device, place)
        return model


@contextlib.contextmanager
def sharded_group(store: Path | None = None) -> Iterator[ShardedGroup]:
    """Join the process group of torchrun: NCCL with one process per GPU, or gloo on CPUs.

    Args:
        store: path of a file by which the processes of one machine meet; None: the TCP store of torchrun.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    with on_device(device):
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            init_method="env://" if store is None else f"file://{store}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        try:
            yield ShardedGroup(init_device_mesh(device.type, (dist.get_world_size(),)))
        finally:
            dist.destroy_process_group()
