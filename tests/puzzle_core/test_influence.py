"""Block influence, and depth pruning by it: against transformers' own model with layers deleted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core.architecture import Architecture
from puzzle_core.errors import InfeasibleError
from puzzle_core.influence import measure_influence
from puzzle_core.model.child import load_child
from puzzle_core.search.baselines import drop_layers
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.run_search import find_architecture
from puzzle_core.work import InfluenceWork
from tests.conftest import CPU
from tests.puzzle_core.search.test_problem_builder import costs, request, scores

EMPTY = "attn:no_op+ffn:no_op"
WORK = InfluenceWork(parent="p", tokens="t", dtype="float32")


@torch.no_grad()
def test_the_influence_is_one_minus_the_cosine_of_what_enters_and_leaves(activations, checkpoint_of, ids_NT):
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of("llama"), dtype=torch.float32)
    states = model(input_ids=ids_NT.long(), output_hidden_states=True).hidden_states[:5]  # the sixth is normalised
    record = measure_influence(WORK, activations)
    assert [len(runs) for runs in record.influence] == [5, 4, 3, 2, 1]
    for first, entering in enumerate(states):
        for run, leaving in enumerate(states[first + 1 :]):
            cosine = torch.cosine_similarity(entering, leaving, dim=-1).mean().item()
            assert record.influence[first][run] == pytest.approx(1 - cosine, abs=1e-5)


@torch.no_grad()
def test_a_child_without_layers_is_the_parent_with_these_layers_deleted(assemble, checkpoint_of, ids_NT):
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of("llama"), dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList([model.model.layers[layer] for layer in (0, 2, 4)])
    expected = model(input_ids=ids_NT.long(), use_cache=False).logits
    own = "attn:kv4+ffn:i48"
    child = load_child(assemble("llama", (own, EMPTY, own, EMPTY, own)), torch.float32, CPU)
    assert torch.equal(child(input_ids=ids_NT.long()).logits, expected)


INFLUENCE = [[0.4, 0.5, 0.9, 1.0], [0.3, 0.6, 0.7], [0.1, 0.8], [0.2]]
"""Of four layers: singly 2 and 3 change least, but as a run 0 and 1 do."""


@pytest.mark.parametrize(
    ("limit", "together", "dropped"),
    [
        ("100%", False, ()),
        ("75%", False, (2,)),
        ("50%", False, (2, 3)),
        ("75%", True, (2,)),
        ("50%", True, (0, 1)),
        ("49%", True, (1, 2, 3)),
    ],
)
def test_the_fewest_layers_of_least_influence_go(limit, together, dropped):
    builder = ProblemBuilder(request({"block_time": limit}), scores(), costs())
    problem = builder.problem({"chat": 2})
    found = drop_layers(problem, INFLUENCE, EMPTY, together)
    parent = problem.option_ids(problem.parent)
    assert found.options == tuple(EMPTY if layer in dropped else own for layer, own in enumerate(parent))
    assert found.objective == sum(problem.score[layer][problem.options[layer].index(EMPTY)] for layer in dropped)


def test_layers_that_must_stay_are_not_dropped_and_no_way_out_is_an_error():
    kept = {"keep": {"attention": [1, 2]}}
    builder = ProblemBuilder(request({"block_time": "50%"}, constraints=kept), scores(), costs())
    found = drop_layers(builder.problem({"chat": 2}), INFLUENCE, EMPTY, together=False)
    assert [layer for layer, option in enumerate(found.options) if option == EMPTY] == [0, 3]
    with pytest.raises(InfeasibleError, match="2 of 4 may be dropped"):
        drop_layers(builder.problem({"chat": 2}), INFLUENCE, EMPTY, together=True)


def test_a_search_has_these_baselines_where_influence_was_measured():
    asked = request({"block_time": "50%"}, search={"baselines": ["depth", "depth_run"]})
    builder = ProblemBuilder(asked, scores(), costs())
    record = find_architecture(builder, influence=INFLUENCE)
    kept = "attn:kv4+ffn:i512"
    assert [found.method for found in record.baselines] == ["depth", "depth_run"]
    assert record.baselines[1].architecture == Architecture.parse([EMPTY, EMPTY, kept, kept])
    assert "no influence of layers" in find_architecture(builder).omissions["baseline depth"]
