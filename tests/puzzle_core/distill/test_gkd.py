"""Global distillation: nothing to learn for the parent's copy, much for a mixed child, and an exact resume."""

import pytest
import torch
from safetensors.torch import load_file

from puzzle_core.architecture import Architecture
from puzzle_core.distill import gkd
from puzzle_core.distill.gkd import loss_terms
from puzzle_core.distill.losses import cosine_distance, kl_divergence, next_token_loss
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.remote.modeling_puzzle import PuzzleBlock
from puzzle_core.spec import GkdSpec
from puzzle_core.work import GkdWork
from tests.conftest import CPU, MIXED

BATCH = {"batch_tokens": 48, "epochs": 3, "optimizer": {"learning_rate": 0.005}}


@pytest.fixture
def distil(parent_of, tokens_dir, tmp_path):
    """Distil a child of a pico parent; half of the windows in a batch, three passes."""

    def run(
        child_dir, name="llama", saved_as="float32", checkpoints=None, report=None, threads=1, seed=0, recompute=False,
        **spec,
    ):  # fmt: skip
        out_dir = tmp_path / f"distilled-{len(list(tmp_path.iterdir()))}"
        out_dir.mkdir()
        work = GkdWork(
            parent="p",
            child="c",
            architecture=Architecture.parse(MIXED),
            tokens="t",
            dtype=saved_as,
            seed=seed,
            spec=GkdSpec(**(BATCH | spec)),
        )
        record = gkd.distil(
            work, parent_of(name), child_dir, tokens_dir, out_dir, checkpoints, report, threads, recompute=recompute
        )
        return record, out_dir

    return run


def weights(directory):
    return load_file(directory / "model.safetensors")


def same(one, other):
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_the_parents_copy_has_nothing_to_learn(assemble, parent, ids_NT):
    parent_model, student = load_parent(parent, torch.float32, CPU), load_child(assemble("llama"), torch.float32, CPU)
    terms = loss_terms(parent_model, student, ids_NT.long(), GkdSpec())
    sum(terms.values()).backward()
    assert terms["kl"].item() == 0
    assert terms["cosine"].item() == pytest.approx(0, abs=1e-5)
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-5


def test_a_mixed_child_has_much_to_learn(assemble, parent, ids_NT):
    parent_model, student = (
        load_parent(parent, torch.float32, CPU),
        load_child(assemble("llama", MIXED), torch.float32, CPU),
    )
    terms = loss_terms(parent_model, student, ids_NT.long(), GkdSpec())
    sum(terms.values()).backward()
    assert min(terms["kl"].item(), terms["cosine"].item()) > 0.1
    assert all(p.grad.abs().max() > 1e-4 for p in student.parameters())


