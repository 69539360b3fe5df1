"""The plan of a run: the work and key of every stage, from the spec and the digests of the inputs. No torch.

Flows submit the work that the store has no artifact for. `puzzle check` prints the plan without running it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.engines import ENGINES
from puzzle_core.errors import SpecError
from puzzle_core.formats.llama_blocks import unlike_llama
from puzzle_core.records import Record
from puzzle_core.spec import (
    GKD_SPLITS,
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
    MultipleChoiceWork,
    RefineWork,
    ScoreWork,
    SearchWork,
    TimingWork,
    TokensWork,
    Traffic,
)

HELD_OUT_SPLITS = ("scoring", "evaluation")


class Inputs(Record):
    """External inputs of a plan: the parent, texts, benchmarks, the machine, and an imported cost table.

    The parent, the texts, the table, the benchmarks (by name) and the folder of lm-evaluation-harness are digests.
    `parent_commit` is the hub commit of the parent and is part of no key. `dtype` is the type of a child if the spec
    names none, `auto_dtype` what `auto` is on this machine for products.
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


@dataclass(frozen=True)
class Plan:
    """The work of one run. `spec` has no `auto` left, so no key depends on the machine in secret.

    Raises (on construction):
        SpecError: the parent does not support the spec.
    """

    spec: RunSpec
    inputs: Inputs

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self.spec.with_dtype(self.inputs.auto_dtype))
        shape, spec = self.inputs.shape, self.spec
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

    @cached_property
    def variants(self) -> VariantsSpec:
        """The part of the search space that the engines of the spec can run."""
        return self.spec.served_variants(self.inputs.shape)

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

    def bld(self, layer: int, variant: Variant) -> BldWork:
        """The training of one variant."""
        return BldWork(
            parent=self.inputs.parent,
            layer=layer,
            variant=variant,
            tokens=self.tokens("bld").key,
            contributions=self.importance().key if variant.row.needs_contributions else None,
            seed=self.spec.data.seed,
            spec=self._bld_of_content,
        )

    @property
    def _bld_of_content(self) -> BldSpec:
        """The settings of BLD that its results depend on.

        Both sources of states give the same weights, and the tokens' key has the length of their windows.
        """
        return self.spec.bld.model_copy(update={"source": "stored", "sequence_length": None})

    def library_key(self, layer: int, variant: Variant) -> str | None:
        """The key of a variant's weights; None for the parent's own variant and for no-ops."""
        work = self._library.get((layer, variant))
        return work.key if work else None

    def scored(self, layer: int, base: Architecture | None = None) -> list[BlockVariant]:
        """The blocks of a layer that need a score: all pairs, or the base's block with one subblock changed.

        The base is the parent or a child. A child is also scored unchanged, as its own block in layer 0.
        """
        base_block = base.layers[layer] if base else self.inputs.shape.parent_block
        blocks = self.variants.blocks_of_layer(layer, self.inputs.shape)
        if self.spec.scoring.composition == "subblocks":
            blocks = [
                block for block in blocks if base_block.attention == block.attention or base_block.ffn == block.ffn
            ]
        return [block for block in blocks if block != base_block or (base and layer == 0)]

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

    def score(self, layer: int, block: BlockVariant, base: Architecture | None = None) -> ScoreWork:
        """The score of one block variant in the parent, or in a child, where it is always exact.

        A child differs from the parent before the block is replaced, so an expansion at the parent does not hold there.
        """
        return ScoreWork(
            parent=self.inputs.parent,
            layer=layer,
            block=block,
            attention=self.library_key(layer, block.attention),
            ffn=self.library_key(layer, block.ffn),
            tokens=self.tokens("scoring").key,
            dtype=self.spec.scoring.dtype,
            base=self.assemble(base) if base else None,
            gradients=None if base else self._gradients_key,
        )

    @cached_property
    def _gradients_key(self) -> str | None:
        work = self.gradients()
        return work.key if work else None

    def exact_score(self, layer: int, block: BlockVariant) -> ScoreWork:
        """The exact score of one block variant in the parent, where others are estimates."""
        return self.score(layer, block).model_copy(update={"gradients": None})

    def all_bld(self) -> list[BldWork]:
        """Every variant training."""
        return list(self._library.values())

    def all_scores(self, base: Architecture | None = None) -> list[ScoreWork]:
        """Every score in the parent, or in a child."""
        return [*self._scores] if base is None else self._scores_in(base)

    @cached_property
    def _library(self) -> dict[tuple[int, Variant], BldWork]:
        """Every variant training, in order. It is cached, because a thousand keys take a second."""
        trained = [(layer, variant) for layer in self.layers for variant in self.trained(layer)]
        return {(layer, variant): self.bld(layer, variant) for layer, variant in trained}

    @cached_property
    def _scores(self) -> list[ScoreWork]:
        return self._scores_in(None)

    def _scores_in(self, base: Architecture | None) -> list[ScoreWork]:
        return [self.score(layer, block, base) for layer in self.layers for block in self.scored(layer, base)]

    def costs(self) -> dict[tuple[str, int], CostWork]:
        """The costs of every distinct variant, by scenario and batch size; empty if a table is imported."""
        if self.spec.target.costs == "imported":
            return {}
        distinct = {
            variant
            for layer in self.layers
            for variants in self.variants.of_layer(layer, self.inputs.shape)
            for variant in variants
            if not variant.is_empty
        }
        return {
            (scenario.name, batch_size): CostWork(
                shape=self.inputs.shape.digest(),
                variants=tuple(sorted(distinct)),
                traffic=_traffic(scenario, batch_size),
                target=self.target,
                hardware=self.inputs.hardware,
                formulas=FORMULAS if self.target.costs == "roofline" else None,
            )
            for scenario in self.spec.scenarios
            for batch_size in scenario.batch_sizes
        }

    def search(self, base: Architecture | None = None, batch_sizes: Mapping[str, int] | None = None) -> SearchWork:
        """The search with scores in the parent or in a child, over all batch sizes or only `batch_sizes`."""
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
            exact=() if base else self._exact_keys,
        )

    @cached_property
    def _exact_keys(self) -> tuple[str, ...]:
        if self.spec.scoring.method != "lazy":
            return ()
        return tuple(self.exact_score(work.layer, work.block).key for work in self._scores)

    def refine(self) -> RefineWork | None:
        """The measurement of the search's candidates; None if the spec does not request it."""
        if self.spec.search.shortlist == 1 and not self.spec.search.iterations:
            return None
        return RefineWork(search=self.search().key, tokens=self.tokens("scoring").key)

    def assemble(self, architecture: Architecture) -> AssembleWork:
        """The child of one architecture."""
        library = []
        for layer, block in enumerate(architecture.layers):
            keys = ((str(variant), self.library_key(layer, variant)) for variant in block.subblocks)
            library.append(tuple((variant, key) for variant, key in keys if key))
        return AssembleWork(
            parent=self.inputs.parent,
            architecture=architecture,
            library=tuple(library),
            dtype=self.target.served_dtype,
        )

    def trainings(self, architecture: Architecture) -> dict[str, GkdWork]:
        """The global distillations of one child by their splits; a second one starts from the first one's child."""
        child, works = self.assemble(architecture).key, dict[str, GkdWork]()
        for split, spec in zip(self.gkd_splits, self.spec.gkd.trainings, strict=True):
            works[split] = GkdWork(
                parent=self.inputs.parent,
                child=child,
                architecture=architecture,
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
        """The evaluation of a child by its key, or of the parent."""
        evaluation = self.spec.evaluation
        return EvaluateWork(
            parent=self.inputs.parent,
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
            shape=self.inputs.shape.digest(),
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
                "parent": ParentSpec(path=inputs.parent),
                "data": spec.data.model_copy(update=texts),
                "bld": self._bld_of_content,
                "target": self.target.model_copy(update={"table": inputs.cost_table}),
                "evaluation": spec.evaluation.model_copy(update={"tasks": benchmarks, "lm_eval": self._harness}),
                "runtime": RuntimeSpec(),
            }
        )


def _traffic(scenario: ScenarioSpec, batch_size: int) -> Traffic:
    return Traffic(
        prompt_tokens=scenario.prompt_tokens, generated_tokens=scenario.generated_tokens, batch_size=batch_size
    )
