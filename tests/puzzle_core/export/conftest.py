"""Children of the quickstart's parent: every kind of variant alone, first, in the middle and last, and a mixed one."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from puzzle_core.architecture import Architecture
from puzzle_core.export.source import Source
from puzzle_core.model import child
from puzzle_core.model.child import load_child
from puzzle_core.model.parent import Parent
from puzzle_core.model.surgery import WEIGHTS
from puzzle_core.spec import ParentSpec
from puzzle_core.work import AssembleWork
from tests.conftest import CPU, trained_variants
from tests.pico import PICOS

STDLIB = Path(__file__).parents[3] / "deployments" / "parents" / "stdlib-2m"
OWN = "attn:kv4+ffn:i512"
ALONE = {
    "fewer KV heads": "attn:kv1+ffn:i512",
    "no attention": "attn:no_op+ffn:i512",
    "linear attention": "attn:linear+ffn:i512",
    "narrower FFN": "attn:kv4+ffn:i256",
    "no FFN": "attn:kv4+ffn:no_op",
    "linear FFN": "attn:kv4+ffn:linear",
    "nothing": "attn:no_op+ffn:no_op",
    "linear attention, no FFN": "attn:linear+ffn:no_op",
    "no attention, linear FFN": "attn:no_op+ffn:linear",
}
PLACES = {"first": 0, "middle": 3, "last": 7}
CHILDREN = {
    f"{kind}, {place}": (OWN,) * layer + (block,) + (OWN,) * (7 - layer)
    for kind, block in ALONE.items()
    for place, layer in PLACES.items()
}
MIXED = (
    "attn:no_op+ffn:i256",
    "attn:kv1+ffn:no_op",
    "attn:no_op+ffn:i512",
    "attn:no_op+ffn:no_op",
    "attn:kv4+ffn:linear",
    "attn:linear+ffn:i256",
    "attn:kv2+ffn:i512",
    "attn:linear+ffn:no_op",
)
CHILDREN |= {"mixed": MIXED, "parent": (OWN,) * 8}
CHILDREN |= {"a block in the place of two layers": (*(OWN,) * 3, "attn:kv2+ffn:i256 x2", *(OWN,) * 3)}
LIKE_LLAMA = ("llama", "mistral", "qwen2", "seed_oss")
CARRIED = [name for name, pico in PICOS.items() if pico.family in LIKE_LLAMA and "window" not in name] + ["phi4"]
"""Pico parents whose children every format holds."""
ODD_WIDTHS = (OWN,) * 6 + ("attn:kv4+ffn:i100", "attn:kv2+ffn:i384")


@pytest.fixture(scope="session")
def stdlib_child(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """The directory of a child of the quickstart's parent, float32, with training-free weights; never changed."""
    parent = Parent(ParentSpec(path=str(STDLIB)))
    contribution_I = torch.arange(parent.shape.ffn_width).flip(0)

    @functools.cache
    def write(blocks: tuple[str, ...]) -> Path:
        library_dir, out_dir = tmp_path_factory.mktemp("library"), tmp_path_factory.mktemp("child")
        architecture, library = Architecture.parse(blocks), []
        for layer, block in enumerate(architecture.layers):
            own, trained = parent.layer_tensors(layer), trained_variants(block, parent.shape.parent_block(layer))
            library.append({variant: library_dir / f"{layer}-{variant}" for variant in trained})
            for variant in block.subblocks:
                if str(variant) in trained:
                    state = variant.row.initial_state(own, parent.shape, variant.size, contribution_I)
                    library[layer][str(variant)].mkdir()
                    save_file(state, library[layer][str(variant)] / WEIGHTS)
        work = AssembleWork(parent="stdlib", architecture=architecture, library=(), dtype="float32")
        child.assemble(work, parent, library, out_dir)
        return out_dir

    return write


@pytest.fixture(params=CHILDREN)
def stdlib_source(request: pytest.FixtureRequest, stdlib_child: Callable[[tuple[str, ...]], Path]) -> Source:
    """Every child, opened for export."""
    return Source(stdlib_child(CHILDREN[request.param]))


@pytest.fixture(scope="session", name="text_ids")
def text_ids() -> torch.Tensor:
    """Tokens of this file: Python, as the parent knows it; (1, 48)."""
    ids = Source(STDLIB).tokenizer(Path(__file__).read_text()[:400]).input_ids
    return torch.tensor([ids[:48]])


@pytest.fixture(scope="session")
def logits_of(text_ids: torch.Tensor) -> Callable[[Path], torch.Tensor]:
    """The in-memory child's logits of these tokens, (48, vocabulary)."""

    @functools.cache
    def run(directory: Path) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = load_child(directory, torch.float32, CPU)(input_ids=text_ids).logits[0]
        return logits

    return run
