"""Measure, print as it comes, and with out= write BENCHMARKS.md.

python -m mamba2_train.benchmarks                           everything, printed
python -m mamba2_train.benchmarks out=.                     and written
python -m mamba2_train.benchmarks workload=full-130m,scan   some of it
python -m mamba2_train.benchmarks --quick                   small shapes: does it run?
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from mamba2_train.benchmarks import lengths, pair, profiles, report, scan, startup
from mamba2_train.benchmarks.prepare import prepare
from mamba2_train.benchmarks.workloads import WORKLOADS
from mamba2_train.errors import UserError, nearest

PROFILED = ("lora-130m-512",)
ALONE = ("profiles", "lengths", "startup", "scan")  # without two sides that step in turn


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a comparison failed."""
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_train.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", help="workload=NAME,NAME out=FOLDER repetitions=2")
    parser.add_argument("--quick", action="store_true", help="two layers, short rows, two steps")
    options = parser.parse_args(arguments)
    try:
        chosen = _settings(options.settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # both sides and every measurement take all cores, unless told otherwise
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as folder:
        return _measure(chosen, Path(folder), options.quick)


def _settings(words: list[str]) -> dict[str, str]:
    """
    Raises:
        UserError: a setting or a workload that does not exist.
    """
    found = {"workload": ",".join((*WORKLOADS, *ALONE)), "out": "", "repetitions": ""}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in found or not equals:
            raise UserError(f"{word} is no setting; give workload=, out= or repetitions=")
        found[key] = value
    for name in found["workload"].split(","):
        if name not in WORKLOADS and name not in ALONE:
            known = [*WORKLOADS, *ALONE]
            raise UserError(f"no workload {name}.{nearest(name, known)} Known: {', '.join(known)}")
    if found["repetitions"] and not re.fullmatch("[1-9][0-9]*", found["repetitions"]):
        raise UserError(f"repetitions={found['repetitions']}: give a number of 1 or more")
    return found


def _measure(chosen: dict[str, str], folder: Path, quick: bool) -> int:
    names = chosen["workload"].split(",")
    load = os.getloadavg()[0]
    results: list[pair.Result] = []
    n_layers = 2 if quick else None
    for w in (_quick(WORKLOADS[n]) if quick else WORKLOADS[n] for n in names if n in WORKLOADS):
        made = prepare(folder, w, n_layers)
        repetitions = 1 if quick else int(chosen["repetitions"] or w.repetitions)
        results.append(pair.run(w, made, folder, repetitions))
        print("\n".join(report.table(results)[-1 if len(results) > 1 else 0 :]), flush=True)
    busy = {"threads": os.environ["OMP_NUM_THREADS"], "load average before": f"{load:.1f}"}
    others: dict[str, Any] = {"machine": busy}
    for name, found in chain([("workloads", None)], _others(names, folder, quick)):
        if found is not None:
            others[name] = found
            print(f"{name}: {found}", flush=True)
        if chosen["out"]:  # each time: what fails later must not take this with it
            report.write(Path(chosen["out"]), results, others)
    return int(any(r.failure is not None for r in results))


def _others(names: list[str], folder: Path, quick: bool) -> Iterator[tuple[str, Any]]:
    if "profiles" in names:
        some = [_quick(WORKLOADS[n]) if quick else WORKLOADS[n] for n in PROFILED]
        n_layers = 2 if quick else None
        yield (
            "profiles",
            {w.title: profiles.measure(w, prepare(folder, w, n_layers)) for w in some},
        )
    if "lengths" in names:
        yield "lengths", lengths.measure(lengths.LENGTHS[:2] if quick else lengths.LENGTHS)
    if "startup" in names:
        yield "startup", startup.measure()
    if "scan" in names:
        yield "scan", scan.measured(1 if quick else 15)


def _quick(w: Any) -> Any:
    return replace(w, seq_len=min(w.seq_len, 64) if w.rows == "whole" else w.seq_len, steps=2)


if __name__ == "__main__":
    sys.exit(main())
