"""A believable run, made up without a model: costs grow with width, scores with what is taken away."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.report.report_inputs import ModelResult, ReportInputs
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table
from puzzle_core.search.search_record import FoundArchitecture, LimitUse, Prediction, SearchRecord
from puzzle_core.search.tables import Option, ScoreTable
from puzzle_core.sizes import architecture_parameters, kv_entries
from puzzle_core.spec import RunSpec, parse_spec
from puzzle_core.work import BldRecord, CostRecord, EvaluationRecord, GkdRecord, HeldBackKl, ScoreRecord, Timing

BATCH = 4


def timing(prefill_ms: float, decode_ms: float, spread: float = 0.02) -> Timing:
    return Timing(prefill_ms=prefill_ms, decode_ms=decode_ms, prefill_spread=spread, decode_spread=spread)


def holds(use: LimitUse) -> bool:
    return use.usage <= use.threshold if use.sense == "at_most" else use.usage >= use.threshold


class MadeUp:
    """One made-up run."""

    def __init__(self, layers: int = 8, gkd: bool = True, **changes: Any) -> None:
        self.random = np.random.default_rng(0)
        self.with_gkd = gkd
        self.shape = ModelShape(
            family="llama", layers=layers, hidden=256, heads=8, kv_heads=4, head_dim=32, ffn_width=1024,
            vocabulary=4096, tied_embeddings=True, qkv_bias=False, attention_out_bias=False, mlp_bias=False,
            qk_norm=False, max_positions=1024,
        )  # fmt: skip
        content: dict[str, Any] = {
            "name": "made-up",
            "parent": {"path": "/models/parent"},
            "variants": {"kv_heads": [2, 1], "ffn_ratios": [0.75, 0.5, 0.25]},
            "target": {"dtype": "float32"},
            "scenario": {
                "name": "chatbot", "prompt_tokens": 128, "generated_tokens": 64, "batch_sizes": [BATCH],
                "limits": {"memory": "75%", "throughput": "140%", "time_to_first_token": "900ms"},
            },
        }  # fmt: skip
        self.spec: RunSpec = parse_spec(content | changes, "test")
        self.own = self.shape.largest_block
        attentions, ffns = self.spec.variants.of_layer(0, self.shape)
        self.blocks = [BlockVariant(attention=a, ffn=f) for a in attentions for f in ffns]
        self.trained = [v for v in (*attentions[1:], *ffns[1:]) if v.kind != "no_op"]
        self.measured = CostRecord(
            source="measured",
            variants={str(v): self._time(v) for v in (*attentions, *ffns) if v.kind != "no_op"},
            outside=timing(6.0, 90.0),
            parent=timing(6.2 + layers * 9.1, 92 + layers * 75.0),
            weight_bytes=4,
            kv_bytes=4,
            hardware="Imaginary CPU @ 3 GHz",
            torch_version="2.13.0",
            threads=1,
            rounds=7,
        )
        self.name = self.spec.scenario.name
        self.batch_sizes = {self.name: BATCH}
        self.scores = {
            (layer, block): self._kl(layer, block)
            for layer in range(layers)
            for block in self.blocks
            if block != self.own
        }
        scores = ScoreTable(
            Architecture.of_parent(self.shape),
            tuple({Option(b): self.scores.get((layer, b), 0.0) for b in self.blocks} for layer in range(layers)),
            "kl",
        )
        costs = cost_table(self.spec.variants, self.shape, {(self.name, BATCH): self.measured})
        self.builder = ProblemBuilder(self.spec.request, scores, costs)

    def _time(self, variant: Variant) -> Timing:
        own = self.own.attention if variant.subblock == "attn" else self.own.ffn
        share = 0.15 if variant.kind == "linear" else 0.35 + 0.65 * variant.size / own.size
        return timing(4.0 * share, 30 * share) if variant.subblock == "attn" else timing(5.0 * share, 44 * share)

    def _kl(self, layer: int, block: BlockVariant) -> float:
        last = max(1, self.shape.layers - 1)
        fragile = 0.01 * (1 + 60 * np.exp(-1.5 * layer) + 4 * np.exp(-1.0 * (last - layer)))
        lost = 0.0
        for half, own in ((block.attention, self.own.attention), (block.ffn, self.own.ffn)):
            kept = half.size / own.size
            lost += {"sized": (1 - kept) ** 2, "linear": 1.5, "no_op": 2.2}[half.kind]
        return float(fragile * lost * self.random.uniform(0.85, 1.15))

    def choose(self, weight: float) -> Architecture:
        """Every layer's best trade of score against time."""

        def price(layer: int, block: BlockVariant) -> float:
            score = 0.0 if block == self.own else self.scores[layer, block]
            times = (self.builder.costs.block(c, layer, block, self.name, BATCH) for c in ("prefill_ms", "decode_ms"))
            return score + weight * sum(times)

        return Architecture(
            layers=tuple(min(self.blocks, key=lambda b: price(layer, b)) for layer in range(self.shape.layers))
        )

    def found(self, method: str, architecture: Architecture) -> FoundArchitecture:
        score = sum(self.scores.get((i, b), 0.0) for i, b in enumerate(architecture.layers))
        return FoundArchitecture(
            method=method, architecture=architecture, score=score, bound=score, gap=0.0, optimal=True, seconds=0.04,
            predictions=self.predict(architecture), limits=self.builder.limit_uses(architecture, self.batch_sizes),
        )  # fmt: skip

    def predict(self, architecture: Architecture) -> dict[str, Prediction]:
        return self.builder.predict(architecture, self.batch_sizes)

    def model(self, name: str, kind: Any, architecture: Architecture, kl: float) -> ModelResult:
        p = self.predict(architecture)[self.name]
        entries = kv_entries(self.shape, architecture, tokens=1)
        parameters = architecture_parameters(self.shape, architecture)
        return ModelResult(
            name=name,
            kind=kind,
            architecture=architecture,
            evaluation=EvaluationRecord(
                kl_nats_per_token=kl,
                lm_loss_nats_per_token=2.0 + kl,
                perplexity=float(np.exp(2.0 + kl)),
                top1_accuracy=0.5 * (1 - 0.2 * kl),
                top1_agreement=1 - 0.4 * min(kl, 1.0),
                tokens=65_536,
                lm_eval={},
            ),
            timing=None if kind == "baseline" else timing(p.prefill_ms * 1.03, p.decode_ms * 0.97),
            parameters=parameters,
            memory_bytes=4.0 * (parameters + BATCH * (128 + 64) * entries),
        )

    def bld(self) -> tuple[BldRecord, ...]:
        records = []
        for layer in range(self.shape.layers):
            for variant in self.trained:
                own = self.own.attention if variant.subblock == "attn" else self.own.ffn
                start = 0.02 + 0.6 * (1 - variant.size / own.size) / (1 + 0.3 * layer)
                steps = np.arange(64)
                curve = start * (0.3 + 0.7 * np.exp(-steps / 15)) * self.random.uniform(0.9, 1.1, 64)
                curve_ = tuple(float(x) for x in curve)
                records.append(
                    BldRecord(
                        layer=layer, variant=variant, initial_loss=curve_[0], final_loss=sum(curve_[-6:]) / 6,
                        curve=curve_, tokens=262_144, seconds=2.5,
                    )
                )  # fmt: skip
        return tuple(records)

    def gkd(self, architecture: Architecture) -> GkdRecord:
        steps = np.arange(128)
        kl = 0.3 * (0.3 + 0.7 * np.exp(-steps / 30)) * self.random.uniform(0.85, 1.15, 128)
        cosine = 1.1 * (0.5 + 0.5 * np.exp(-steps / 40)) * self.random.uniform(0.95, 1.05, 128)
        curve = tuple(
            {"loss": float(a + b), "cosine": float(b), "kl": float(a)} for a, b in zip(kl, cosine, strict=True)
        )
        held_back = tuple(HeldBackKl(step=step, kl_nats_per_token=0.3 * 0.99**step) for step in range(0, 129, 16))
        return GkdRecord(architecture=architecture, curve=curve, held_back=held_back, tokens=524_288, seconds=312.0)

    def inputs(self) -> ReportInputs:
        limited = (self.found("mip", self.choose(weight)) for weight in np.geomspace(1e-6, 1, 400))
        found = next(f for f in limited if all(holds(use) for use in f.limits))
        chosen = found.architecture
        half = BlockVariant.parse("attn:kv2+ffn:i512")
        picks = self.random.integers(len(self.blocks), size=self.shape.layers)
        others = {
            "greedy": Architecture(layers=chosen.layers[-2:] + chosen.layers[:-2]),
            "uniform": Architecture(layers=(half,) * self.shape.layers),
            "random": Architecture(layers=tuple(self.blocks[i] for i in picks)),
            "maximise_parameters": Architecture(layers=chosen.layers[::-1]),
        }
        baselines = {method: self.found(method, architecture) for method, architecture in others.items()}
        frontier = tuple(self.found("mip", self.choose(w)) for w in np.geomspace(3e-5, 0.3, 12))
        parent = Architecture.of_parent(self.shape)
        models = [self.model("parent", "parent", parent, 0.0)]
        models.append(self.model("child after assembly", "child", chosen, found.score * 1.2))
        if self.with_gkd:
            models.append(self.model("child after GKD", "child", chosen, found.score * 0.4))
        models += [self.model(method, "baseline", b.architecture, b.score * 1.3) for method, b in baselines.items()]
        return ReportInputs(
            spec=self.spec,
            shape=self.shape,
            search=SearchRecord(
                objective="kl",
                batch_sizes=self.batch_sizes,
                parents=self.predict(parent),
                times=self.builder.times(self.batch_sizes),
                solutions=(found,),
                baselines=tuple(baselines.values()),
                frontier=frontier,
                outcomes=(), prices=(), runner_ups=(),
                largest_score=max(self.scores.values()),
                omissions={},
            ),
            bld=self.bld(),
            scores=tuple(
                ScoreRecord(
                    layer=layer, block=block, kl_nats_per_token=kl, lm_loss_increase_nats_per_token=0.9 * kl,
                    top1_agreement=1 - 0.3 * min(kl, 1.0), tokens=16_384,
                )
                for (layer, block), kl in self.scores.items()
            ),
            costs=self.measured,
            gkd=self.gkd(chosen) if self.with_gkd else None,
            models=tuple(models),
            artifacts={"child": "child/v1/0123abcd", "search": "search/v1/4567cdef"},
        )  # fmt: skip


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., ReportInputs]:
    """Makes inputs: `layers`, `gkd`, and changed top-level parts of the spec."""
    return lambda **how: MadeUp(**how).inputs()


@pytest.fixture(scope="session")
def inputs(make_inputs: Callable[..., ReportInputs]) -> ReportInputs:
    """Eight layers, with GKD."""
    return make_inputs()
