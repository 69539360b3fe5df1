"""What a run takes before it is started: tasks, tokens, bytes and floating-point operations, by formula. No torch.

Operations are those of matrix products, two for each multiplication with its addition. An attention compares all pairs
of a window's tokens; kernels that leave the masked half out do fewer. docs/scale.md has the figures of a 70B parent.
"""

from typing import NamedTuple

from puzzle_core.architecture import Architecture, ModelShape, Variant
from puzzle_core.plan import BLD_STATES, LARGEST_LOG_PROBABILITIES_BYTES, Plan
from puzzle_core.sizes import DTYPE_BYTES, architecture_parameters, variant_size
from puzzle_core.work import BldWork, ScoreWork

FORWARD, BOTH_WAYS, ATTENTION_BOTH_WAYS = 1, 3, 3.5
"""Forward passes that a forward and a backward pass are worth; attention kernels compute half of theirs again."""
TRAINING_BYTES = 16
"""Of each trained parameter: weight, gradient and two moments, in float32."""


class Forecast(NamedTuple):
    """What one run takes: library, scores, and one child of the given architecture."""

    bld_tasks: int
    score_tasks: int
    bld_tokens: int
    score_tokens: int
    gkd_tokens: int
    state_bytes: int
    bld_scratch_bytes: int
    score_scratch_bytes: int
    library_bytes: int
    child_bytes: int
    gkd_device_bytes: int
    gkd_checkpoint_bytes: int
    bld_flops: float
    score_flops: float
    gkd_flops: float


def forecast(plan: Plan, child: Architecture, gkd_processes: int = 1) -> Forecast:
    """What is to come.

    Args:
        child: the architecture of the child that GKD trains.
        gkd_processes: how many processes share GKD; `gkd_device_bytes` is what each holds of weights and states.
    """
    spec, shape = plan.spec, plan.inputs.shape
    variants, scores = plan.all_bld(), plan.all_scores()
    bld_tokens = spec.bld.tokens * spec.bld.epochs
    state, score_state = (part.tokens * shape.hidden * DTYPE_BYTES[part.dtype] for part in (spec.bld, spec.scoring))
    log_probabilities = min(LARGEST_LOG_PROBABILITIES_BYTES, spec.scoring.tokens * shape.vocabulary * 4)
    parent_size = architecture_parameters(shape, Architecture.of_parent(shape))
    child_size = architecture_parameters(shape, child)
    held = child_size * TRAINING_BYTES + parent_size * DTYPE_BYTES[spec.gkd.dtype]
    gkd_tokens = spec.gkd.tokens * spec.gkd.epochs
    return Forecast(
        bld_tasks=len(variants),
        score_tasks=len(scores),
        bld_tokens=len(variants) * bld_tokens,
        score_tokens=len(scores) * spec.scoring.tokens,
        gkd_tokens=gkd_tokens,
        state_bytes=state,
        bld_scratch_bytes=BLD_STATES * state,
        score_scratch_bytes=(2 * shape.layers + 1) * score_state + log_probabilities,
        library_bytes=sum(4 * variant_size(shape, work.variant).parameters for work in variants),
        child_bytes=child_size * DTYPE_BYTES[spec.target.dtype],
        gkd_device_bytes=held // gkd_processes,
        gkd_checkpoint_bytes=child_size * 12,
        bld_flops=bld_tokens * sum(bld_flops(plan, work) for work in variants),
        score_flops=spec.scoring.tokens * sum(score_flops(plan, work) for work in scores),
        gkd_flops=gkd_tokens * gkd_flops(plan, child, computed_again=gkd_processes > 1),
    )


def bld_flops(plan: Plan, work: BldWork) -> float:
    """Operations per token of one variant's training; an attention trains through the parent's FFN."""
    shape, length = plan.inputs.shape, plan.spec.data.sequence_length
    weights, products = _forward(shape, work.variant, length)
    through = 2 * _forward(shape, shape.parent_block.ffn, length)[0] if work.variant.subblock == "attn" else 0
    return BOTH_WAYS * weights + ATTENTION_BOTH_WAYS * products + through


def score_flops(plan: Plan, work: ScoreWork) -> float:
    """Operations per token of one score: the block (its FFN alone where the attention is the parent's), what follows
    it, the head, and the parent's own head again where its predictions are too large to be kept."""
    shape, length = plan.inputs.shape, plan.spec.data.sequence_length
    own = shape.parent_block
    variants = [work.block.ffn] if work.block.attention == own.attention else list(work.block.subblocks)
    variants += list(own.subblocks) * (shape.layers - 1 - work.layer)
    kept = plan.spec.scoring.tokens * shape.vocabulary * 4 <= LARGEST_LOG_PROBABILITIES_BYTES
    return sum(sum(_forward(shape, variant, length)) for variant in variants) + _head(shape) * (1 if kept else 2)


def gkd_flops(plan: Plan, child: Architecture, computed_again: bool) -> float:
    """Operations per token of GKD; sharded over processes, every block of the child is computed again going back."""
    shape, length = plan.inputs.shape, plan.spec.data.sequence_length
    parent = [_forward(shape, variant, length) for variant in shape.parent_block.subblocks]
    total = shape.layers * sum(map(sum, parent)) + _head(shape) * (FORWARD + BOTH_WAYS)
    for block in child.layers:
        for variant in block.subblocks:
            weights, products = _forward(shape, variant, length)
            total += BOTH_WAYS * weights + ATTENTION_BOTH_WAYS * products + computed_again * (weights + products)
    return total


def _forward(shape: ModelShape, variant: Variant, length: int) -> tuple[float, float]:
    """Operations per token of a subblock's forward pass: with its weights, and between the tokens of a window."""
    row, size = variant.row, variant.size
    return 2 * row.parameters(shape, size), length * row.context_operations(shape, size)


def _head(shape: ModelShape) -> int:
    return 2 * shape.vocabulary * shape.hidden
