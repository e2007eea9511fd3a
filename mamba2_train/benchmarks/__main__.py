"""python -m mamba2_train.benchmarks [workload=a,b] [out=FOLDER] [--quick]"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mamba2_train.benchmarks import pair
from mamba2_train.benchmarks.prepare import prepare
from mamba2_train.benchmarks.workloads import WORKLOADS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mamba2_train.benchmarks")
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for w in options.workloads:
            w = WORKLOADS[w]
            result = pair.run(w, prepare(folder, w), folder, 1)
            print(w.name, result.failure)
            for s in (result.ours, result.peer):
                print(s, )
                if s.tokens: print(s.rate, s.spread, s.cpu_per_token, s.peaks)
            print(flush=True)
            for l in folder.glob("*.log"):
                (Path("/tmp/bw")/l.name).write_text(l.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
