"""Formulas for the tasks, tokens, bytes and floating-point operations of a run. No torch.

Operations are those of matrix products: two per multiply-add. Attention counts all pairs of tokens in a window;
kernels that skip the masked pairs do fewer. docs/scale.md has the figures of a 70B parent.
"""

from collections.abc import Container
from typing import NamedTuple

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Option, Variant
from puzzle_core.plan import Plan
from puzzle_core.sizes import (
    DTYPE_BYTES,
    LARGEST_LOG_PROBABILITIES_BYTES,
    architecture_parameters,
    held_back_windows,
    variant_size,
    watched_windows,
)
from puzzle_core.spec import LONG_SCORING_SPLIT
from puzzle_core.work import BldWork, ScoreWork

BLD_STATES = 7
"""Files of hidden states on the scratch disk during BLD, at most: two for each of three layers, and the last output."""
MOST_TRAININGS = 128
"""Trainings at most that share one pass of the parent: each is a thread and a task."""
FORWARD, FORWARD_BACKWARD, ATTENTION_FORWARD_BACKWARD = 1, 3, 3.5
"""Cost relative to a forward pass. Attention kernels compute half of their forward pass again in the backward pass."""
TRAINING_BYTES = 16
"""Bytes per trained parameter: weight, gradient and two moments, in float32."""
CHECKPOINT_BYTES, BEST_WEIGHT_BYTES = 12, 4
"""Bytes per trained parameter in a checkpoint (weight and two moments), and in the best weights beside it; float32."""


class Resources(NamedTuple):
    """Resources of one run: its library, its scores, and one child.

    Exact scores that searches over estimates ask for are not counted: their number is not known before. Scratch bytes
    are peak values. `state_bytes` is the size of one file of hidden states in BLD.
    `gkd_device_bytes` are the weights and states that each process of GKD holds.
    """

    bld_tasks: int
    score_tasks: int
    bld_tokens: int
    score_tokens: int
    gkd_tokens: int
    state_bytes: int
    bld_scratch_bytes: int
    score_scratch_bytes: int
    evaluation_scratch_bytes: int
    library_bytes: int
    child_bytes: int
    gradient_bytes: int
    store_bytes: int
    gkd_device_bytes: int
    gkd_checkpoint_bytes: int
    bld_flops: float
    score_flops: float
    gkd_flops: float

    @property
    def scratch_bytes(self) -> int:
        """Peak use. BLD, scores and evaluations do not use the scratch disk at the same time."""
        return max(self.bld_scratch_bytes, self.score_scratch_bytes, self.evaluation_scratch_bytes)

    @property
    def trained_tokens(self) -> int:
        """Tokens of BLD and GKD."""
        return self.bld_tokens + self.gkd_tokens


