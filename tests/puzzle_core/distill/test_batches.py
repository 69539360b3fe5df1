"""Variants of a layer train side by side: from one read, or one pass of the parent, and bitwise as each does alone."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from puzzle_core.architecture import Variant
from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.distill import bld
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import Activations
from puzzle_core.model.remote.modeling_puzzle import PuzzleBlock
from puzzle_core.model.surgery import load_weights
from puzzle_core.spec import BldSpec
from puzzle_core.work import BldWork
from tests.conftest import CPU

LAYER = 1
ELEVEN = [
    "attn:kv2",
    "attn:kv1",
    "attn:linear",
    "ffn:linear",
    *(f"ffn:i{width}" for width in (40, 32, 24, 16, 12, 8, 4)),
]
STATE_BYTES = 16 * 32 * 4
"""Of one window in one file."""


@pytest.fixture
def train(activations, contributions_of, tmp_path):
    """Train a variant, and return its weights and its record."""

    def run(variant, spec=None, layer=LAYER, activations=activations, most=1, **options):
        spec = BldSpec(**({"batch_tokens": 48, "epochs": 4} | (spec or {})))
        work = BldWork(
            parent="p", layer=layer, variant=Variant.parse(variant), tokens="t", contributions="c", seed=0, spec=spec
        )
        place = tmp_path / f"{layer} {variant} {threading.get_ident()}"
        place.mkdir(exist_ok=True)
        slot = ComputeSlot("cpu", most)
        record = bld.train_variant(work, activations, contributions_of("llama"), place, slot=slot, **options)
        return load_weights(place), record

    return run


@pytest.fixture
def together(monkeypatch):
    """Have so many trainings begin at the same time, once each has joined the others."""

    def begin(count):
        barrier, initial = threading.Barrier(count, timeout=30), bld.initial_state

        def wait(*arguments):
            barrier.wait()
            return initial(*arguments)

        monkeypatch.setattr(bld, "initial_state", wait)

    return begin


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def side_by_side(train, calls):
    """What these calls of `train` give, each in a thread of its own: results or errors."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(train, *arguments, **options) for arguments, options in calls]
        return [future.exception() or future.result() for future in futures]


@pytest.fixture
def read_bytes(monkeypatch):
    """Bytes of captured states that are read, by file."""
    read, states = Counter(), Activations.states

    def count(self, name, rows):
        found = states(self, name, rows)
        read[name] += found.numel() * found.element_size()
        return found

    monkeypatch.setattr(Activations, "states", count)
    return read


def test_eleven_variants_of_a_layer_read_its_states_once(train, together, read_bytes):
    alone = {variant: train(variant) for variant in ELEVEN}
    one_read = Counter(read_bytes)
    assert len(one_read) == 3
    read_bytes.clear()
    together(len(ELEVEN))
    results = side_by_side(train, [((variant,), {"most": len(ELEVEN)}) for variant in ELEVEN])
    windows = 4 * 6 + 2 * 1  # of four epochs, and the held-back one before and after
    assert read_bytes == dict.fromkeys(one_read, windows * STATE_BYTES)
    assert sum(one_read.values()) == (len(ELEVEN) * 2) * windows * STATE_BYTES
    for variant, (weights, record) in zip(ELEVEN, results, strict=True):
        assert same(weights, alone[variant][0]), variant
        assert record.curve == alone[variant][1].curve


def test_taking_turns_changes_nothing(train):
    some = ["attn:kv1", "ffn:i24", "ffn:linear"]
    alone = {variant: train(variant)[0] for variant in some}
    results = side_by_side(train, [((variant,), {}) for variant in some])
    assert all(same(weights, alone[variant]) for variant, (weights, _) in zip(some, results, strict=True))
    assert all(0 < record.seconds < 60 for _, record in results)


def test_a_variant_that_diverges_changes_no_other(train, together):
    alone = train("attn:kv1")[0]
    together(2)
    reckless = {"optimizer": {"learning_rate": 30.0}}
    calls = [(("ffn:i24", reckless), {"most": 2}), (("attn:kv1",), {"most": 2})]
    error, (weights, _) = side_by_side(train, calls)
    assert isinstance(error, NonFiniteError)
    assert same(weights, alone)


def test_a_resumed_variant_joins_at_its_own_step(train, together, tmp_path):
    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    alone = {variant: train(variant)[0] for variant in ("attn:kv2", "ffn:i12")}
    checkpoints = Checkpoints(tmp_path / "checkpoint", least_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train("attn:kv2", checkpoints=checkpoints, report=stop)
    together(2)
    steps = []
    calls = [
        (("attn:kv2",), {"most": 2, "checkpoints": checkpoints, "report": steps.append}),
        (("ffn:i12",), {"most": 2}),
    ]
    results = side_by_side(train, calls)
    assert steps[0].step == 5
    assert all(same(weights, alone[variant]) for variant, (weights, _) in zip(alone, results, strict=True))


@pytest.fixture
def unstored(parent, ids_NT, tmp_path):
    """Activations of which nothing is captured."""
    return Activations(tmp_path / "nothing", parent, ids_NT, torch.float32, CPU)


@pytest.mark.parametrize("fits", [True, False])
def test_streamed_states_give_the_same_weights_and_the_parent_runs_once_for_all_layers(
    fits, train, together, unstored, monkeypatch
):
    variants = [(0, "ffn:i24"), (1, "attn:kv1"), (1, "ffn:linear"), (3, "attn:linear"), (3, "ffn:i12")]
    stored = {(layer, variant): train(variant, layer=layer)[0] for layer, variant in variants}
    ran, block = Counter(), Activations.block

    def count(self, layer):
        ran[layer] += 1
        return block(self, layer)

    monkeypatch.setattr(Activations, "block", count)
    monkeypatch.setattr(unstored.parent, "fits_cache", lambda _: fits)
    together(len(variants))
    options = {"activations": unstored, "source": "streamed", "most": len(variants)}
    calls = [((variant,), {"layer": layer, **options}) for layer, variant in variants]
    results = side_by_side(train, calls)
    assert [
        place for place, (weights, _) in zip(variants, results, strict=True) if not same(weights, stored[place])
    ] == []
    batches = 8 + 2  # steps, and the held-back window before and after
    passes = batches if fits else -(-batches // 4)
    assert ran == dict.fromkeys(range(4), passes)  # up to layer 3, and not the last one
    assert not unstored.directory.exists()


@pytest.mark.parametrize("loss", ["tensor", "token"])
@pytest.mark.parametrize("variant", ["attn:kv1", "ffn:i12"])
def test_micro_batches_add_up_to_the_batch(variant, loss, train, monkeypatch):
    spec = {"batch_tokens": 64, "loss": loss, "optimizer": {"learning_rate": 0.003}}
    whole, record = train(variant, spec)
    windows = []

    def watched(act):
        return lambda self, states, **context: windows.append(len(states)) or act(self, states, **context)

    for name in ("attend", "feed"):
        monkeypatch.setattr(PuzzleBlock, name, watched(getattr(PuzzleBlock, name)))
    parts, in_parts = train(variant, spec | {"micro_batch_tokens": 16})
    assert set(windows) == {1}
    assert in_parts.curve == pytest.approx(record.curve, rel=1e-5)
    assert (in_parts.initial_loss, in_parts.final_loss) == pytest.approx((record.initial_loss, record.final_loss))
    for name, tensor in whole.items():
        assert (parts[name] - tensor).norm() < 1e-3 * tensor.norm(), name
