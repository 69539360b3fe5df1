import pytest, torch
from transformers import AutoModelForCausalLM
from puzzle_core.model.child import load_parent
from tests.conftest import CPU
from tests.pico import PICOS

@pytest.mark.parametrize("name", PICOS)
def test_logits(name, checkpoint_of, parent_of, ids_NT):
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint_of(name), dtype=torch.float32)(input_ids=ids_NT.long()).logits
    ours = load_parent(parent_of(name), torch.float32, CPU)(input_ids=ids_NT.long()).logits
    print(name, theirs.std(), theirs.softmax(-1).max(-1).values.mean())
    assert torch.equal(theirs, ours)
