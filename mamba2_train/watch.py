"""Which rank keeps the others waiting, and in what.

A rank that hangs says nothing, and the collective that the others wait in ends, after a long time,
with an error on the wrong ranks. Here a thread of every rank publishes how many collectives its
rank has entered in each process group, and where in the code it is. When a rank has entered none
for `timeout`, and others of its groups have entered another number, the job ends with the name of
the rank that is behind and of the collective it has not come to.
"""

import atexit
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from mamba2_train.processes import LOGS, rank

logger = logging.getLogger(__name__)

HUNG = 1  # exit code
POLLS = 6  # per timeout
LONGEST_POLL = 10.0  # seconds

# What a rank publishes: `groups`, for each process group by name its ranks, the number of
# collectives entered and the last of them; `at`, its place in the code
Standing = dict[str, Any]


class Watch(Callback):
    """Ends the job when a rank keeps others waiting for `timeout`, and says which, and in what.

    The traceback of every thread of every rank goes to its log in `run_dir`.
    """

    def __init__(self, timeout: timedelta, run_dir: Path) -> None:
        self.timeout = timeout.total_seconds()
        self.poll = min(self.timeout / POLLS, LONGEST_POLL)
        self.run_dir = run_dir
        self.done = threading.Event()
        self.thread: threading.Thread | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if not torch.distributed.is_initialized() or self.thread is not None:
            return
        self.rank, self.world = trainer.global_rank, trainer.world_size
        # a connection of its own: the other may be in use, and wait
        store = torch.distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.store = torch.distributed.PrefixStore("watch", store)
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """No rank is waited for any more."""
        self.done.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout=5)

    def _run(self) -> None:
        before: Standing = {}
        since = time.monotonic()
        while not self.done.wait(self.poll):
            try:
                now = standing()
                self.store.set(f"rank-{self.rank}", json.dumps(now))
                if self.store.check(["verdict"]):
                    self._end(self.store.get("verdict").decode())
                if now["groups"] != before.get("groups"):
                    before, since = now, time.monotonic()
                elif time.monotonic() - since >= self.timeout:
                    self._judge()
            except (RuntimeError, ValueError):  # the store or the group is gone: others know why
                return

    def _judge(self) -> None:
        first = self._all()
        self.done.wait(2 * self.poll)  # nobody is judged by what was true a moment ago
        second = self._all()
        idle = {
            r: state
            for r, state in second.items()
            if r in first and first[r]["groups"] == state["groups"]
        }
        if len(idle) == self.world and not self.done.is_set() and (verdict := late(idle)):
            verdict += f" for {self.timeout / 60:.3g} min (strategy.timeout_minutes)"
            self.store.set("verdict", verdict)
            if self.store.add("judges", 1) == 1:
                print(f"error: {verdict}", file=sys.stderr, flush=True)
            self._end(verdict)

    def _all(self) -> dict[int, Standing]:
        keys = {r: f"rank-{r}" for r in range(self.world)}
        return {
            r: json.loads(self.store.get(key)) for r, key in keys.items() if self.store.check([key])
        }

    def _end(self, verdict: str) -> None:
        with (self.run_dir / LOGS / f"rank-{rank()}.log").open("a") as log:
            print(verdict, file=log, flush=True)
            faulthandler.dump_traceback(log)
        # the others read the verdict before the first rank, which may keep the store, is gone
        time.sleep((3 if self.rank == 0 else 2) * self.poll)
        # nothing can be closed in order: the main thread is in a call that does not return
        os._exit(HUNG)


def standing() -> Standing:
    """Of this rank: collectives entered in each group, and the place of the main thread."""
    distributed = torch.distributed.distributed_c10d
    names = _last_collectives()
    groups = {}
    for group, name in distributed._world.pg_names.items():
        ranks = sorted(distributed._world.pg_group_ranks[group])
        entered = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        groups[name] = [ranks, entered, names.get(name, "a collective")]
    return {"groups": groups, "at": _place()}


def late(ranks: dict[int, Standing]) -> str:
    """Names the ranks that others wait for, and the collective; empty if nobody is late.

    Where a rank is late in one group because it waits in another, the other is what counts.
    """
    behind: dict[int, tuple[str, int, list[int]]] = {}
    waiting = set()
    for mine in ranks.values():
        for name, (members, _, _) in mine["groups"].items():
            entered = {r: ranks[r]["groups"].get(name, [[], 0, ""])[1] for r in members}
            most = max(entered.values())
            ahead = [r for r in members if entered[r] == most]
            if len(ahead) == len(members):
                continue
            waiting |= set(ahead)
            collective = ranks[ahead[0]]["groups"][name][2]
            behind |= {r: (collective, most, ahead) for r in members if entered[r] < most}
    guilty = {r: what for r, what in behind.items() if r not in waiting}
    return "; ".join(
        f"rank {r} hangs {ranks[r]['at']}: it has not come to {collective} (number {number}), in "
        f"which rank {', '.join(map(str, ahead))} has waited"
        for r, (collective, number, ahead) in sorted(guilty.items())
    )


def _last_collectives() -> dict[str, str]:
    """By the flight recorder, which keeps the last ones of every process group: group -> name."""
    c10d = torch._C._distributed_c10d
    last = {}
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if hasattr(c10d, dump):
            trace = json.loads(getattr(c10d, dump)(True, False))
            for entry in trace.get("entries", []):
                last[entry["process_group"][0]] = entry["profiling_name"].partition(":")[2]
    return last


def _place() -> str:
    """Of the main thread: its innermost line in our code, or at all."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = None
    while frame is not None:
        code = frame.f_code
        if innermost is None:
            innermost = f"in {code.co_name} ({code.co_filename}:{frame.f_lineno})"
        if frame.f_globals.get("__name__", "").startswith(("mamba2_", "__main__")):
            return f"in {code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
        frame = frame.f_back
    return innermost or "somewhere"
