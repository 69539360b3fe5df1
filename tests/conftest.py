"""Pico parents, their tokens, activations and children, shared by all tests."""

import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PUZZLE_LOCK_DIR"] = str(
    Path(tempfile.gettempdir()) / f"puzzle-tests-{os.getpid()}"
)  # wait for no other run
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the command line sets it

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from puzzle_core.architecture import Architecture, BlockVariant, Variant
from puzzle_core.cost import latency
from puzzle_core.distill import importance
from puzzle_core.model import child
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import Parent
from puzzle_core.model.surgery import WEIGHTS
from puzzle_core.spec import Dtype, ParentSpec
from puzzle_core.state_dict import State
from puzzle_core.work import AssembleWork, ImportanceWork
from tests.pico import PICOS, SIZES, UNEQUAL, write_pico

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
pytest_plugins = ["tests.workflow", "tests.s3", "tests.faults", "tests.hub"]

CPU = torch.device("cpu")
LONGEST_FILES = ("test_deploy.py", "test_store_s3.py", "test_dask_cluster.py", "test_puzzle.py")
SERVERS = 4
"""Workers whose tests need the session's Prefect server."""
MIXED = (
    "attn:no_op+ffn:i24",
    "attn:kv1+ffn:no_op",
    "attn:no_op+ffn:no_op",
    "attn:kv4+ffn:linear",
    "attn:linear+ffn:i48",
)


def trained_variants(block: BlockVariant, own: BlockVariant) -> list[str]:
    """Ids of the subblocks of a block that come from the library: neither those of the parent's own nor no-ops."""
    return [str(v) for v in block.subblocks if v.kind != "no_op" and v not in own.subblocks]


