"""The parent: a Hugging Face causal LM of a supported family, read lazily, one layer at a time.

Layers may differ: a child of this project and a DeciLM (Nemotron-NAS) checkpoint are parents, too. Their own code is
never run, since this project's blocks have all of their parts.

`puzzle_core/families` describes the families. What this project cannot run correctly is refused by name before any work
(parent_config.py).
"""

import contextlib
import hashlib
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from puzzle_core.architecture import Architecture, ModelShape
from puzzle_core.errors import NonFiniteError, ParentError, PuzzleError, reason
from puzzle_core.formats.block_configs import block_config
from puzzle_core.model.checkpoint import INDEX, SINGLE, Checkpoint, checkpoint_files
from puzzle_core.model.child_config import child_config, with_layers_of
from puzzle_core.model.parent_config import (
    ADAPTER,
    as_config_says,
    fetch,
    read_config,
    shape_of,
)
from puzzle_core.model.remote.configuration_puzzle import PuzzleConfig
from puzzle_core.model.remote.modeling_puzzle import (
    PuzzleBlock,
    PuzzleForCausalLM,
)
from puzzle_core.model.tokenizer import (
    MORE_TEMPLATES,
    TOKENIZER_FILES,
    is_rebuilt,
    open_tokenizer,
    tokenizer_code,
    tokenizer_files,
)
from puzzle_core.records import canonical_json, digest_file, digest_files
from puzzle_core.sizes import LAYER_CACHE_BYTES
from puzzle_core.spec import Dtype, ParentSpec
from puzzle_core.target import ComputeDtype

Module = TypeVar("Module", bound=nn.Module)


