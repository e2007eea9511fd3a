"""Runs of the installed commands without their imports' seconds, by one rank or several: see
`faulty_train.py serve`."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
FAULTY = Path(__file__).parent / "faulty_train.py"
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


class Server:
    """Of one folder, in which every command starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, itertools.count()
        self.process = subprocess.Popen(
            [sys.executable, FAULTY, "serve"], stdin=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def run(
        self, command: str, *arguments: object, ranks: int = 1, fault: str = "none"
    ) -> tuple[int, str]:
        """Its exit code, of the first rank that failed, and what all said."""
        name = self.folder / f"launch-{next(self.count)}"
        words = [fault, str(BIN / command), *map(str, arguments)]
        request = {"folder": str(self.folder), "arguments": words, "ranks": ranks}
        request |= {key: f"{name}.{key}" for key in ("out", "err", "done")}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        until = time.monotonic() + 280  # the first waits for the imports too
        while not Path(request["done"]).exists():
            assert time.monotonic() < until, Path(request["err"]).read_text()
            time.sleep(0.02)
        said = [Path(request[key]).read_text() for key in ("out", "err")]
        return int(Path(request["done"]).read_text()), "".join(said)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
