"""Coupled BLD: both halves of an option are trained together, from the input of its first layer to the output of its
last one; scores and children take both from that one artifact."""

import pytest
import torch
from safetensors.torch import save_file

from puzzle_core import scoring
from puzzle_core.architecture import Architecture, Option, Variant
from puzzle_core.distill import bld, gkd
from puzzle_core.distill.losses import kl_divergence
from puzzle_core.model import child
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.parent import Parent
from puzzle_core.model.surgery import WEIGHTS, load_weights, variant_block
from puzzle_core.spec import BldSpec, GkdSpec, ParentSpec
from puzzle_core.work import AssembleWork, BldWork, ScoreWork
from tests.conftest import CPU
from tests.pico import edit_tensors

LAYER = 1


@pytest.fixture
def distil(activations, tmp_path):
    """Train an option from layer 1 of the plain parent on; returns its record and its weights."""

    def run(option, activations=activations, halves=(None, None), **spec):
        settings = {"batch_tokens": 48, "epochs": 10, "optimizer": {"learning_rate": 0.01}} | spec
        work = BldWork(
            parent="p",
            layer=LAYER,
            variant=Option.parse(option),
            tokens="t",
            contributions=None,
            halves=("a", "f"),
            seed=0,
            spec=BldSpec(**settings),
        )
        record = bld.train_variant(work, activations, None, tmp_path, halves=halves)
        return record, load_weights(tmp_path)

    return run


@pytest.fixture
def half(initial_state, tmp_path):
    """The library artifact of a variant of layer 1, with training-free weights."""

    def write(variant):
        directory = tmp_path / variant
        directory.mkdir(exist_ok=True)
        save_file(initial_state("llama", LAYER, variant), directory / WEIGHTS)
        return directory

    return write


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_the_parents_own_halves_stay_at_zero_and_unchanged(name, distil, activations_of):
    activations = activations_of(name)
    settings = {"batch_tokens": 96, "optimizer": {"weight_decay": 0}}
    record, weights = distil(str(activations.parent.shape.parent_block(LAYER)), activations, **settings)
    assert record.curve == (0.0,) * 10
    own = activations.parent.layer_tensors(LAYER)
    assert weights.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights.items())


def test_a_pair_starts_from_its_trained_halves_and_both_learn(distil, half, initial_state):
    record, weights = distil("attn:linear+ffn:i24", halves=(half("attn:linear"), half("ffn:i24")), epochs=3)
    halves = initial_state("llama", LAYER, "attn:linear") | initial_state("llama", LAYER, "ffn:i24")
    assert record.curve[-1] < record.curve[0]
    assert record.final_loss < record.initial_loss
    assert weights.keys() == halves.keys()
    changed = [name for name, tensor in weights.items() if not torch.equal(tensor, halves[name])]
    assert {"self_attn.linear_attn.weight", "mlp.down_proj.weight"} <= {*changed}


def test_the_first_loss_of_a_pair_is_that_of_its_halves_together(distil, half, activations, initial_state):
    record, _ = distil("attn:kv1+ffn:i24", halves=(half("attn:kv1"), half("ffn:i24")))
    blocks = [
        variant_block(activations.parent, LAYER, Variant.parse(v), initial_state("llama", LAYER, v), torch.float32, CPU)
        for v in ("attn:kv1", "ffn:i24")
    ]
    entering, target = activations.layer_input(LAYER)[5:], activations.layer_input(LAYER + 1)[5:]
    with torch.no_grad():
        output = blocks[1].feed(blocks[0].attend(entering, **activations.contexts()[LAYER]))
    expected = (output - target).square().mean() / target.square().mean()
    assert record.initial_loss == pytest.approx(expected.item(), rel=1e-5)


def test_an_ffn_learns_to_do_without_its_attention(distil, activations):
    """The parent's own FFN alone is what the decoupled no-op leaves; trained for the absence, it is nearer."""
    record, weights = distil("attn:no_op+ffn:i48", epochs=3)
    assert {name.split(".")[0] for name in weights} == {"mlp", "post_attention_layernorm"}
    target = activations.layer_input(LAYER + 1)[5:]
    alone = activations.parent.block(LAYER, torch.float32, CPU).feed(activations.layer_input(LAYER)[5:])
    assert record.initial_loss == pytest.approx(((alone - target).square().mean() / target.square().mean()).item())
    assert record.final_loss < record.initial_loss


@pytest.fixture
def silent_parent(copy_of):
    """The plain parent with a layer 2 that adds nothing."""
    directory = copy_of("llama")

    def silence(tensors):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{LAYER + 1}.{name}.weight"].zero_()

    edit_tensors(directory, silence)
    return Parent(ParentSpec(path=str(directory)))


def test_a_span_over_a_layer_that_does_nothing_is_the_coupled_pair_bitwise(
    silent_parent, ids_NT, half, distil, tmp_path
):
    states = Activations(tmp_path / "states", silent_parent, ids_NT, torch.float32, CPU)
    states.capture_embedding()
    for layer in range(LAYER + 2):
        states.capture_layer(layer)
    halves = half("attn:kv1"), half("ffn:i24")
    pair, weights = distil("attn:kv1+ffn:i24", states, halves)
    span, weights_of_span = distil("attn:kv1+ffn:i24 x2", states, halves)
    assert span.curve == pair.curve
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of_span.items())


