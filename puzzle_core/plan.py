"""The plan of a run: the work and key of every stage, from the spec and the digests of the inputs. No torch.

Flows submit the work that the store has no artifact for. `puzzle check` prints the plan without running it.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, BlockVariant, ModelShape, Option, Variant
from puzzle_core.engines import ENGINES
from puzzle_core.errors import SpecError
from puzzle_core.formats.llama_blocks import unlike_llama
from puzzle_core.fusible import check_fusible, fused
from puzzle_core.records import Record
from puzzle_core.sizes import check_devices
from puzzle_core.spec import (
    DEPTH,
    GKD_SPLITS,
    LONG_SCORING_SPLIT,
    BldSpec,
    HarnessSpec,
    ParentSpec,
    RunSpec,
    RuntimeSpec,
    ScenarioSpec,
    SplitSize,
    VariantsSpec,
)
from puzzle_core.target import FORMULAS, Dtype, TargetSpec
from puzzle_core.text_sources import Texts
from puzzle_core.work import (
    AssembleWork,
    BldWork,
    CostWork,
    EvaluateWork,
    GkdWork,
    GradientsWork,
    ImportanceWork,
    InfluenceWork,
    MultipleChoiceWork,
    RefineWork,
    ScoreWork,
    SearchWork,
    TimingWork,
    TokensWork,
    Traffic,
)

LAYERS = r"[0-9]+(-[0-9]+)?"
"""A range of layers in text form."""
LayerWork = TypeVar("LayerWork", BldWork, ScoreWork)
HELD_OUT_SPLITS = ("scoring", "evaluation", LONG_SCORING_SPLIT)


class RoundChild(Record):
    """The trained child of a round of iterated Puzzle: its key and its architecture."""

    key: str
    architecture: Architecture


class Lineage(Record):
    """What came before the parent of a later round: the first parent, and the children of the rounds, in their order.

    The last child is the parent of the round.
    """

    parent: str
    shape: ModelShape
    children: tuple[RoundChild, ...] = ()


class Inputs(Record):
    """External inputs of a plan: the parent, texts, benchmarks, the machine, and an imported cost table.

    The parent, the texts, the table, the benchmarks (by name) and the folder of lm-evaluation-harness are digests.
    `parent_commit` is the hub commit of the parent and is part of no key. `dtype` is the type of a child if the spec
    names none, `auto_dtype` what `auto` is on this machine for products. In a later round of iterated Puzzle, the
    parent is the key of the child before, and `before` has the first parent.
    """

    parent: str
    dtype: Dtype = "float32"
    auto_dtype: Dtype = "float32"
    tokenizer: str
    shape: ModelShape
    train_texts: str
    held_out_texts: str
    hardware: str
    cost_table: str | None = None
    benchmarks: dict[str, str] = {}
    lm_eval_folder: str | None = None
    parent_commit: str | None = None
    before: Lineage | None = None

    @property
    def first(self) -> Lineage:
        """The first parent, and the children that became parents since."""
        return self.before or Lineage(parent=self.parent, shape=self.shape)

    def after(self, child: RoundChild) -> "Inputs":
        """The inputs of the next round, whose parent is this child."""
        first = self.first
        before = first.model_copy(update={"children": (*first.children, child)})
        shape = self.shape.with_blocks(child.architecture.layers)
        return self.model_copy(update={"parent": child.key, "shape": shape, "before": before})


def layer_ranges(layers: int, ranges: int) -> list[str]:
    """Ranges of almost equal length that cover all layers, as texts: `0-9`; a range per layer at most."""
    count = min(ranges, layers)
    starts = [layers * number // count for number in range(count + 1)]
    return [f"{first}-{end - 1}" for first, end in itertools.pairwise(starts)]


@dataclass(frozen=True)
class Plan:
    """The work of one run. `spec` has no `auto` left, so no key depends on the machine in secret.

    Raises (on construction):
        SpecError: the parent does not support the spec.
    """

    spec: RunSpec
    inputs: Inputs
    part: range | None = None
    """The layers that this machine trains and scores; all where it is none."""

    def __post_init__(self) -> None:
        spec = self.spec.with_dtype(self.inputs.auto_dtype).of_round(self.round)
        if self.inputs.before:
            spec = spec.model_copy(update={"variants": spec.variants.in_widths(self.inputs.first.shape)})
        object.__setattr__(self, "spec", spec)
        shape = self.inputs.shape
        for layer in range(shape.layers):
            spec.variants.of_layer(layer, shape)
        for exception in spec.variants.layers:
            if not exception.first_layer <= exception.last_layer < shape.layers:
                raise SpecError(
                    f"variants.layers names layers {exception.first_layer} to {exception.last_layer}, but the parent "
                    f"has layers 0 to {shape.layers - 1}"
                )
        refusing = [engine for engine in spec.engines if "checkpoint" not in ENGINES[engine].formats]
        if refusing and (reasons := unlike_llama(shape)):
            raise SpecError(
                f"engines asks for {', '.join(refusing)}, and no export can hold a child of this parent "
                f"(docs/engines.md): {'; '.join(reasons)}: remove engines"
            )
        lengths = spec.sequence_lengths
        lengths |= {f"scenario {s.name}": s.prompt_tokens + s.generated_tokens for s in spec.scenarios}
        for what, tokens in lengths.items():
            if tokens > shape.max_positions:
                raise SpecError(f"{what} is {tokens}, but the parent's context holds {shape.max_positions} tokens")
        if hardware := spec.target.hardware:
            check_devices(shape, hardware.tensor_parallel, hardware.pipeline_parallel)
        self._check_windows()
        if spec.child.fuse_ffn:
            check_fusible(shape)

    def _check_windows(self) -> None:
        """Refuse a window as long as what BLD or scores read: it would train and score as the full attention."""
        offered = {v for layer in self.layers for v in self.variants.of_layer(layer, self.inputs.shape)[0][1:]}
        if not (windows := [variant for variant in offered if variant.window]):
            return
        widest = max(windows, key=lambda variant: (variant.window, variant))
        for part, split in {"bld": "bld", "scoring": self.scoring_splits[-1]}.items():
            length = self.spec.splits[split].sequence_length
            if widest.window >= length:
                raise SpecError(
                    f"{widest} sees {widest.window} tokens, and {part} reads {length} at a time, in which it is the "
                    f"full attention: set {part}.sequence_length above {widest.window}"
                )

    @property
    def round(self) -> int:
        """The round of iterated Puzzle, counted from 0."""
        return len(self.inputs.first.children)

    @property
    def is_last(self) -> bool:
        """Whether the child of this plan is the run's answer, and not the parent of a further round."""
        return self.round >= len(self.spec.rounds)

    def of_layers(self, layers: str | None) -> "Plan":
        """The same plan with the trainings and scores of some layers alone, without options that span their end.

        Args:
            layers: the first and the last one (`10-19`), or one (`7`); none for all.

        Raises:
            SpecError: this is no range of the parent's layers.
        """
        if layers is None:
            return self
        ends = layers.split("-") if re.fullmatch(LAYERS, layers) else ("1", "0")
        part = range(int(ends[0]), int(ends[-1]) + 1)
        if not part or part[-1] not in self.layers:
            raise SpecError(
                f"layers is {layers!r}, but the parent has layers 0 to {self.layers[-1]}: name the first and the last "
                "layer, such as 0-9, or one"
            )
        return dataclasses.replace(self, part=part)

    @property
    def name(self) -> str:
        """The name of the specification, and the layers of a plan of some."""
        return self.spec.name + (f"-layers-{self.part[0]}-{self.part[-1]}" if self.part else "")

    @cached_property
    def variants(self) -> VariantsSpec:
        """The part of the search space that the engines of the spec can run."""
        return self.spec.served_variants(self.inputs.first.shape)

    def coupled_in(self, variants: VariantsSpec) -> "Plan":
        """The second stage of coupled BLD: every pair of these variants is trained, scored and searched as a whole."""
        bld, scoring = self.spec.bld, self.spec.scoring
        changes = {
            "variants": variants,
            "bld": bld.model_copy(update={"coupled": "all"}),
            "scoring": scoring.model_copy(update={"composition": "pairs"}),
        }
        return Plan(self.spec.model_copy(update=changes), self.inputs)

    @cached_property
    def target(self) -> TargetSpec:
        """The target, with a dtype: that of the spec, or the parent's."""
        return self.spec.target.for_parent(self.inputs.dtype)

    @property
    def layers(self) -> range:
        """The parent's layers."""
        return range(self.inputs.shape.layers)

    def tokens(self, split: str) -> TokensWork:
        """One split of packed windows. No two splits share a token, but calibration reads the first of the texts.

        Calibration trains nothing, and so its number of tokens changes no other split.
        """
        data, splits = self.spec.data, self.splits
        order = next(order for order in (("calibration",), ("bld", *GKD_SPLITS), HELD_OUT_SPLITS) if split in order)
        first = TokensWork(
            split=order[0],
            tokens=splits[order[0]].tokens,
            earlier_splits=(),
            sequence_length=splits[order[0]].sequence_length,
            seed=data.seed,
            cut_documents=data.cut_documents,
            document_start=data.document_start,
            documents=data.document_mask,
            texts=self.inputs.held_out_texts if split in HELD_OUT_SPLITS else self.inputs.train_texts,
            tokenizer=self.inputs.tokenizer,
        )
        earlier = [(name, *splits[name]) for name in order[: order.index(split)]]
        return first.after(earlier, split, *splits[split])

    @cached_property
    def splits(self) -> dict[str, SplitSize]:
        """The splits of the texts by name."""
        return self.spec.splits

    @property
    def gkd_splits(self) -> tuple[str, ...]:
        """The splits that the trainings of a child read, in their order."""
        return tuple(split for split in GKD_SPLITS if split in self.splits)

    @property
    def scoring_splits(self) -> tuple[str, ...]:
        """The splits that scores are made on, in their order."""
        return tuple(split for split in ("scoring", LONG_SCORING_SPLIT) if split in self.splits)

    def texts(self, split: str) -> Texts:
        """The texts of a split."""
        data = self.spec.data
        return data.held_out if split in HELD_OUT_SPLITS else data.train

    def importance(self) -> ImportanceWork:
        """Channel contributions of the parent's FFNs."""
        return ImportanceWork(parent=self.inputs.parent, tokens=self.tokens("calibration").key)

    def trained(self, layer: int) -> list[Variant]:
        """The variants of a layer that need training: neither the parent's own nor no-ops."""
        attentions, ffns = self.variants.of_layer(layer, self.inputs.shape)
        return [variant for variant in attentions[1:] + ffns[1:] if not variant.is_empty]

    def trained_whole(self, layer: int) -> list[Option]:
        """The options of a layer whose halves are trained together: coupled blocks, and all that span layers."""
        shape, kind = self.inputs.shape, self.spec.bld.coupled
        offered = self.variants.blocks_of_layer(layer, shape) if kind in ("linear_and_no_op", "all") else []
        blocks = [block for block in offered if block not in (shape.parent_block(layer), EMPTY_BLOCK)]
        if kind == "linear_and_no_op":
            blocks = [b for b in blocks if not b.attention.kv_heads or not b.ffn.ffn_width]
        return [*map(Option, blocks), *self.variants.spans_of_layer(layer, shape)]

    def bld(self, layer: int, variant: Variant | Option) -> BldWork:
        """The training of one variant, or of an option from the trained halves of its first layer."""
        contributed = isinstance(variant, Variant) and variant.row.needs_contributions
        return BldWork(
            parent=self.inputs.parent,
            layer=layer,
            variant=variant,
            tokens=self.tokens("bld").key,
            contributions=self.importance().key if contributed else None,
            halves=self._halves(layer, variant.block) if isinstance(variant, Option) else None,
            seed=self.spec.data.seed,
            spec=self._bld_of_content,
        )

    @property
    def _bld_of_content(self) -> BldSpec:
        """The settings of BLD that its results depend on.

        Both sources of states give the same weights, and the tokens' key has the length of their windows.
        """
        return self.spec.bld.model_copy(update={"source": "stored", "sequence_length": None, "coupled": "none"})

    def library_key(self, layer: int, variant: Variant | Option) -> str | None:
        """The key of a variant's weights, or of an option's whose halves were trained together.

        None for the parent's own variant and for no-ops, and for an option whose halves were not.
        """
        work = self._library.get((layer, variant))
        return work.key if work else None

    def _halves(self, layer: int, block: BlockVariant) -> tuple[str | None, str | None]:
        attention, ffn = (self._variants.get((layer, variant)) for variant in block.subblocks)
        return attention.key if attention else None, ffn.key if ffn else None

    def scored(self, layer: int, base: Architecture | None = None) -> list[Option]:
        """The options of a layer that need a score: all pairs, or the base's block with one subblock changed; spans.

        The base is the parent or a child. A child is also scored unchanged, as its own block in layer 0.
        """
        base_block = base.layers[layer] if base else self.inputs.shape.parent_block(layer)
        blocks = self.variants.blocks_of_layer(layer, self.inputs.shape)
        if self.spec.scoring.composition == "subblocks":
            blocks = [
                block for block in blocks if base_block.attention == block.attention or base_block.ffn == block.ffn
            ]
        changed = [Option(block) for block in blocks if block != base_block or (base and layer == 0)]
        return [*changed, *self.variants.spans_of_layer(layer, self.inputs.shape)]

    def gradients(self) -> GradientsWork | None:
        """The gradients that scores are estimated from; None if all scores are exact."""
        if self.spec.scoring.method == "exact":
            return None
        return GradientsWork(
            parent=self.inputs.parent,
            tokens=self.tokens("scoring").key,
            dtype=self.spec.scoring.dtype,
            samples=self.spec.scoring.label_samples,
            seed=self.spec.data.seed,
        )

    def score(self, layer: int, option: Option, base: Architecture | None = None, split: str = "scoring") -> ScoreWork:
        """The score of one option in the parent, or in a child, where it is always exact.

        A child differs from the parent before the block is replaced, so an expansion at the parent does not hold there.
        """
        whole = self.library_key(layer, option)
        attention, ffn = (None, None) if whole else self._halves(layer, option.block)
        return ScoreWork(
            parent=self.inputs.parent,
            layer=layer,
            block=option.block,
            span=option.span,
            attention=attention,
            ffn=ffn,
            whole=whole,
            tokens=self.tokens(split).key,
            dtype=self.spec.scoring.dtype,
            base=self.assemble(base) if base else None,
            gradients=None if base else self._gradients_key,
        )

    @cached_property
    def _gradients_key(self) -> str | None:
        work = self.gradients()
        return work.key if work else None

    def exact_score(self, layer: int, option: Option) -> ScoreWork:
        """The exact score of one option in the parent, where others are estimates."""
        return self.score(layer, option).model_copy(update={"gradients": None})

    def all_bld(self) -> list[BldWork]:
        """Every training of this plan's layers, those of single variants first."""
        return self._of_part(self._library.values())

    def all_scores(self, base: Architecture | None = None, split: str = "scoring") -> list[ScoreWork]:
        """Every score of this plan's layers in the parent, or in a child, on one of `scoring_splits`."""
        return self._of_part(self._scores if (base, split) == (None, "scoring") else self._scores_in(base, split))

    def long_scores(self) -> list[ScoreWork]:
        """Every score on the longer windows; none where the spec does not ask for them."""
        return [work for split in self.scoring_splits[1:] for work in self.all_scores(split=split)]

    def _of_part(self, works: Iterable[LayerWork]) -> list[LayerWork]:
        """The works whose layers all lie in the part; options that span its end are in no part."""
        part = self.layers if self.part is None else self.part
        return [work for work in works if work.layer in part and work.last_layer in part]

    @cached_property
    def _variants(self) -> dict[tuple[int, Variant | Option], BldWork]:
        """Every training of a single variant, in order. It is cached, because a thousand keys take a second."""
        trained = [(layer, variant) for layer in self.layers for variant in self.trained(layer)]
        return {(layer, variant): self.bld(layer, variant) for layer, variant in trained}

    @cached_property
    def _library(self) -> dict[tuple[int, Variant | Option], BldWork]:
        """Every training, in order."""
        library = dict(self._variants)
        for layer in self.layers:
            library |= {(layer, option): self.bld(layer, option) for option in self.trained_whole(layer)}
        return library

    @cached_property
    def _scores(self) -> list[ScoreWork]:
        return self._scores_in(None, "scoring")

    def _scores_in(self, base: Architecture | None, split: str) -> list[ScoreWork]:
        return [self.score(layer, option, base, split) for layer in self.layers for option in self.scored(layer, base)]

    def costs(self) -> dict[tuple[str, int], CostWork]:
        """The costs of every distinct variant, by scenario and batch size; empty if a table is imported.

        They are those of the first parent's variants, so all rounds of iterated Puzzle share them.
        """
        if self.spec.target.costs == "imported":
            return {}
        shape = self.inputs.first.shape
        distinct = {
            shape.in_layer(layer, variant)
            for layer in self.layers
            for variants in self.variants.of_layer(layer, shape)
            for variant in variants
            if not variant.is_empty
        }
        return {
            (scenario.name, batch_size): CostWork(
                shape=shape.digest(),
                variants=tuple(sorted(distinct)),
                traffic=_traffic(scenario, batch_size),
                target=self.target,
                hardware=self.inputs.hardware,
                formulas=FORMULAS if self.target.costs == "roofline" else None,
            )
            for scenario in self.spec.scenarios
            for batch_size in dict.fromkeys((*scenario.batch_sizes, *_single_prompt(scenario)))
        }

    def search(self, base: Architecture | None = None, batch_sizes: Mapping[str, int] | None = None) -> SearchWork:
        """The search with scores in the parent or in a child, over all batch sizes or only `batch_sizes`."""
        assert self.part is None, "a search needs all layers"
        request = self.spec.request
        if batch_sizes:
            request = request.at(batch_sizes)
        return SearchWork(
            parent=self.inputs.parent,
            shape=self.inputs.shape,
            variants=self.variants,
            scores=tuple(work.key for work in self.all_scores(base)),
            composition=self.spec.scoring.composition,
            costs=tuple((*traffic, work.key) for traffic, work in self.costs().items()),
            cost_table=self.inputs.cost_table,
            target=self.spec.target.name,
            request=request,
            base=self.assemble(base) if base else None,
            first=self.inputs.before.shape if self.inputs.before else None,
            exact=() if base else self._exact_keys,
            influence=influence.key if (influence := self.influence()) else None,
            long_scores=tuple(work.key for work in self.long_scores()),
            long_weight=self.spec.scoring.long.weight if self.spec.scoring.long else 1.0,
        )

    def influence(self) -> InfluenceWork | None:
        """The influence of the parent's layers; None if no baseline drops layers by it."""
        if DEPTH.isdisjoint(self.spec.search.baselines):
            return None
        scoring = self.spec.scoring
        return InfluenceWork(parent=self.inputs.parent, tokens=self.tokens("scoring").key, dtype=scoring.dtype)

    @cached_property
    def _exact_keys(self) -> tuple[str, ...]:
        if self.spec.scoring.method != "lazy":
            return ()
        return tuple(self.exact_score(work.layer, work.option).key for work in self._scores)

    def refine(self) -> RefineWork | None:
        """The measurement of the search's candidates; None if the spec does not request it."""
        if self.spec.search.shortlist == 1 and not self.spec.search.iterations:
            return None
        return RefineWork(search=self.search().key, tokens=self.tokens("scoring").key)

    def fused(self, architecture: Architecture) -> Architecture:
        """The architecture that GKD trains of a chosen one: with its FFNs fused, where the spec says so."""
        return fused(architecture) if self.spec.child.fuse_ffn else architecture

    def assemble(self, architecture: Architecture, fuse_ffn: bool = False) -> AssembleWork:
        """The child of one architecture."""
        library: list[tuple[tuple[str, str], ...]] = [()] * len(architecture.layers)
        for layer, option in architecture.options.items():
            parts = (option,) if self.library_key(layer, option) else option.block.subblocks
            keys = ((str(part), self.library_key(layer, part)) for part in parts)
            library[layer] = tuple((part, key) for part, key in keys if key)
        return AssembleWork(
            parent=self.inputs.parent,
            architecture=architecture,
            library=tuple(library),
            dtype=self.target.served_dtype,
            fuse_ffn=fuse_ffn,
        )

    def trainings(self, architecture: Architecture) -> dict[str, GkdWork]:
        """The global distillations of one child by their splits; a second one starts from the first one's child.

        All rounds of iterated Puzzle distil from the first parent.
        """
        trained = self.fused(architecture)
        child, works = self.assemble(architecture, fuse_ffn=trained != architecture).key, dict[str, GkdWork]()
        for split, spec in zip(self.gkd_splits, self.spec.gkd.trainings, strict=True):
            works[split] = GkdWork(
                parent=self.inputs.first.parent,
                child=child,
                architecture=trained,
                tokens=self.tokens(split).key,
                dtype=self.target.served_dtype,
                seed=self.spec.data.seed,
                spec=spec.model_copy(update={"sequence_length": None}),  # the tokens' key has it
            )
            child = works[split].key
        return works

    def gkd(self, architecture: Architecture) -> GkdWork:
        """The global distillation that gives the trained child: the last one."""
        return list(self.trainings(architecture).values())[-1]

    def evaluate(self, child: str | None) -> EvaluateWork:
        """The evaluation of a child by its key, or of the parent; in all rounds, beside the first parent."""
        evaluation = self.spec.evaluation
        return EvaluateWork(
            parent=self.inputs.first.parent,
            child=child,
            tokens=self.tokens("evaluation").key,
            dtype=evaluation.dtype,
            tasks=tuple(
                MultipleChoiceWork(name=task.name, items=self.inputs.benchmarks[task.name]) for task in evaluation.tasks
            ),
            lm_eval_tasks=evaluation.lm_eval_tasks,
            lm_eval=self._harness,
        )

    @property
    def _harness(self) -> HarnessSpec:
        """The options of lm-evaluation-harness, with a digest in place of the folder's path."""
        return self.spec.evaluation.lm_eval.model_copy(update={"task_folder": self.inputs.lm_eval_folder})

    def measure(self, architecture: Architecture) -> EvaluateWork:
        """The measured quality of a candidate, on the scoring split. The evaluation split stays unused."""
        return EvaluateWork(
            parent=self.inputs.parent,
            child=self.assemble(architecture).key,
            tokens=self.tokens("scoring").key,
            dtype=self.spec.evaluation.dtype,
        )

    def timing(self, architectures: dict[str, Architecture], batch_size: int) -> TimingWork | None:
        """End-to-end times of several models in alternation; None if costs are not measured."""
        if self.spec.target.costs != "measured":
            return None
        return TimingWork(
            shape=self.inputs.first.shape.digest(),
            architectures=tuple(architectures.items()),
            traffic=_traffic(self.spec.scenario, batch_size),
            target=self.target.model_copy(update={"rounds": self.spec.evaluation.timing_rounds}),
            hardware=self.inputs.hardware,
        )

    def spec_of_content(self) -> RunSpec:
        """The spec with digests instead of paths and a default `runtime`. It does not depend on where files are."""
        spec, inputs = self.spec, self.inputs
        texts: dict[str, Any] = {"train_texts": (inputs.train_texts,), "held_out_texts": (inputs.held_out_texts,)}
        texts["held_out_share"] = None  # the digests are those of its two sides
        benchmarks = tuple(
            task.model_copy(update={"file": inputs.benchmarks[task.name]}) for task in spec.evaluation.tasks
        )
        return spec.model_copy(
            update={
                "parent": ParentSpec(path=inputs.first.parent),
                "data": spec.data.model_copy(update=texts),
                "bld": self._bld_of_content.model_copy(update={"coupled": spec.bld.coupled}),
                "target": self.target.model_copy(update={"table": inputs.cost_table}),
                "evaluation": spec.evaluation.model_copy(update={"tasks": benchmarks, "lm_eval": self._harness}),
                "champion": None,
                "runtime": RuntimeSpec(),
            }
        )


def _single_prompt(scenario: ScenarioSpec) -> tuple[int, ...]:
    """The batch of one whose prefill a first token takes under continuous batching."""
    return (1,) if scenario.batching == "continuous" else ()


def _traffic(scenario: ScenarioSpec, batch_size: int) -> Traffic:
    return Traffic(
        prompt_tokens=scenario.prompt_tokens, generated_tokens=scenario.generated_tokens, batch_size=batch_size
    )
