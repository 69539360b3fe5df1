"""Channel contributions: those that hooks on transformers' own model give."""

import pytest
import torch

from puzzle_core.distill import importance
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from puzzle_core.work import ImportanceWork
from tests.pico import edit_tensors
from tests.reference.variants import contributions

WORK = ImportanceWork(parent="p", tokens="t")


@pytest.mark.parametrize("name", ["llama", "mlp-bias", "smollm3", "bfloat16", "arcee", "phi3", "gemma3_text"])
def test_contributions_are_those_of_hooks_on_every_down_projection(name, contributions_of, checkpoint_of, ids_NT):
    for layer, expected in enumerate(contributions(checkpoint_of(name), ids_NT)):
        torch.testing.assert_close(importance.load_contribution(contributions_of(name), layer), expected)


def test_contributions_do_not_depend_on_the_rows_of_a_batch(
    parent, tokens_dir, contributions_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(importance, "FORWARD_TOKENS", 64)
    importance.measure_contributions(WORK, parent, tokens_dir, tmp_path)
    for layer in range(parent.shape.layers):
        expected = importance.load_contribution(contributions_of("llama"), layer)
        torch.testing.assert_close(importance.load_contribution(tmp_path, layer), expected)


def test_a_damaged_layer_is_named(copy_of, tokens_dir, tmp_path):
    directory = copy_of("llama")
    edit_tensors(directory, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"][0, 0].fill_(torch.inf))
    with pytest.raises(NonFiniteError, match="layer 3"):
        importance.measure_contributions(WORK, Parent(ParentSpec(path=str(directory))), tokens_dir, tmp_path)
