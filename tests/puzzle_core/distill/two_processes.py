"""One of the two gloo processes of test_distributed.py: runs every case of cases.json in order.

torchrun starts it. A case with `stop` is interrupted in all processes after that step; one with `fault` plants a fault.
"""

import json
import sys
from pathlib import Path

import torch

from puzzle_core.architecture import Architecture
from puzzle_core.distill import gkd
from puzzle_core.distill.distributed import ShardedGroup, sharded_group
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.errors import ArtifactError
from puzzle_core.model.checkpoint import Checkpoint
from puzzle_core.model.child_config import read_child_config
from puzzle_core.model.parent import Parent
from puzzle_core.spec import GkdSpec, ParentSpec
from puzzle_core.work import GkdWork
from tests.conftest import MIXED

SPEC = {"batch_tokens": 48, "epochs": 3, "held_back_checks": 0, "optimizer": {"learning_rate": 0.005}}


def work_of(spec):
    return GkdWork(
        parent="p",
        child="c",
        architecture=Architecture.parse(MIXED),
        tokens="t",
        dtype="float32",
        seed=0,
        spec=GkdSpec(**(SPEC | spec)),
    )


def same_rows_for_all(group, parts):
    return [(parts[0], 1)]


def do(case, group):
    stop = case.get("stop")

    def interrupt(progress):
        if progress.step == stop:
            raise KeyboardInterrupt

    out = Path(case["out"])
    if group.leads:
        out.mkdir()
    try:
        record = gkd.distil(
            work_of(case["spec"]),
            Parent(ParentSpec(path=case["parent"])),
            Path(case["child"]),
            Path(case["tokens"]),
            out,
            Checkpoints(Path(case["checkpoint"]), 0) if "checkpoint" in case else None,
            interrupt,
            group=group,
        )
    except KeyboardInterrupt:
        return
    if group.leads:
        record.write(out / "record.json")


def held(case, group):
    """Number of the child's weights that this process stores, and number of all its weights."""
    directory = Path(case["child"])
    child = group.load(read_child_config(directory), Checkpoint(directory, ArtifactError), torch.float32)
    parameters = list(child.parameters())
    return sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)


def main(place):
    torch.set_num_threads(1)
    share, cases = ShardedGroup.share, json.loads((place / "cases.json").read_text())
    with sharded_group() as group:
        for case in cases:
            ShardedGroup.share = same_rows_for_all if case.get("fault") else share
            do(case, group)
        (place / f"held-{group.mesh.get_rank()}.json").write_text(json.dumps(held(cases[0], group)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