def resources(
    plan: Plan,
    child: Architecture | None = None,
    gkd_processes: int = 1,
    done: Container[str] = frozenset(),
    device_bytes: float = 80e9,
) -> Resources:
    """The resources of a run.

    Args:
        child: the architecture that GKD trains; by default the parent's, which is the largest child.
        gkd_processes: number of processes that share GKD.
        done: keys of artifacts in the store; their trainings and scores count as 0.
        device_bytes: memory of all devices together, which bounds the groups of layers of a streamed BLD.
    """
    spec, shape = plan.spec, plan.inputs.shape
    variants = [work for work in plan.all_bld() if work.key not in done]
    scores = [work for work in plan.all_scores() if work.key not in done]
    longs = [work for work in plan.long_scores() if work.key not in done]
    long_tokens = spec.scoring.long.tokens if spec.scoring.long else 0
    gradients = plan.gradients() if scores else None
    if gradients and gradients.key in done:
        gradients = None
    parent = Architecture.of_parent(shape)
    child = child or parent
    parent_size, child_size = (architecture_parameters(shape, architecture) for architecture in (parent, child))
    bld_tokens = spec.bld.tokens * spec.bld.epochs
    trainings = dict(zip(plan.gkd_splits, spec.gkd.trainings, strict=True))
    gkd_tokens = {split: training.tokens * training.epochs for split, training in trainings.items()}
    state, score_state, evaluation_state = (
        part.tokens * shape.hidden * DTYPE_BYTES[part.dtype] for part in (spec.bld, spec.scoring, spec.evaluation)
    )
    gradient_bytes = gradients.samples * shape.layers * score_state if gradients else 0
    score_flops_per_token = sum(score_flops(plan, work) for work in scores)
    if gradients:
        score_flops_per_token += gradient_flops(plan, gradients.samples)
    long_flops_per_token = sum(score_flops(plan, work, LONG_SCORING_SPLIT) for work in longs)
    only_estimates = spec.scoring.method == "fisher"
    score_scratch = _score_scratch_bytes(plan, spec.scoring.tokens, only_estimates) if scores else 0
    long_scratch = _score_scratch_bytes(plan, long_tokens) if longs else 0
    streamed = spec.bld.source == "streamed"
    bld_flops_per_token = sum(bld_flops(plan, work) for work in variants)
    for whole in (False, True) if streamed else ():
        trained = [work for work in variants if isinstance(work.variant, Option) == whole]
        bld_flops_per_token += stream_flops(plan, streamed_groups(plan, device_bytes, whole), trained)
    library = sum(DTYPE_BYTES["float32"] * _parameters(shape, work.variant) for work in variants)
    states = BLD_STATES + 2 * (max(plan.variants.spans, default=1) - 1)
    child_bytes = child_size * DTYPE_BYTES[plan.target.served_dtype]
    return Resources(
        bld_tasks=len(variants),
        score_tasks=len(scores) + len(longs),
        bld_tokens=len(variants) * bld_tokens,
        score_tokens=len(scores) * spec.scoring.tokens + len(longs) * long_tokens,
        gkd_tokens=sum(gkd_tokens.values()),
        state_bytes=state,
        bld_scratch_bytes=states * state if variants and not streamed else 0,
        score_scratch_bytes=max(score_scratch, long_scratch),
        evaluation_scratch_bytes=2 * evaluation_state + _stored_log_probability_bytes(plan, spec.evaluation.tokens),
        library_bytes=library,
        child_bytes=child_bytes,
        gradient_bytes=gradient_bytes,
        store_bytes=library + gradient_bytes + (1 + len(trainings) + len(spec.search.baselines)) * child_bytes,
        gkd_device_bytes=(child_size * TRAINING_BYTES + parent_size * DTYPE_BYTES[spec.gkd.dtype]) // gkd_processes,
        gkd_checkpoint_bytes=child_size * (CHECKPOINT_BYTES + (BEST_WEIGHT_BYTES if spec.gkd.held_back_checks else 0)),
        bld_flops=bld_tokens * bld_flops_per_token,
        score_flops=spec.scoring.tokens * score_flops_per_token + long_tokens * long_flops_per_token,
        gkd_flops=sum(
            tokens * gkd_flops(plan, child, recompute=gkd_processes > 1 or spec.runtime.gkd_recompute, split=split)
            for split, tokens in gkd_tokens.items()
        ),
    )


def bld_flops(plan: Plan, work: BldWork) -> float:
    """Operations per token of one training, its two passes over the held-back windows included.

    The gradient of an attention alone passes through the parent's FFN.
    """
    shape, length = plan.inputs.shape, plan.splits["bld"].sequence_length
    parts, ffn = _subblocks(work.variant), 0.0
    weights, products = map(sum, zip(*(_forward(shape, variant, length) for variant in parts), strict=True))
    if [variant.subblock for variant in parts] == ["attn"]:
        ffn = _forward(shape, shape.parent_block(work.layer).ffn, length)[0]
    training = FORWARD_BACKWARD * weights + ATTENTION_FORWARD_BACKWARD * products + 2 * ffn
    return training + _held_back_passes(plan) * (weights + products + ffn)


def stream_flops(plan: Plan, groups: list[range], works: list[BldWork]) -> float:
    """Operations per token of the parent in a streamed BLD: for each group, all layers up to the last one it trains."""
    shape, length = plan.inputs.shape, plan.splits["bld"].sequence_length
    last_layers = (max((work.last_layer for work in works if work.layer in group), default=-1) for group in groups)
    passes = sum(_layers_forward(shape, range(last + 1), length) for last in last_layers)
    return (1 + _held_back_passes(plan)) * passes


def streamed_groups(plan: Plan, device_bytes: float, whole: bool = False) -> list[range]:
    """The groups of layers of a streamed BLD: what a group trains, variants or else options, is under way together.

    A group has as many layers as half of the devices' memory holds trainings for, or as `runtime.bld_side_by_side`
    allows trainings, and at least one.
    """
    shape, most = plan.inputs.shape, plan.spec.runtime.bld_side_by_side
    groups: list[range] = []
    trainings, training_bytes = 0, 0
    for layer in plan.layers:
        variants = plan.trained_whole(layer) if whole else plan.trained(layer)
        needed = sum(TRAINING_BYTES * _parameters(shape, variant) for variant in variants)
        trainings, training_bytes = trainings + len(variants), training_bytes + needed
        fits = trainings <= most if most else training_bytes <= device_bytes / 2 and trainings <= MOST_TRAININGS
        if groups and fits:
            groups[-1] = range(groups[-1].start, layer + 1)
        else:
            groups.append(range(layer, layer + 1))
            trainings, training_bytes = len(variants), needed
    return groups


def _subblocks(trained: Variant | Option) -> tuple[Variant, ...]:
    return trained.block.subblocks if isinstance(trained, Option) else (trained,)


