"""An engine that is added at run time: its row and its module. A model takes one millisecond per 1000 parameters."""

from puzzle_core.architecture import Architecture
from puzzle_core.cost.engine_module import BenchTimes, traffic_label
from puzzle_core.cost.measuring import timing_of
from puzzle_core.engines import Engine, Rule
from puzzle_core.sizes import architecture_parameters, outside_parameters, variant_size
from puzzle_core.work import CostRecord, TimingRecord

ROW = Engine(
    name="toy",
    title="Toy",
    formats=("hf",),
    rules=(Rule("no_linear", "tests/toy_engine.py"), Rule("width_grid", "tests/toy_engine.py")),
    devices=("cpu",),
    costs_module="tests.toy_engine",
    bench_module="tests.toy_engine",
)


def engine_version():
    return "Toy 1.0"


def rounds_of(parameters):
    return {"prefill": [parameters / 1e3] * 3, "decode": [parameters / 500] * 3}


def measure_costs(work, parent, report=None):
    shape, target = parent.shape, work.target
    return CostRecord(
        source="measured",
        variants={str(v): timing_of(rounds_of(variant_size(shape, v).parameters)) for v in work.variants},
        outside=timing_of(rounds_of(outside_parameters(shape))),
        parent=timing_of(rounds_of(architecture_parameters(shape, Architecture.of_parent(shape)))),
        hardware=work.hardware,
        weight_bytes=4,
        kv_bytes=4,
        engine=engine_version(),
        threads=target.threads,
        rounds=target.rounds,
    )


def time_architectures(work, parent, report=None):
    times = {name: rounds_of(architecture_parameters(parent.shape, found)) for name, found in work.architectures}
    return TimingRecord(models={name: timing_of(rounds) for name, rounds in times.items()}, hardware=work.hardware)


def bench_models(request, report):
    sizes = {name: architecture_parameters(s.shape, s.architecture) for name, s in request.sources.items()}
    for traffic in request.traffics:
        report(traffic_label(traffic))
    rounds = [{name: rounds_of(size) for name, size in sizes.items()} for _ in request.traffics]
    return BenchTimes(engine_version(), {name: 4.0 * size for name, size in sizes.items()}, 4, rounds)
