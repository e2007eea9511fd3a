"""Several runs on one HTML page: curves together, the settings that differ, the best checkpoint of
each, samples side by side.

It is made of the same files as a run's own report, with the same promises: it loads nothing and
runs nothing, and a run that is broken or has not ended is shown as such. Checkboxes hide a run by
CSS alone.
"""

import glob
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml

from mamba2_train.errors import UserError
from mamba2_train.report_parts import (
    PLOTS,
    Curve,
    Plot,
    Series,
    draw,
    is_number,
    legend,
    line_style,
    mapping,
    needs_log,
    percent_change,
    read,
    read_metrics,
    read_result,
    read_samples,
    running_median,
    template,
    thinned,
    value,
)

MARKS = ("config.yaml", "csv/metrics.csv", "result.json", "start.json")  # of a run folder
OWN = ("run_dir", "resume", "debug")  # settings that say nothing about a run
DEPTH = 3  # folders below a parent in which runs are looked for


def compare(runs: Sequence[Path], out: Path) -> Path:
    """Write `out`, one self-contained page about `runs`, and return its path.

    Raises:
        UserError: no run, or one that is no folder; or `out` cannot be written.
    """
    if not runs:
        raise UserError("there is no run to compare: give at least one run folder")
    for run in runs:
        if not run.is_dir():
            raise UserError(f"there is no run folder at {run}: give folders that runs wrote")
    folder = out.parent.resolve()
    found = [_read_run(run, label, folder) for run, label in zip(runs, _labels(runs), strict=True)]
    best = min((r["best"] for r in found if r["best"] is not None), default=None)
    for i, one in enumerate(found):
        one |= {"index": i, **legend(i)}
        one["is_best"] = len(found) > 1 and one["best"] is not None and one["best"] == best
    page = template("compare.html.jinja").render(
        runs=found,
        notes=[f"{run['label']}: {note}" for run in found for note in run["notes"]],
        figures=[figure for plot in PLOTS if (figure := _figure(plot, found)) is not None],
        settings=_differences(found),
        samples=_side_by_side(found),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    return out


def find_runs(wanted: Iterable[str], below: Path = Path("runs")) -> list[Path]:
    """Run folders, each once, in the order given: of a folder, a folder of folders, a glob, or the
    name of a run or of its folder in `below`.

    Raises:
        UserError: a word that finds none.
    """
    found: dict[Path, Path] = {}
    for word in wanted:
        places = [Path(word), below / word]
        if glob.has_magic(word):
            places = [Path(p) for p in sorted(glob.glob(word))]
        elif word and "/" not in word:
            places += sorted(below.glob(f"*/{glob.escape(word)}"))
        runs: list[Path] = []
        for place in places:
            runs += [run for run in _runs_in(place, DEPTH) if run not in runs]
            if runs and not glob.has_magic(word):
                break
        if not runs:
            raise UserError(
                f"runs: there is no run at {word}: give a run's folder, a folder of runs, a glob "
                f"such as '{below}/*/*', or a name in {below}"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Whether a run has written into it, however little."""
    return any((folder / mark).is_file() for mark in MARKS)


def _runs_in(folder: Path, depth: int) -> list[Path]:
    if not folder.is_dir():
        return []
    if is_run(folder):
        return [folder]
    if not depth:
        return []
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [run for p in inner for run in _runs_in(p, depth - 1)]


def _labels(runs: Sequence[Path]) -> list[str]:
    """As short as tells them apart: the paths without what they have in common."""
    paths = [run.resolve() for run in runs]
    if len(set(paths)) == 1:
        return [paths[0].name] * len(paths)
    common = Path(os.path.commonpath(paths))
    return [str(p.relative_to(common)) if p != common else p.name for p in paths]


def _read_run(run: Path, label: str, page_folder: Path) -> dict[str, Any]:
    notes: list[str] = []
    result = read_result(run / "result.json", notes)
    metrics = read_metrics(run / "csv" / "metrics.csv")
    steps = [step for series in metrics.values() for step in series]
    samples = read_samples(run / "samples.jsonl", notes)
    best_step, best = _best(metrics.get("val/perplexity", {}))
    base = mapping(result.get("base")).get("val/perplexity")
    if base is None:
        base = mapping(_start(run).get("base")).get("val/perplexity")
    status = result.get("status")
    if status not in ("finished", "interrupted", "failed"):
        status = "unfinished" if steps else "nothing logged"
    checkpoint = _checkpoint(run, best_step)
    own_page = run / "report.html"
    model = mapping(result.get("model"))
    return {
        "label": label,
        "link": _link(own_page, page_folder) if own_page.is_file() else "",
        "status": status,
        "notes": notes,
        "metrics": metrics,
        "config": _config(run, notes),
        "samples": {str(s.get("prompt", "")): s for s in samples},
        "base": base if is_number(base) else None,
        "best": best,
        "change": percent_change(base, best),
        "best_step": None if best_step is None else best_step + 1,  # logged one earlier
        "checkpoint": checkpoint and str(checkpoint.relative_to(run)),
        "checkpoint_link": checkpoint and _link(checkpoint, page_folder),
        "steps": result.get("steps") if is_number(result.get("steps")) else _last(steps),
        "seconds": result.get("seconds"),
        "speed": _median(metrics.get("perf/tokens_per_sec", {})),
        "memory": max(_finite(metrics.get("perf/peak_mem_gib", {})), default=None),
        "trainable": model.get("trainable"),
    }


def _start(run: Path) -> dict[str, Any]:
    try:
        return mapping(json.loads(read(run / "start.json") or "{}"))
    except ValueError:
        return {}


def _config(run: Path, notes: list[str]) -> dict[str, Any]:
    text = read(run / "config.yaml")
    try:
        config = yaml.safe_load(text or "{}")
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        notes.append("config.yaml could not be read")
        return {}
    if not text:
        notes.append("there is no config.yaml")
    return _flat(config)


def _flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in values.items():
        path = f"{prefix}{key}"
        flat |= _flat(inner, f"{path}.") if isinstance(inner, dict) and inner else {path: inner}
    return flat


def _finite(series: Series) -> list[float]:
    return [v for v in series.values() if math.isfinite(v)]


def _median(series: Series) -> float | None:
    values = _finite(series)
    return float(np.median(values)) if values else None


def _last(steps: list[float]) -> float | None:
    return max(steps) + 1 if steps else None


def _best(series: Series) -> tuple[int | None, float | None]:
    """Step and value of the lowest perplexity, the earlier of two equals."""
    finite = {step: v for step, v in series.items() if math.isfinite(v)}
    if not finite:
        return None, None
    step = min(finite, key=lambda s: (finite[s], s))
    return int(step), finite[step]


def _checkpoint(run: Path, logged_step: int | None) -> Path | None:
    """Of the best validation, if it is still there."""
    if logged_step is None:
        return None
    name = f"step-{logged_step + 1:08d}"
    places = (run / "checkpoints" / name, run / "checkpoints" / f"{name}.ckpt")
    return next((place for place in places if place.exists()), None)


def _link(path: Path, page_folder: Path) -> str:
    return quote(os.path.relpath(path.resolve(), page_folder))


def _differences(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings in which the runs differ, as a table whose longer side goes down."""
    known = [run for run in runs if run["config"]]
    keys = list(dict.fromkeys(key for run in known for key in run["config"] if key not in OWN))
    shown = {key: [_shown(run["config"], key) for run in known] for key in keys}
    shown = {key: cells for key, cells in shown.items() if len(set(cells)) > 1}
    table: dict[str, Any] = {"keys": list(shown), "n": len(known)}
    if len(known) > max(3, len(shown)):
        table["head"] = [{"text": key} for key in shown]
        table["rows"] = [
            ({"run": run}, [cells[i] for cells in shown.values()]) for i, run in enumerate(known)
        ]
    else:
        table["head"] = [{"run": run} for run in known]
        table["rows"] = [({"text": key}, cells) for key, cells in shown.items()]
    return table


def _shown(config: dict[str, Any], key: str) -> str:
    if key not in config:
        return "—"
    setting = config[key]
    return setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)


def _side_by_side(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each prompt with what each run makes of it, and what the base did where all agree on that."""
    prompts = list(dict.fromkeys(prompt for run in runs for prompt in run["samples"]))
    found = []
    for prompt in prompts:
        having = [run for run in runs if prompt in run["samples"]]
        before = {str(run["samples"][prompt].get("before") or "") for run in having}
        found.append(
            {
                "prompt": prompt,
                "before": before.pop() if len(before) == 1 else "",
                "after": [(run, str(run["samples"][prompt].get("after") or "")) for run in having],
            }
        )
    return found


def _figure(plot: Plot, runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One column of all runs; None if no run has it."""
    curves: list[Curve] = []
    last_step, ends = 0.0, []
    for run in runs:
        series = run["metrics"].get(plot.column, {})
        points = [(x, y) for x, y in series.items() if math.isfinite(y)]
        if not points:
            continue
        x, y = (np.array(numbers) for numbers in zip(*points, strict=True))
        last_step = max(last_step, float(x[-1]))
        style = line_style(run["index"]) | {"gid": f"run-{run['index']}"}
        if len(y) == 1:
            style["marker"] = "o"
        half = len(y) // 50 if plot.smoothed else 0
        curves.append((*(running_median(x, y, half) if half else thinned(x, y)), style))
        ends.append(f"{run['label']} {value(float(y[-1]))}")
    if not curves:
        return None
    log = needs_log(plot, curves)
    notes = ["medians"] * any(len(r["metrics"].get(plot.column, {})) >= 50 for r in runs)
    notes = notes * plot.smoothed + ["log scale"] * log
    return {
        "title": plot.title,
        "caption": ", ".join(notes),
        "description": f"{plot.title} by step; last of each run: {'; '.join(ends)}",
        "svg": draw(plot, curves, np.array([]), last_step, log),
    }