class Parent:
    """An opened parent checkpoint. Opening checks headers and config; weights are read when they are needed.

    Raises (on construction):
        ParentError: not a directory or reachable hub id, a config that is not valid, an unsupported family or
            feature, a missing or truncated shard, or tensors that do not match the config.
    """

    def __init__(self, spec: ParentSpec, directory: Path | None = None, *, cached_bytes: int = LAYER_CACHE_BYTES):
        """Open `spec.path`, keeping at most `cached_bytes` of layer weights in memory.

        Args:
            spec: names the parent.
            directory: of its files, where it was fetched before.
        """
        self.spec = spec
        self.directory = directory or fetch(spec)
        self.config, blocks = read_config(self.directory)
        with as_config_says(self.directory):
            self.shape = shape_of(self.config, self.directory, blocks)
            expected = tensor_shapes(self.puzzle_config())
        self.checkpoint = Checkpoint(self.directory, ParentError)
        _check_types(self.checkpoint)
        self.checkpoint.check(expected)
        _check_tie(self.checkpoint, self.shape)
        self._cached_bytes = cached_bytes
        self._cache: OrderedDict[tuple[str, str, str], nn.Module] = OrderedDict()
        self._lock = threading.Lock()

    def puzzle_config(self, architecture: Architecture | None = None) -> PuzzleConfig:
        """The configuration of a child with this architecture; without one, of the child that equals the parent."""
        architecture = architecture or Architecture.of_parent(self.shape)
        blocks = [block_config(block) for block in architecture.of_child.layers]
        return child_config(with_layers_of(architecture, self.config), blocks)

    @cached_property
    def digest(self) -> str:
        """Digest of the config and of all weight files; the first call reads the whole checkpoint."""
        digest = hashlib.sha256(canonical_json(_plain(self.config)).encode())
        digest.update(" ".join(map(str, self.shape.blocks)).encode())
        for file in self.checkpoint.files:
            digest.update(digest_file(file).encode())
        for name, place in sorted(self.checkpoint.chosen.items()):
            digest.update(f"{name} {place}".encode())
        return digest.hexdigest()[:40]

    @property
    def weight_files(self) -> list[Path]:
        """The files that the digest follows from: the config, an index, and those of the weights."""
        return [self.directory / "config.json", self.directory / INDEX, *self.checkpoint.files]

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, and the checkpoint's Python files if the spec allows remote code."""
        code = sorted(self.directory.glob("*.py")) if self.spec.allow_remote_code else []
        return [*tokenizer_files(self.directory), *code]

    @cached_property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer's files, and of how they are opened where AutoTokenizer gives other tokens."""
        remark = "opened by tokenizer.json alone\n" if is_rebuilt(self.directory) else ""
        return digest_files(self.tokenizer_files, self.directory, remark)

    @cached_property
    def dtype(self) -> Dtype:
        """The type that a child is stored in like this parent: bfloat16 if most weights are, and float32 otherwise."""
        entries = Counter[str]()
        for header in self.checkpoint.headers.values():
            entries[header.dtype] += math.prod(header.shape)
        return "bfloat16" if entries.most_common(1)[0][0] == "BF16" else "float32"

    def check_finite(self) -> None:
        """Read every weight.

        Raises:
            NonFiniteError: names the tensor and how many of its entries are NaN or infinite.
        """
        for name in self.checkpoint.headers:
            tensor = self.checkpoint.tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise NonFiniteError(
                    f"parent {self.directory}: tensor {name!r} has {bad:,} NaN or infinite entries of "
                    f"{tensor.numel():,}: the checkpoint is damaged; fetch it again"
                )

    def tokenizer(self) -> Any:
        """The parent's tokenizer.

        Raises:
            ParentError: the tokenizer is missing or damaged, or needs code from the checkpoint that the spec does not
                allow by name.
        """
        try:
            code = tokenizer_code(self.directory)
            if code and self.spec.allow_remote_code not in code:
                raise ParentError(
                    f"the tokenizer of {self.directory} is code of the checkpoint itself ({code[0]}); read it, and "
                    f"allow it with parent.allow_remote_code: {code[0]}"
                )
            return open_tokenizer(self.directory, allow_code=bool(code))
        except PuzzleError:
            raise
        except Exception as error:  # what transformers and tokenizers raise of a damaged file has no common base
            names = ", ".join(file.name for file in self.tokenizer_files) or "none"
            raise ParentError(
                f"cannot load the tokenizer of {self.directory} ({type(error).__name__}: {reason(error)}); its "
                f"files there are: {names}; fetch them again"
            ) from error

    def layer_tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer by their names within it, as stored."""
        return self.checkpoint.tensors(f"model.layers.{layer}.")

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> PuzzleBlock:
        """One layer, frozen, from a bounded cache."""
        module = self._cached(f"layer {layer}", dtype, device, lambda: self.load_block(layer, dtype, device))
        assert isinstance(module, PuzzleBlock)
        return module

    def outside(self, dtype: torch.dtype, device: torch.device) -> PuzzleForCausalLM:
        """What lies outside the blocks: a causal LM without layers (embedding, rotary, final norm, head)."""
        config = self.puzzle_config
        module = self._cached("outside", dtype, device, lambda: load_outside(config(), self.checkpoint, dtype, device))
        assert isinstance(module, PuzzleForCausalLM)
        return module

    def fits_cache(self, dtype: torch.dtype) -> bool:
        """Whether `block` reads every layer once: all weights, on all devices, are within the bound of the cache."""
        parameters = sum(math.prod(header.shape) for header in self.checkpoint.headers.values())
        return parameters * dtype.itemsize * max(1, torch.cuda.device_count()) <= self._cached_bytes

    def load_block(self, layer: int, dtype: torch.dtype, device: torch.device) -> PuzzleBlock:
        """One layer, frozen, read anew; it does not enter the cache."""
        return load_block(self.puzzle_config(), self.checkpoint, layer, dtype, device)

    def _cached(self, what: str, dtype: torch.dtype, device: torch.device, load: Callable[[], nn.Module]) -> nn.Module:
        key = (what, str(dtype), str(device))
        with self._lock:
            if key not in self._cache:
                self._cache[key] = load().requires_grad_(False)
                while len(self._cache) > 1 and sum(map(_module_bytes, self._cache.values())) > self._cached_bytes:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
            return self._cache[key]


def parent_files(directory: Path) -> list[Path]:
    """All files that an opened parent may read in a directory, also those that are not there."""
    names = ["config.json", "generation_config.json", ADAPTER, SINGLE, INDEX, *TOKENIZER_FILES]
    with contextlib.suppress(ParentError):
        names += [file.relative_to(directory).as_posix() for file in checkpoint_files(directory, ParentError).files]
    code_and_templates = [*sorted(directory.glob("*.py")), *sorted((directory / MORE_TEMPLATES).glob("*.jinja"))]
    return [*(directory / name for name in dict.fromkeys(names)), *code_and_templates]


_BUILDING = threading.Lock()


def random_model(config: PuzzleConfig) -> PuzzleForCausalLM:
    """A causal LM with random weights in float32.

    Models are made one at a time: while transformers makes one, it replaces torch's initialisers for all threads.
    """
    config._attn_implementation = "sdpa"
    with _BUILDING:
        return PuzzleForCausalLM(config)


def load_model(
    config: PuzzleConfig,
    checkpoint: Checkpoint,
    names: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
) -> PuzzleForCausalLM:
    """A causal LM in evaluation mode with the named tensors of a checkpoint.

    Weights that are stored in `dtype` are mapped from their file on a CPU, and copied only when they are changed.

    Raises:
        PuzzleError: the tensors are not those that the config asks for; its class is that of the checkpoint's errors.
    """
    model = empty_model(config)
    checkpoint.check(_shapes(model, config), names)
    fill(model, config, checkpoint, names, device, lambda _, tensor: tensor.to(dtype).to(device))
    return model


def load_block(
    config: PuzzleConfig, checkpoint: Checkpoint, layer: int, dtype: torch.dtype, device: torch.device
) -> PuzzleBlock:
    """One layer of the model in a checkpoint, in evaluation mode, as `load_model` loads weights."""
    block = empty_block(config, layer)
    block.load_state_dict(checkpoint.tensors(f"model.layers.{layer}."), assign=True)
    return served_as(block, dtype, device)


def load_outside(
    config: PuzzleConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> PuzzleForCausalLM:
    """What lies outside the blocks of the model in a checkpoint: a causal LM without layers."""
    names = [name for name in checkpoint.headers if not name.startswith("model.layers.")]
    without_layers = PuzzleConfig.from_parent(config.parent(), [], config.family)
    return load_model(without_layers, checkpoint, names, dtype, device)


def contexts_by_kind(outside: PuzzleForCausalLM, positions_BT: torch.Tensor) -> dict[str, dict[str, Any]]:
    """By kind of attention, the keyword arguments of a model's blocks for windows without padding or cache."""
    like_BT1 = outside.lm_head.weight.new_empty(1).expand(*positions_BT.shape, 1)
    contexts: dict[str, dict[str, Any]] = outside.model.contexts(like_BT1, positions_BT.to(like_BT1.device))
    return contexts


