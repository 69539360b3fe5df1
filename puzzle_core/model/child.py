"""Children: assembled from the library and the parent into a checkpoint, and loaded to run (METHOD section 7).

A child directory is a Hugging Face checkpoint that carries its own small modelling code, so
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads it anywhere. Tensors are copied layer
by layer: neither parent nor child is ever whole in memory while assembling.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape
from puzzle_core.model import remote
from puzzle_core.model.checkpoint import Checkpoint, write_checkpoint
from puzzle_core.model.parent import Parent, build_model, served_as, torch_dtype
from puzzle_core.model.remote.configuration_puzzle import PuzzleConfig
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM
from puzzle_core.model.surgery import load_weights
from puzzle_core.spec import Dtype
from puzzle_core.state_dict import State
from puzzle_core.variants import attention, ffn
from puzzle_core.work import AssembleWork, ChildRecord

CODE = ("configuration_puzzle.py", "modeling_puzzle.py")
AUTO_MAP = {
    "AutoConfig": "configuration_puzzle.PuzzleConfig",
    "AutoModel": "modeling_puzzle.PuzzleModel",
    "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
}


def run(work: AssembleWork, parent: Parent, weights_dirs: list[dict[str, Path]], out_dir: Path) -> ChildRecord:
    """Write the child's checkpoint to `out_dir`.

    Args:
        weights_dirs: for every layer, where the trained weights of its variants lie, by variant id.
    """
    dtype = torch_dtype(work.dtype)
    counted = {"parameters": 0, "parameter_bytes": 0}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _child_tensors(parent, work.architecture, weights_dirs):
            converted = tensor.to(dtype)
            counted["parameters"] += converted.numel()
            counted["parameter_bytes"] += converted.numel() * converted.element_size()
            yield name, converted

    write_checkpoint(out_dir, tensors())
    write_description(parent, work.architecture, work.dtype, out_dir)
    return ChildRecord(architecture=work.architecture, **counted)


def write_description(parent: Parent, architecture: Architecture, dtype: Dtype, out_dir: Path) -> None:
    """Write everything of a child's checkpoint but its tensors: config, code, tokenizer, generation config."""
    config = parent.puzzle_config(architecture).to_dict()
    config |= {"architectures": ["PuzzleForCausalLM"], "auto_map": AUTO_MAP, "dtype": dtype}
    (out_dir / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in CODE:
        shutil.copyfile(Path(remote.__path__[0]) / name, out_dir / name)
    for file in (*parent.tokenizer_files, parent.directory / "generation_config.json"):
        if file.is_file():
            shutil.copyfile(file, out_dir / file.name)


def load_child(directory: Path, dtype: torch.dtype, device: torch.device) -> PuzzleForCausalLM:
    """A child as a module, in evaluation mode.

    Raises:
        ArtifactError: its tensors are not those that its config asks for.
    """
    checkpoint = Checkpoint(directory)
    model = build_model(PuzzleConfig.from_pretrained(directory), checkpoint, checkpoint.headers)
    return served_as(model, dtype, device)


def load_parent(parent: Parent, dtype: torch.dtype, device: torch.device) -> PuzzleForCausalLM:
    """The whole parent as the same kind of module, frozen, for the stages that run it end to end."""
    model = build_model(parent.puzzle_config(), parent.checkpoint, parent.checkpoint.headers)
    return served_as(model, dtype, device).requires_grad_(False)


def random_child(
    parent: Parent, architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> PuzzleForCausalLM:
    """A model of this architecture with random weights: what measuring speed needs."""
    model = build_model(parent.puzzle_config(architecture), None)
    return served_as(model, dtype, device).requires_grad_(False)


def trained_variants(block: BlockVariant, shape: ModelShape) -> list[str]:
    """Ids of the subblocks of a block that come from the library: neither the parent's own nor no-ops."""
    return [str(v) for v in block.subblocks if not v.is_empty and v not in shape.parent_block.subblocks]


def _child_tensors(
    parent: Parent, architecture: Architecture, weights_dirs: list[dict[str, Path]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in parent.checkpoint.headers:
        skipped = name == "lm_head.weight" and parent.shape.tied_embeddings
        if not name.startswith("model.layers.") and not skipped:
            yield name, parent.checkpoint.tensor(name)
    for layer, block in enumerate(architecture.layers):
        own, trained = parent.layer_tensors(layer), weights_dirs[layer]
        state: State = {}
        for variant, prefixes in ((block.attention, attention.PREFIXES), (block.ffn, ffn.PREFIXES)):
            if str(variant) in trained:
                state |= load_weights(trained[str(variant)])
            elif not variant.is_empty:
                state |= {name: tensor for name, tensor in own.items() if name.startswith(prefixes)}
        for name, tensor in state.items():
            yield f"model.layers.{layer}.{name}", tensor