OWN = "attn:kv4+ffn:i48"
OPTIONS = (OWN, "attn:kv1+ffn:i24 x2", "attn:linear+ffn:i24", OWN)


@pytest.fixture
def whole_state(initial_state):
    """The weights of an option whose halves are one artifact: here the training-free ones of layer 4."""

    def state(name, option):
        first, second = (initial_state(name, 4, str(variant)) for variant in option.block.subblocks)
        return first | second

    return state


@pytest.fixture
def child_of(parent_of, whole_state, tmp_path):
    """The directory of a child of a pico parent, whose options, but the parent's own, are whole artifacts."""

    def write(name, *options):
        architecture, library = Architecture.parse(options), [{} for _ in range(5)]
        for layer, option in architecture.options.items():
            if str(option) != OWN:
                library[layer] = {str(option): tmp_path / f"{layer} {option}"}
                library[layer][str(option)].mkdir()
                save_file(whole_state(name, option), library[layer][str(option)] / WEIGHTS)
        out = tmp_path / "child"
        out.mkdir()
        work = AssembleWork(parent="p", architecture=architecture, library=(), dtype="float32")
        child.assemble(work, parent_of(name), library, out)
        return out

    return write


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "smollm3", "gemma3_text"])
def test_a_child_with_a_span_equals_the_parents_layers_with_these_blocks(
    name, child_of, parent_of, whole_state, ids_NT
):
    parent, options = parent_of(name), Architecture.parse(OPTIONS).options
    model = load_parent(parent, torch.float32, CPU)
    blocks = list(model.model.layers)
    for layer in (1, 3):
        blocks[layer] = variant_block(
            parent, layer, options[layer], whole_state(name, options[layer]), torch.float32, CPU
        )
    hidden = model.model.embed(ids_NT.long())
    contexts = model.model.contexts(hidden, torch.arange(16)[None])
    for layer in (0, 1, 3, 4):
        hidden = blocks[layer](hidden, **contexts[blocks[layer].attention_kind])
    expected = model.head(model.model.normalise(hidden))
    found, cache, steps = load_child(child_of(name, *OPTIONS), torch.float32, CPU), None, []
    assert found.config.num_hidden_layers == len(found.model.layers) == 4
    assert torch.equal(found(input_ids=ids_NT.long()).logits, expected)
    for start, stop in [(0, 9), (9, 10), (10, 16)]:
        output = found(input_ids=ids_NT[:, start:stop].long(), use_cache=True, past_key_values=cache)
        cache, _ = output.past_key_values, steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3])
def test_the_score_of_an_option_is_the_kl_of_the_child_that_differs_in_it_alone(
    layer, parent, activations, whole_state, child_of, ids_NT
):
    option = Architecture.parse(OPTIONS).options[layer]
    work = ScoreWork(
        parent="p", layer=layer, block=option.block, span=option.span, attention=None, ffn=None, whole="w", tokens="t",
        dtype="float32",
    )  # fmt: skip
    score = scoring.score_block(work, activations, {str(option): whole_state("llama", option)})
    blocks = [OWN] * (5 - option.span)
    blocks.insert(layer, str(option))
    models = load_parent(parent, torch.float32, CPU), load_child(child_of("llama", *blocks), torch.float32, CPU)
    log_p, log_q = (model(input_ids=ids_NT.long()).logits.log_softmax(-1) for model in models)
    assert score.kl_nats_per_token == pytest.approx(kl_divergence(log_p, log_q).mean().item(), rel=1e-4)
    assert score.option == option


@torch.no_grad()
def test_distillation_compares_a_span_with_the_last_of_its_layers(silent_parent, ids_NT, tmp_path):
    """Layer 2 does nothing, so layer 1 in the place of both is the parent, if states are matched as they should."""
    architecture = Architecture.parse([OWN, f"{OWN} x2", OWN, OWN])
    library = [{} for _ in range(5)]
    library[1] = {f"{OWN} x2": tmp_path}
    save_file(silent_parent.layer_tensors(1), tmp_path / WEIGHTS)
    out = tmp_path / "child"
    out.mkdir()
    work = AssembleWork(parent="p", architecture=architecture, library=(), dtype="float32")
    child.assemble(work, silent_parent, library, out)
    models = load_parent(silent_parent, torch.float32, CPU), load_child(out, torch.float32, CPU)
    imitated = [layer + option.span - 1 for layer, option in architecture.options.items()]
    terms = gkd.loss_terms(*models, ids_NT.long(), GkdSpec(), imitated=imitated)
    assert terms["kl"].item() == 0
    assert terms["cosine"].item() == pytest.approx(0, abs=1e-5)
    other = gkd.loss_terms(*models, ids_NT.long(), GkdSpec(), imitated=[0, 1, 2, 3])
    assert other["cosine"].item() > 0.1