def fill(
    model: PuzzleForCausalLM,
    config: PuzzleConfig,
    checkpoint: Checkpoint,
    names: Iterable[str],
    device: torch.device,
    place: Callable[[str, torch.Tensor], torch.Tensor],
) -> None:
    """Give an empty model the named tensors of a checkpoint, one by one; `place` gets each with its name."""
    state = {name: nn.Parameter(place(name, checkpoint.tensor(name))) for name in names}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config.parent()).to(device)


def empty_model(config: PuzzleConfig) -> PuzzleForCausalLM:
    """A causal LM in evaluation mode on the meta device: its weights take no memory."""
    config._attn_implementation = "sdpa"
    with _BUILDING, torch.device("meta"):
        return PuzzleForCausalLM(config).eval()


def empty_block(config: PuzzleConfig, layer: int) -> PuzzleBlock:
    """One layer on the meta device: its weights take no memory."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return PuzzleBlock(config, config.parent(), layer)


def served_as(module: Module, dtype: torch.dtype, device: torch.device) -> Module:
    """The same module in evaluation mode, with parameters in `dtype`; buffers (rotary frequencies) stay float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.to(device).eval()


def torch_dtype(name: ComputeDtype) -> torch.dtype:
    """The torch type of a spec's dtype, which a plan has freed of `auto`."""
    assert name != "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def tensor_shapes(config: PuzzleConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors in a checkpoint with this config; without the head where it is tied."""
    return _shapes(empty_model(config), config)


def _shapes(model: PuzzleForCausalLM, config: PuzzleConfig) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def _check_types(checkpoint: Checkpoint) -> None:
    """Refuse weights that are not plain floats, whatever config.json says of quantisation."""
    for name, header in checkpoint.headers.items():
        if header.dtype not in ("F64", "F32", "F16", "BF16"):
            raise ParentError(
                f"{checkpoint.directory} holds quantised weights: {name!r} is of type {header.dtype}; give the "
                f"checkpoint before quantisation, in float32, float16 or bfloat16"
            )


def _check_tie(checkpoint: Checkpoint, shape: ModelShape) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if shape.tied_embeddings and names[1] in checkpoint.headers and not torch.equal(*map(checkpoint.tensor, names)):
        raise ParentError(
            f"{checkpoint.directory} says tie_word_embeddings, but its {names[1]!r} differs from {names[0]!r}: set "
            f"tie_word_embeddings to false in its config.json"
        )


def _module_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    volatile = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
    return {k: v for k, v in config.to_dict().items() if k not in volatile}
