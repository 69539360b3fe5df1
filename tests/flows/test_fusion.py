"""A run whose child has its FFNs fused: what the search chose, fused, distilled, and all of it in the report."""

from flows.puzzle import puzzle
from puzzle_core.fusible import fused
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.work import ChildRecord, EvaluationRecord, GkdRecord
from tests.workflow import plan_of


def test_a_fused_child_is_distilled_and_stands_beside_the_one_before(again):
    limits = {"parameters": None, "attention_layers": "2"}
    spec = again(child={"fuse_ffn": True}, scenario={"limits": limits}, search={"baselines": []})
    report = puzzle(spec)
    plan, context = plan_of(spec)
    store = context.store()
    chosen = store.record(SearchRecord, plan.search().key).best.architecture
    architecture = fused(chosen)
    assert len(architecture.options) < len(chosen.options)
    record = store.record(ChildRecord, plan.assemble(chosen, fuse_ffn=True).key)
    assert (record.architecture, record.unfused) == (architecture, chosen)
    assert store.record(GkdRecord, plan.gkd(chosen).key).architecture == architecture
    keys = [plan.assemble(chosen).key, plan.assemble(chosen, fuse_ffn=True).key, plan.gkd(chosen).key]
    kls = [store.record(EvaluationRecord, plan.evaluate(key).key).kl_nats_per_token for key in keys]
    assert len(set(kls)) == 3
    page = (store.fetch(report) / "report.md").read_text()
    assert "child after FFN fusion" in page