def _parameters(shape: ModelShape, trained: Variant | Option) -> int:
    return sum(variant_size(shape, variant).parameters for variant in _subblocks(trained))


def _held_back_passes(plan: Plan) -> float:
    """Passes over held-back windows of BLD, as a share of the passes over training tokens."""
    spec = plan.spec.bld
    windows = -(-spec.tokens // plan.splits["bld"].sequence_length)
    return 2 * held_back_windows(windows) / (windows * spec.epochs)


def _score_scratch_bytes(plan: Plan, tokens: int, only_estimates: bool = False) -> int:
    """Size of the states of all layers and of the parent's log-probabilities on so many tokens."""
    shape, dtype = plan.inputs.shape, plan.spec.scoring.dtype
    log_probabilities = 0 if only_estimates else _stored_log_probability_bytes(plan, tokens)
    return (2 * shape.layers + 1) * tokens * shape.hidden * DTYPE_BYTES[dtype] + log_probabilities


def score_flops(plan: Plan, work: ScoreWork, split: str = "scoring") -> float:
    """Operations per token of one score: the block, the layers after it, and the head.

    A block with the parent's attention starts at its FFN. The parent's head runs again if its log-probabilities are
    too large for the scratch disk. An estimate needs the block and the gradients.
    """
    shape, size = plan.inputs.shape, plan.splits[split]
    length = size.sequence_length
    block = _block_forward(shape, work.block, length)
    if work.block.attention == shape.parent_block(work.layer).attention and not work.whole:
        block = sum(_forward(shape, work.block.ffn, length))
    if work.gradients:
        return block + 2 * plan.spec.scoring.label_samples * shape.hidden
    heads = 1 if _stored_log_probability_bytes(plan, size.tokens) else 2
    following = range(work.layer + work.span, shape.layers)
    return block + _layers_forward(shape, following, length) + heads * _head(shape)


def gradient_flops(plan: Plan, samples: int) -> float:
    """Operations per token of the gradients: each layer but the first and the head run once, and back once per sample.

    Weights get no gradients.
    """
    shape, length = plan.inputs.shape, plan.splits["scoring"].sequence_length
    forward_backward: float = _head(shape) * (FORWARD + samples)
    for variant in (variant for layer in range(1, shape.layers) for variant in shape.parent_block(layer).subblocks):
        weights, products = _forward(shape, variant, length)
        back = weights + (ATTENTION_FORWARD_BACKWARD - FORWARD) * products
        forward_backward += weights + products + samples * back
    return forward_backward


def gkd_flops(plan: Plan, child: Architecture, recompute: bool, split: str = "gkd") -> float:
    """Operations per token of the GKD that reads a split, its passes over the held-back windows included.

    With `recompute`, the backward pass computes every block of the child again.
    """
    shape, length, spec = plan.inputs.shape, plan.splits[split].sequence_length, plan.spec.gkd
    spec = dict(zip(plan.gkd_splits, spec.trainings, strict=True))[split]
    parent = _layers_forward(shape, range(shape.layers), length) + _head(shape)
    training, forward = float(FORWARD_BACKWARD * _head(shape)), float(FORWARD * _head(shape))
    for block in child.layers:
        for variant in block.subblocks:
            weights, products = _forward(shape, variant, length)
            training += FORWARD_BACKWARD * weights + ATTENTION_FORWARD_BACKWARD * products
            training += recompute * (weights + products)
            forward += weights + products
    windows = -(-spec.tokens // length)
    held_back_passes = (1 + spec.held_back_checks) * watched_windows(windows, spec.held_back_checks)
    return parent + training + held_back_passes / (windows * spec.epochs) * (parent + forward)


def _stored_log_probability_bytes(plan: Plan, tokens: int) -> int:
    """Size of the parent's log-probabilities on the scratch disk; 0 where they are too large for it."""
    size = tokens * plan.inputs.shape.vocabulary * DTYPE_BYTES["float32"]
    return size if size <= LARGEST_LOG_PROBABILITIES_BYTES else 0


def _layers_forward(shape: ModelShape, layers: range, length: int) -> float:
    """Operations per token of a forward pass through these layers of the parent."""
    return sum(_block_forward(shape, shape.parent_block(layer), length) for layer in layers)


def _block_forward(shape: ModelShape, block: BlockVariant, length: int) -> float:
    """Operations per token of a block's forward pass."""
    return sum(sum(_forward(shape, variant, length)) for variant in block.subblocks)


def _forward(shape: ModelShape, variant: Variant, length: int) -> tuple[float, float]:
    """Operations per token of a subblock's forward pass: of the weights, and between the tokens of a window."""
    row, size = variant.row, variant.size
    return 2 * row.parameters(shape, size), length * row.context_operations(shape, size)


def _head(shape: ModelShape) -> int:
    return 2 * shape.vocabulary * shape.hidden
