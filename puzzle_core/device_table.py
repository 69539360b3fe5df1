"""Target files from the table of devices (deployments/devices.yaml): one per device and precision. No torch.

    python -m puzzle_core.device_table [TABLE] [DIRECTORY]

Fits that a file already has stay in it, so that `puzzle calibrate --write` and a new table do not undo each other.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from puzzle_core.precisions import LAYOUTS, Precision
from puzzle_core.records import write_text_atomic
from puzzle_core.target import TargetSpec
from puzzle_core.yaml_file import parse_record, read_keys, yaml_text

DEPLOYMENTS = Path(__file__).parents[1] / "deployments"
SIXTEEN: tuple[Precision, ...] = ("bfloat16", "float16")


def device_targets(table: Path) -> dict[str, dict[str, Any]]:
    """The content of every target file, by its name.

    Raises:
        SpecError: the table cannot be read, or a target of it is not valid; names the device and the key.
    """
    content = read_keys(table, "table of devices", "it starts with `devices:`")
    found = {}
    for key, entry in content["devices"].items():
        figures = {name: value for name, value in entry.items() if name not in ("targets", "engine", "device")}
        for name, precision in entry["targets"].items():
            hardware = {"device": entry["device"], **_precisions(precision, figures["peak_rates"]), **figures}
            target = {
                "name": name,
                "costs": "roofline",
                "engine": entry.get("engine", "llama.cpp"),
                "dtype": "bfloat16",
            }
            found[name] = target | {"hardware": hardware}
            parse_record(TargetSpec, found[name], f"{table}, device {key}", "target")
    return found


def _precisions(weights: Precision, rates: dict[str, str]) -> dict[str, Precision]:
    """Weights as asked; activations as narrow as the device multiplies, and a cache of 8 bits beside such weights."""
    if weights in SIXTEEN:
        return {"weights": weights, "activations": weights, "kv_cache": weights}
    sixteen: Precision = "bfloat16" if "bfloat16" in rates else "float16"
    if weights in ("int4", "q4_k_m", "q8_0") or LAYOUTS[weights].products not in rates:
        return {"weights": weights, "activations": sixteen, "kv_cache": sixteen}
    return {"weights": weights, "activations": weights, "kv_cache": "fp8"}


def file_text(name: str, target: dict[str, Any], old: Path) -> str:
    """The text of a target's file, with the fits that the old one has."""
    if old.exists() and (fits := read_keys(old, "target", "").get("hardware", {}).get("fits")):
        target = target | {"hardware": target["hardware"] | {"fits": fits}}
    return f"# {target['hardware']['device']}, made from deployments/devices.yaml.\n{yaml_text(target)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, nargs="?", default=DEPLOYMENTS / "devices.yaml")
    parser.add_argument("directory", type=Path, nargs="?", default=DEPLOYMENTS / "targets")
    arguments = parser.parse_args()
    for name, target in device_targets(arguments.table).items():
        path = arguments.directory / f"{name}.yaml"
        write_text_atomic(path, file_text(name, target, path))
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