@pytest.fixture(scope="session", autouse=True)
def _no_turns_left() -> Iterator[None]:
    """Remove the locks of this session's runs (tasks/runtime/locks.py)."""
    yield
    shutil.rmtree(os.environ["PUZZLE_LOCK_DIR"], ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all cores busy to the end; the order that pytest-randomly gave stays as it is otherwise.

    Tests of commands, flows and tasks wait for servers half of their time, and those of the core compute: files of both
    kinds take turns. The longest files come first, for a long file that begins last has one worker alone. The tests of
    a file have one worker, and files that need the session's Prefect server share a few: each starts a server, and most
    make a whole run.
    """
    folders, waiting = ("e2e", "flows", "tasks"), dict[Path, tuple[int, int]]()
    files = dict.fromkeys(item.path for item in items)
    for file in files:
        folder = file.relative_to(Path(__file__).parent).parts[0]
        if folder in folders:
            longest = LONGEST_FILES.index(file.name) if file.name in LONGEST_FILES else len(LONGEST_FILES)
            waiting[file] = longest, folders.index(folder)
    computing = [file for file in files if file not in waiting]
    place = {
        file: (number + 1) / len(group)
        for group in (sorted(waiting, key=waiting.__getitem__), computing)
        for number, file in enumerate(group)
    }
    items.sort(key=lambda item: place[item.path])
    with_server = [item.path for item in items if "prefect_server" in getattr(item, "fixturenames", ())]
    group_of = {file: f"server-{number % SERVERS}" for number, file in enumerate(dict.fromkeys(with_server))}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of.get(item.path, item.path.stem)))


def pytest_configure() -> None:
    """Collect no garbage while tests are imported, which saves a fifth of the time (puzzle_core/start_up.py)."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage from here on, and never look at what the imports made."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock of measurements that ticks one millisecond for every parameter of every module that is called."""
    used = [0]

    def use(module: torch.nn.Module, _: object) -> None:
        used[0] += sum(parameter.numel() for parameter in module.parameters(recurse=False))

    hook = register_module_forward_pre_hook(use)
    monkeypatch.setattr(latency, "_now", lambda _: used[0] / 1e3)
    yield
    hook.remove()


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a pico parent by name; shared, so never changed."""
    picos = PICOS | UNEQUAL
    return functools.cache(lambda name: write_pico(tmp_path_factory.mktemp(name), picos[name]))


@pytest.fixture(scope="session")
def reference_logits(checkpoint_of: Callable[[str], Path], ids_NT: torch.Tensor) -> Callable[[str], torch.Tensor]:
    """Logits (N, T, V) of `ids_NT` by a pico parent's name, from transformers' own model."""

    @functools.cache
    def run(name: str) -> torch.Tensor:
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(checkpoint_of(name), dtype=torch.float32)
            logits: torch.Tensor = model(input_ids=ids_NT.long()).logits
        return logits

    return run


@pytest.fixture
def copy_of(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a pico parent's directory, to be damaged."""
    return lambda name: Path(shutil.copytree(checkpoint_of(name), tmp_path / name))


@pytest.fixture(scope="session")
def parent_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Parent]:
    """A pico parent by name, opened; shared, since nothing ever writes to a parent."""
    return functools.cache(lambda name: Parent(ParentSpec(path=str(checkpoint_of(name)))))


@pytest.fixture
def parent(parent_of: Callable[[str], Parent]) -> Parent:
    """The plain one: Llama, untied, no biases."""
    return parent_of("llama")


@pytest.fixture(scope="session", name="ids_NT")
def ids() -> torch.Tensor:
    """Six windows of sixteen tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, SIZES["vocab_size"], (6, 16), generator=generator, dtype=torch.int32)


@pytest.fixture(scope="session")
def tokens_dir(ids_NT: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ids_NT` as a tokens artifact."""
    directory = tmp_path_factory.mktemp("tokens")
    save_file({"tokens": ids_NT}, directory / "tokens.safetensors")
    return directory


@pytest.fixture(scope="session")
def activations_of(
    parent_of: Callable[[str], Parent], ids_NT: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Activations]:
    """The captured states of a pico parent by name, all layers of them."""

    @functools.cache
    def capture(name: str) -> Activations:
        activations = Activations(tmp_path_factory.mktemp("states"), parent_of(name), ids_NT, torch.float32, CPU)
        activations.capture_embedding()
        for layer in range(activations.parent.shape.layers):
            activations.capture_layer(layer)
        return activations

    return capture


@pytest.fixture
def activations(activations_of: Callable[[str], Activations]) -> Activations:
    """Those of the plain parent."""
    return activations_of("llama")


@pytest.fixture(scope="session")
def contributions_of(
    parent_of: Callable[[str], Parent], tokens_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The importance artifact of a pico parent by name."""

    @functools.cache
    def measure(name: str) -> Path:
        directory = tmp_path_factory.mktemp("contributions")
        importance.measure_contributions(
            ImportanceWork(parent=name, tokens="ids"), parent_of(name), tokens_dir, directory
        )
        return directory

    return measure


@pytest.fixture(scope="session")
def initial_state(
    parent_of: Callable[[str], Parent], contributions_of: Callable[[str], Path]
) -> Callable[[str, int, str], State]:
    """Training-free weights of a variant: of which parent, in which layer, by id."""

    def state(name: str, layer: int, variant_id: str) -> State:
        variant, parent = Variant.parse(variant_id), parent_of(name)
        pruned = variant.row.needs_contributions
        contribution_I = importance.load_contribution(contributions_of(name), layer) if pruned else None
        own_sizes = parent.shape.of_layer(layer)
        return variant.row.initial_state(parent.layer_tensors(layer), own_sizes, variant.size, contribution_I)

    return state


@pytest.fixture(scope="session")
def assemble(
    parent_of: Callable[[str], Parent],
    initial_state: Callable[[str, int, str], State],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Assemble a new child of a pico parent from training-free weights; of the parent's own blocks if not said."""

    def write(
        name: str, blocks: tuple[str, ...] | None = None, dtype: Dtype = "float32", fuse_ffn: bool = False
    ) -> Path:
        parent, library_dir = parent_of(name), tmp_path_factory.mktemp("library")
        architecture = Architecture.parse(blocks) if blocks else Architecture.of_parent(parent.shape)
        library: list[dict[str, Path]] = []
        for layer, block in enumerate(architecture.layers):
            trained = trained_variants(block, parent.shape.parent_block(layer))
            library.append({variant: library_dir / f"{layer}-{variant}" for variant in trained})
            for variant, directory in library[layer].items():
                directory.mkdir()
                save_file(initial_state(name, layer, variant), directory / WEIGHTS)
        out_dir = tmp_path_factory.mktemp("child")
        work = AssembleWork(parent=name, architecture=architecture, library=(), dtype=dtype, fuse_ffn=fuse_ffn)
        child.assemble(work, parent, library, out_dir)
        return out_dir

    return write


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--write-golden` writes tests/goldens/pico_run.json anew."""
    parser.addoption("--write-golden", action="store_true", help="write the golden of a run's numbers anew")
