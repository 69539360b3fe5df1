"""Children: checkpoints assembled from the block library and the parent, and how to load them (METHOD section 7).

A child directory is a Hugging Face checkpoint that carries its own small modelling code, so
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads it anywhere. Tensors are copied layer
by layer: neither parent nor child is ever whole in memory while assembling.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from puzzle_core.architecture import Architecture, Option
from puzzle_core.errors import ArtifactError
from puzzle_core.families.family import FAMILIES
from puzzle_core.fusible import fused, fusible_runs
from puzzle_core.model import remote
from puzzle_core.model.checkpoint import Checkpoint, write_checkpoint
from puzzle_core.model.child_config import read_child_config
from puzzle_core.model.fusion import fused_ffn
from puzzle_core.model.parent import Parent, load_model, random_model, served_as, torch_dtype
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM
from puzzle_core.model.surgery import load_weights
from puzzle_core.model.tokenizer import copy_tokenizer
from puzzle_core.spec import Dtype
from puzzle_core.state_dict import State
from puzzle_core.work import AssembleWork, ChildRecord

CODE = ("configuration_puzzle.py", "modeling_puzzle.py")
AUTO_MAP = {
    "AutoConfig": "configuration_puzzle.PuzzleConfig",
    "AutoModel": "modeling_puzzle.PuzzleModel",
    "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
}


def assemble(work: AssembleWork, parent: Parent, weights_dirs: list[dict[str, Path]], out_dir: Path) -> ChildRecord:
    """Write the child's checkpoint to `out_dir`.

    Args:
        weights_dirs: for every layer, the directories of what was trained of it, by the id of a variant or option.
    """
    dtype, architecture = torch_dtype(work.dtype), fused(work.architecture) if work.fuse_ffn else work.architecture
    counted = {"parameters": 0, "parameter_bytes": 0}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _child_tensors(parent, work, weights_dirs):
            converted = tensor.to(dtype)
            counted["parameters"] += converted.numel()
            counted["parameter_bytes"] += converted.numel() * converted.element_size()
            yield name, converted

    write_checkpoint(out_dir, tensors())
    write_description(parent, architecture, work.dtype, out_dir)
    return ChildRecord(architecture=architecture, unfused=work.architecture if work.fuse_ffn else None, **counted)


def write_description(parent: Parent, architecture: Architecture, dtype: Dtype, out_dir: Path) -> None:
    """Write a child's checkpoint without its tensors: config, code, tokenizer, generation config."""
    config = parent.puzzle_config(architecture).to_dict()
    config |= {"architectures": ["PuzzleForCausalLM"], "auto_map": AUTO_MAP, "dtype": dtype}
    (out_dir / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in CODE:
        shutil.copyfile(Path(remote.__path__[0]) / name, out_dir / name)
    generation = parent.directory / "generation_config.json"
    files = [*parent.tokenizer_files, *([generation] if generation.is_file() else [])]
    copy_tokenizer(files, parent.directory, out_dir, allow_code=parent.spec.allow_remote_code is not None)


def load_child(directory: Path, dtype: torch.dtype, device: torch.device) -> PuzzleForCausalLM:
    """A child as a module, in evaluation mode.

    Raises:
        ArtifactError: the tensors are not those that the config asks for.
    """
    checkpoint = Checkpoint(directory, ArtifactError)
    return load_model(read_child_config(directory), checkpoint, checkpoint.headers, dtype, device)


def load_parent(parent: Parent, dtype: torch.dtype, device: torch.device) -> PuzzleForCausalLM:
    """The whole parent as a frozen module of the same class, for the stages that run all layers."""
    model = load_model(parent.puzzle_config(), parent.checkpoint, parent.checkpoint.headers, dtype, device)
    return model.requires_grad_(False)


def random_child(
    parent: Parent, architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> PuzzleForCausalLM:
    """A frozen model of this architecture with random weights, for measuring speed."""
    model = random_model(parent.puzzle_config(architecture))
    return served_as(model, dtype, device).requires_grad_(False)


def _child_tensors(
    parent: Parent, work: AssembleWork, weights_dirs: list[dict[str, Path]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in parent.checkpoint.headers:
        skipped = name == "lm_head.weight" and parent.shape.tied_embeddings
        if not name.startswith("model.layers.") and not skipped:
            yield name, parent.checkpoint.tensor(name)
    layers = list(work.architecture.options.items())
    runs = (
        fusible_runs([option for _, option in layers])
        if work.fuse_ffn
        else [range(n, n + 1) for n in range(len(layers))]
    )
    for number, run in enumerate(runs):
        states = [
            (option, _state(parent, layer, option, weights_dirs[layer]))
            for layer, option in layers[run.start : run.stop]
        ]
        state = states[0][1]
        if len(states) > 1:
            ffns = [(option.block.ffn.ffn_width, each) for option, each in states if option.block.ffn.ffn_width]
            state |= fused_ffn([each for _, each in ffns], [width for width, _ in ffns], parent.shape)
        for name, tensor in state.items():
            yield f"model.layers.{number}.{name}", tensor


def _state(parent: Parent, layer: int, option: Option, trained: dict[str, Path]) -> State:
    """The tensors of one layer of a child, from the library and from the parent's layer."""
    if str(option) in trained:
        return load_weights(trained[str(option)])
    family, parent_tensors, state = FAMILIES[parent.shape.family], parent.layer_tensors(layer), State()
    prefixes = (family.attention_prefixes, family.ffn_prefixes)
    for variant, subblock_prefixes in zip(option.block.subblocks, prefixes, strict=True):
        if str(variant) in trained:
            state |= load_weights(trained[str(variant)])
        elif not variant.is_empty:
            state |= {name: t for name, t in parent_tensors.items() if name.startswith(subblock_prefixes)}
    return state
