"""Captured states: those of transformers' own model, whole or absent."""

import errno
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core.errors import StorageError
from puzzle_core.families.family import FAMILIES
from puzzle_core.model import activations as activations_module
from puzzle_core.model.activations import Activations, drop_layer
from puzzle_core.model.child import load_parent
from puzzle_core.model.remote.modeling_puzzle import PuzzleBlock
from tests.conftest import CPU
from tests.pico import PICOS


@pytest.fixture
def fresh(parent, ids_NT, tmp_path):
    """Activations with the embedding and nothing more."""
    activations = Activations(tmp_path / "states", parent, ids_NT, torch.float32, CPU)
    activations.capture_embedding()
    return activations


@pytest.mark.parametrize("name", [name for name, pico in PICOS.items() if not pico.config or pico.family != "llama"])
def test_states_are_those_that_hooks_see_in_transformers(name, activations_of, checkpoint_of, ids_NT):
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of(name), dtype=torch.float32)
    entered, middle, left = {}, {}, {}
    row = FAMILIES[PICOS[name].family]
    for number, layer in enumerate(model.model.layers):
        first_of_ffn = getattr(layer, row.ffn_norms.before or row.ffn_names.module)
        layer.register_forward_pre_hook(lambda _, args, number=number: entered.update({number: args[0]}))
        first_of_ffn.register_forward_pre_hook(lambda _, args, number=number: middle.update({number: args[0]}))
        layer.register_forward_hook(lambda *seen, number=number: left.update({number: seen[-1]}))
    with torch.no_grad():
        model(input_ids=ids_NT.long())
    activations = activations_of(name)
    for layer in entered:
        assert torch.equal(activations.layer_input(layer), entered[layer])
        assert torch.equal(activations.post_attention(layer), middle[layer])
        assert torch.equal(activations.layer_input(layer + 1), left[layer])


def test_states_do_not_depend_on_the_rows_of_a_batch(activations, ids_NT, tmp_path, monkeypatch):
    monkeypatch.setattr(activations_module, "FORWARD_TOKENS", 64)
    four_rows = Activations(tmp_path, activations.parent, ids_NT, torch.float32, CPU)
    assert [(rows.start, rows.stop) for rows in four_rows.batches()] == [(0, 4), (4, 8)]
    four_rows.capture_embedding()
    four_rows.capture_layer(0)
    torch.testing.assert_close(four_rows.layer_input(1), activations.layer_input(1).clone())


def test_states_are_kept_in_the_type_asked_for(parent, ids_NT, activations, tmp_path):
    half = Activations(tmp_path, parent, ids_NT, torch.bfloat16, CPU)
    half.capture_embedding()
    half.capture_layer(0)
    assert half.layer_input(1).dtype == torch.bfloat16
    error = (half.layer_input(1).float() - activations.layer_input(1)).norm() / activations.layer_input(1).norm()
    assert 0 < error < 0.02


def test_full_disk_is_said_with_bytes_and_remedy(fresh, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = sorted(fresh.directory.iterdir())
    with pytest.raises(StorageError, match=r"12,288 bytes.*No space left.*runtime\.scratch"):
        fresh.capture_layer(0)
    assert sorted(fresh.directory.iterdir()) == before


def test_a_crash_in_the_middle_of_a_layer_leaves_nothing_behind(fresh, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    before = sorted(fresh.directory.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(PuzzleBlock, "feed", crash)
        with pytest.raises(KeyboardInterrupt):
            fresh.capture_layer(0)
    assert sorted(fresh.directory.iterdir()) == before
    fresh.capture_layer(0)
    assert fresh.has_layer_input(1)


def test_a_captured_layer_is_not_run_again(fresh, monkeypatch):
    fresh.capture_layer(0)
    monkeypatch.setattr(PuzzleBlock, "attend", lambda *_, **__: pytest.fail("ran again"))
    fresh.capture_layer(0)
    fresh.capture_layer(0, keep_post_attention=False)


def test_log_probabilities_are_those_of_the_logits_kept_or_not(fresh, parent, ids_NT):
    logits = load_parent(parent, torch.float32, CPU)(input_ids=ids_NT.long()).logits
    for layer in range(parent.shape.layers):
        fresh.capture_layer(layer)
    computed = fresh.predictions(slice(1, 4))(slice(2, 40))
    torch.testing.assert_close(computed, logits[1:4].log_softmax(-1).flatten(0, 1)[2:40])
    fresh.capture_log_probabilities()
    assert (fresh.directory / "log-probabilities.bin").stat().st_size == fresh.log_probability_bytes()
    torch.testing.assert_close(fresh.predictions(slice(1, 4))(slice(2, 40)), computed)


def test_log_probabilities_that_take_too_much_are_not_kept(fresh, monkeypatch):
    monkeypatch.setattr(activations_module, "LARGEST_LOG_PROBABILITIES_BYTES", fresh.log_probability_bytes() - 1)
    fresh.capture_log_probabilities()
    assert [file.name for file in fresh.directory.iterdir()] == ["layer-input-000.bin"]


def test_the_files_of_one_layer_are_dropped(fresh):
    fresh.capture_layer(0)
    drop_layer(fresh.directory, 0)
    assert [file.name for file in fresh.directory.iterdir()] == ["layer-input-001.bin"]