def test_terms_are_the_weighted_losses_of_logits_and_of_what_leaves_every_layer(assemble, activations, ids_NT):
    parent_model = load_parent(activations.parent, torch.float32, CPU)
    student = load_child(assemble("llama", MIXED), torch.float32, CPU)
    left = []
    for block in student.model.layers:
        block.register_forward_hook(lambda _, __, output: left.append(output))
    terms = loss_terms(parent_model, student, ids_NT.long(), GkdSpec(cosine_weight=2, kl_weight=3, lm_weight=4))
    distances = [cosine_distance(activations.layer_input(layer + 1), states) for layer, states in enumerate(left)]
    parent_NTV, student_NTV = (m(input_ids=ids_NT.long()).logits.log_softmax(-1) for m in (parent_model, student))
    surprise = next_token_loss(student_NTV[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten().long())
    torch.testing.assert_close(terms["cosine"], 2 * sum(distances))
    torch.testing.assert_close(terms["kl"], 3 * kl_divergence(parent_NTV, student_NTV).mean())
    torch.testing.assert_close(terms["lm"], 4 * surprise.mean())


@pytest.mark.parametrize(
    ("spec", "computed"),
    [
        ({"cosine_weight": 0}, {"kl_divergence"}),
        ({"kl_weight": 0}, {"cosine_distance"}),
        ({"kl_weight": 0, "cosine_weight": 0, "lm_weight": 1}, {"next_token_loss"}),
    ],
)
def test_terms_of_weight_zero_are_not_computed(spec, computed, assemble, parent, ids_NT, monkeypatch):
    for loss in {"kl_divergence", "cosine_distance", "next_token_loss"} - computed:
        monkeypatch.setattr(gkd, loss, lambda *_: pytest.fail("computed"))
    parent_model, student = (
        load_parent(parent, torch.float32, CPU),
        load_child(assemble("llama", MIXED), torch.float32, CPU),
    )
    assert len(loss_terms(parent_model, student, ids_NT.long(), GkdSpec(**spec))) == 1


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_mixed_child_learns_and_stays_a_child(name, assemble, distil, ids_NT):
    child_dir = assemble(name, MIXED)
    record, out_dir = distil(child_dir, name, saved_as="bfloat16")
    assert record.curve[-1]["loss"] < 0.95 * record.curve[0]["loss"]
    assert record.curve[0].keys() == {"loss", "cosine", "kl"}
    assert record.tokens == 6 * 48
    assert weights(out_dir).keys() == weights(child_dir).keys()
    assert load_child(out_dir, torch.float32, CPU)(input_ids=ids_NT.long()).logits.isfinite().all()


@pytest.mark.parametrize("spec", [{}, {"kl_weight": 0}], ids=["all", "cosine alone"])
def test_resumed_is_bitwise_the_uninterrupted(spec, assemble, distil, tmp_path):
    def stop(progress):
        if progress.step == 4:
            raise KeyboardInterrupt

    child_dir, checkpoints = assemble("llama", MIXED), Checkpoints(tmp_path / "checkpoint", least_seconds=0)
    uninterrupted, one = distil(child_dir, **spec)
    with pytest.raises(KeyboardInterrupt):
        distil(child_dir, checkpoints=checkpoints, report=stop, **spec)
    steps = []
    resumed, other = distil(child_dir, checkpoints=checkpoints, report=steps.append, **spec)
    assert steps[0].step == 4
    assert resumed.curve == uninterrupted.curve
    assert same(one, other)


def held_back_kl(parent, directory, ids_NT):
    """KL on the last window, which GKD holds back of six, from whole logits."""
    models = load_parent(parent, torch.float32, CPU), load_child(directory, torch.float32, CPU)
    parent_TV, child_TV = (model(input_ids=ids_NT[-1:].long()).logits.log_softmax(-1)[0] for model in models)
    return kl_divergence(parent_TV, child_TV).mean().item()


@pytest.mark.parametrize(("rate", "best"), [(30.0, [0]), (0.005, [1, 2, 3]), (0.0005, [6])])
def test_the_child_has_the_weights_with_the_least_kl_on_held_back_windows(rate, best, assemble, distil, parent, ids_NT):
    child_dir = assemble("llama", MIXED)  # it overfits its five windows soon
    record, out_dir = distil(child_dir, optimizer={"learning_rate": rate})
    assert [point.step for point in record.held_back] == [0, 1, 2, 3, 4, 5, 6]
    assert record.held_back[0].kl_nats_per_token == pytest.approx(held_back_kl(parent, child_dir, ids_NT), rel=1e-4)
    assert record.best.kl_nats_per_token == pytest.approx(held_back_kl(parent, out_dir, ids_NT), rel=1e-4)
    assert record.best == min(record.held_back, key=lambda point: point.kl_nats_per_token)
    assert record.best.step in best
    assert {file.name for file in out_dir.glob("*.safetensors")} == {"model.safetensors"}


def test_without_checks_every_window_is_trained_on_and_the_last_weights_are_kept(assemble, distil, monkeypatch):
    seen = []
    monkeypatch.setattr(
        gkd, "loss_terms", lambda *given: seen.extend(map(tuple, given[2].tolist())) or loss_terms(*given)
    )
    child_dir, rate = assemble("llama", MIXED), {"learning_rate": 0.5}
    record, out_dir = distil(child_dir, held_back_checks=0, optimizer=rate)
    assert record.held_back == ()
    assert [len(set(seen[start : start + 6])) for start in (0, 6, 12)] == [6, 6, 6]
    watched, kept = distil(child_dir, optimizer=rate)
    assert watched.best.step < 6
    assert not same(out_dir, kept)


def test_patience_ends_the_training(assemble, distil):
    record, _ = distil(assemble("llama", MIXED), patience=1)
    assert len(record.curve) == record.best.step + 1 < 6
    assert record.tokens == len(record.curve) * 48


def test_the_order_of_windows_is_that_of_the_seed(assemble, distil):
    child_dir = assemble("llama", MIXED)
    zero, again, one = (distil(child_dir, seed=seed)[0] for seed in (0, 0, 1))
    assert zero.curve == again.curve
    assert zero.held_back[0] == one.held_back[0]
    assert zero.curve[0] != one.curve[0]


def test_what_no_loss_reaches_stays_as_it_was(assemble, distil):
    child_dir = assemble("llama", MIXED)
    _, out_dir = distil(child_dir, kl_weight=0)
    assert torch.equal(weights(out_dir)["lm_head.weight"], weights(child_dir)["lm_head.weight"])


def test_micro_batches_add_up_to_one_batch(assemble, distil):
    child_dir = assemble("llama", MIXED)
    whole, parts = distil(child_dir)[0], distil(child_dir, micro_batch_tokens=16, threads=2)[0]
    for one, other in zip(whole.curve, parts.curve, strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    for one, other in zip(whole.held_back, parts.held_back, strict=True):
        assert other.kl_nats_per_token == pytest.approx(one.kl_nats_per_token, rel=1e-3)


def test_side_by_side_is_bitwise_one_after_the_other(assemble, distil):
    child_dir = assemble("llama", MIXED)
    one, two = (distil(child_dir, micro_batch_tokens=16, threads=threads) for threads in (1, 2))
    assert (one[0].curve, one[0].held_back) == (two[0].curve, two[0].held_back)
    assert same(one[1], two[1])


def test_bfloat16_runs(assemble, distil):
    record, _ = distil(assemble("llama", MIXED), dtype="bfloat16")
    assert record.curve[-1]["loss"] < record.curve[0]["loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_activations_give_bitwise_the_same_child(dtype, assemble, distil, monkeypatch):
    child_dir = assemble("tied", MIXED)
    kept, one = distil(child_dir, "tied", dtype=dtype)
    calls, feed = [], PuzzleBlock.feed
    monkeypatch.setattr(PuzzleBlock, "feed", lambda *given: (calls.append(1), feed(*given))[1])
    distil(child_dir, "tied", dtype=dtype)
    once = len(calls)
    again, other = distil(child_dir, "tied", dtype=dtype, recompute=True)
    assert len(calls) - once > once
    assert again.curve == kept.curve
    assert same(one, other)


def test_large_gradients_run_one_micro_batch_at_a_time(assemble, distil, monkeypatch):
    child_dir, seen, train = assemble("llama", MIXED), [], gkd.train

    def noting(*given):
        seen.append(given[7])
        return train(*given)

    monkeypatch.setattr(gkd, "train", noting)
    options = {"threads": 3, "micro_batch_tokens": 16}
    small, one = distil(child_dir, **options)
    monkeypatch.setattr(gkd, "SIDE_BY_SIDE_BYTES", 2 * 4 * sum(w.numel() for w in weights(child_dir).values()))
    large, other = distil(child_dir, **options)
    assert seen == [3, 1]
    assert large.curve == small.curve
    assert same(one, other)
