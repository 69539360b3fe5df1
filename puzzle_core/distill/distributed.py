"""Several processes that train one model: parent and child sharded over them (FSDP2), micro-batches shared out.

Every process holds an equal part of every tensor, and one block of each model whole at a time. It computes its share
of a step's micro-batches; gradients and loss terms are summed over all processes, so a step is that of one process but
for the order of the sums. A block's activations are computed again on the way back, so that neither they nor autocast's
copies of its weights outlive the block.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as computed_again

from puzzle_core.device import default_device, on_device
from puzzle_core.model.checkpoint import Checkpoint
from puzzle_core.model.parent import empty_model, tensor_shapes
from puzzle_core.model.remote.configuration_puzzle import PuzzleConfig
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM

Rows = slice | list[int]


class ShardedGroup(NamedTuple):
    """The processes of one training, as one of them sees them."""

    mesh: DeviceMesh

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.mesh.get_rank() == 0

    def share(self, parts: Sequence[Rows]) -> list[tuple[Rows, int]]:
        """This process's micro-batches of a step and how often each counts.

        All processes get equally many, since they exchange weights in step: where there are too few, one is computed
        that counts for nothing.
        """
        rank, size = self.mesh.get_rank(), self.mesh.size()
        rounds = range(rank, -(-len(parts) // size) * size, size)
        return [(parts[number], 1) if number < len(parts) else (parts[0], 0) for number in rounds]

    def sum(self, terms: dict[str, torch.Tensor]) -> dict[str, float]:
        """Loss terms summed over all processes."""
        total = torch.stack(list(terms.values())).double()
        dist.all_reduce(total)
        return dict(zip(terms, total.tolist(), strict=True))

    def agreed(self, due: bool) -> bool:
        """What the leading process says."""
        said = torch.tensor(int(due), device=default_device())
        dist.broadcast(said, 0)
        return bool(said.item())

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor gathered from all processes, which all have to ask for it; itself where it is not sharded."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part_of(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor, sharded as another one is."""
        if not isinstance(like, DTensor):
            return tensor
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

    def load(self, config: PuzzleConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> PuzzleForCausalLM:
        """A model in evaluation mode, sharded; each process reads one tensor at a time and keeps its part.

        Raises:
            ArtifactError: the checkpoint's tensors are not those that its config asks for.
        """
        checkpoint.check(tensor_shapes(config))
        model, device = empty_model(config), default_device()
        for block in model.model.layers:
            block.forward = partial(computed_again, block.forward, use_reentrant=False)
        for module in (*model.model.layers, model):
            sharded = fully_shard(module, mesh=self.mesh, reshard_after_forward=True)
            assert isinstance(sharded, FSDPModule)
            sharded.set_gradient_divide_factor(1.0)  # gradients are summed: loss terms are weighted already
            sharded.set_force_sum_reduction_for_comms(True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config.parent()).to(device)
        wanted, state = model.state_dict(), dict[str, nn.Parameter]()
        for name in checkpoint.headers:
            like = wanted.get(name)
            tensor = checkpoint.tensor(name).to(dtype)
            state[name] = nn.Parameter(tensor if like is None else self.part_of(tensor.to(device), like))
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, assign=True)
        return model


@contextlib.contextmanager
def joined() -> Iterator[ShardedGroup]:
    """Join the processes that torchrun started, one per GPU by NCCL, or on CPUs by gloo."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    with on_device(device):
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpu else "gloo")
        try:
            yield ShardedGroup(init_device_mesh(device.type, (dist.get_world_size(),)))
        finally:
            dist.destroy_process_group()
