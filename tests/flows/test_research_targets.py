"""Re-search: only targets without an answer are searched, a broken file stops only itself, and nothing is measured."""

import shutil
from pathlib import Path

import pytest

from flows import add_target as add_target_module
from flows.add_target import add_target
from flows.cli.describe import describe_targets
from flows.research_targets import find_searches, research_targets
from puzzle_core.errors import PuzzleError, SpecError
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.target import load_target
from tasks.store.garbage import collect_garbage
from tests.workflow import SCORED, Recorded, artifacts, changed, of_stage, plan_of

SHIPPED = Path(__file__).parents[2] / "deployments" / "targets"


@pytest.fixture
def targets(tmp_path):
    place = tmp_path / "targets"
    place.mkdir()
    for name in ("h100-80gb-fp8", "l4"):
        shutil.copy(SHIPPED / f"{name}.yaml", place)
    return place


def spec_store(spec):
    return plan_of(spec)[1].store()


def search_of(spec, key):
    return SearchRecord.model_validate(spec_store(spec).manifest(key).record)


def test_every_target_gets_an_answer_from_the_library_as_it_is(again, targets):
    spec = again()
    before, recorded = artifacts(spec.runtime.store), Recorded()
    found = research_targets(spec, str(targets))
    assert len(found) == 2
    made = changed(before, artifacts(spec.runtime.store))
    assert of_stage(made, "search") == set(found.values())
    assert {key.split("/")[0] for key in made} == {"cost", "search"}
    computed = recorded.computed(at_least=4)
    assert not [name for name in computed if name.startswith(("bld", "score", "capture"))]
    assert computed.count("open inputs") == 1
    for key in found.values():
        record = search_of(spec, key)
        assert all(use.usage <= use.threshold for use in record.best.limits)
        assert record.parent.total_ms > 0


def test_a_second_pass_does_nothing_and_a_changed_or_new_file_is_searched(again, targets, caplog):
    spec = again()
    first = research_targets(spec, str(targets))
    before = artifacts(spec.runtime.store)
    assert research_targets(spec, str(targets)) == first
    assert changed(before, artifacts(spec.runtime.store)) == set()
    file = targets / "l4.yaml"
    file.write_text(file.read_text().replace("memory: 24GB", "memory: 48GB").replace("300GB/s", "350GB/s"))
    shutil.copy(SHIPPED / "b200.yaml", targets)
    caplog.clear()
    with caplog.at_level("INFO"):
        second = research_targets(spec, str(targets))
    made = of_stage(changed(before, artifacts(spec.runtime.store)), "search")
    assert made == {key for name, key in second.items() if first.get(name) != key}
    assert len(made) == 2
    assert caplog.text.count("Since the last search for l4: the target's costs changed.") == 1
    assert "Since the last search for b200" not in caplog.text


def test_a_broken_target_file_stops_only_itself_and_loudly(again, targets):
    spec = again()
    (targets / "typo.yaml").write_text("name: typo\ncosts: roofline\nbandwith: 3TB/s\n")
    before = artifacts(spec.runtime.store)
    with pytest.raises(PuzzleError, match=r"(?s)1 of 3 targets have no search:\ntypo.yaml: .*bandwith: unknown key"):
        research_targets(spec, str(targets))
    assert len(of_stage(changed(before, artifacts(spec.runtime.store)), "search")) == 2


def test_targets_are_listed_with_what_is_known_of_them(again, targets):
    spec = again()
    assert describe_targets(spec, targets).count(" no ") == 2
    research_targets(spec, str(targets))
    (targets / "typo.yaml").write_text("name: typo\nbandwith: 3TB/s\n")
    text = describe_targets(spec, targets)
    assert text.count(" yes ") == 2
    assert "error: " in text


def test_no_targets_or_two_of_one_name_are_refused(again, targets, tmp_path):
    with pytest.raises(PuzzleError, match="holds no target files"):
        research_targets(again(), str(tmp_path / "nowhere"))
    shutil.copy(targets / "l4.yaml", targets / "other.yaml")
    with pytest.raises(PuzzleError, match=r"l4.yaml and other.yaml have targets called"):
        research_targets(again(), str(targets))


def test_a_target_from_the_form_is_searched_with_its_own_traffic_and_garbage_collection_leaves_it(
    again, tmp_path, monkeypatch
):
    spec, told = again(), []
    store, target = spec.runtime.store, load_target(SHIPPED / "l4.yaml")
    monkeypatch.setattr(add_target_module, "announce", lambda *event: told.append(event))
    traffic = spec.scenario.model_copy(update={"name": "batch", "batch_sizes": (4,)})
    path = add_target(target, traffic, store)
    assert told == [("target.added", "l4--batch", {"store": store, "path": path})]
    found = research_targets(spec, str(tmp_path / "no-files"))
    assert list(found) == ["l4--batch"]
    assert search_of(spec, found["l4--batch"]).batch_sizes == {"batch": 4}
    assert collect_garbage(spec_store(spec), 4e9, 0, dry_run=False)[1].count(path) == 0
    assert add_target.fn(target, traffic, store) == path
    slower = target.model_copy(update={"hardware": target.hardware.model_copy(update={"bandwidth": "1GB/s"})})
    with pytest.raises(SpecError, match=r"has another target targets/l4--batch.json: give this one another name"):
        add_target.fn(slower, traffic, store)
    add_target.fn(slower, traffic, store, replace=True)
    (search,) = find_searches(*plan_of(spec), tmp_path / "no-files")
    assert (search.plan.spec.target, search.record) == (slower, None)


def test_while_the_library_lacks_something_the_run_ends_in_a_state_that_says_so(again, targets):
    spec = again()
    gone = sorted(of_stage(artifacts(spec.runtime.store), "score"))[0]
    shutil.rmtree(Path(spec.runtime.store) / gone)
    before = artifacts(spec.runtime.store)
    state = research_targets(spec, str(targets), return_state=True)
    assert (state.is_completed(), state.name) == (True, "NoLibrary")
    assert f"has {SCORED - 1} of {SCORED} scores" in state.message
    assert research_targets(spec, str(targets)) == {}
    assert changed(before, artifacts(spec.runtime.store)) == set()
