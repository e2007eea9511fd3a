"""A run folder as one HTML page: what was trained, how it went, and how to do it again.

    csv/metrics.csv + config.yaml + result.json + samples.jsonl -> report.html

The page loads nothing and runs nothing. It shows what there is and says what it could not read.
Equal inputs give equal bytes. `compare` makes one page of several runs.
"""

import math
import re
import statistics
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from mamba2_train.comparison import compare
from mamba2_train.errors import UserError
from mamba2_train.report_parts import (
    BASE,
    LINE,
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

__all__ = ["compare", "write_report"]


# title, and which columns it draws: the group in its expression is what a curve is called
FAMILIES = (
    ("Gradient norms by kind", r"grad_norm/(.+)"),
    ("Adapters over weights, ||alpha / r B A|| / ||W||", r"lora_share/(.+)"),
    ("Median decay by layer, exp(dt A)", r"decay/(layer_\d+)_p50"),
    ("Median dt by layer", r"dt/(layer_\d+)_p50"),
)
MOST_CURVES = 8  # of layers, evenly spread


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, one self-contained page about the run, and return its path.

    Reads `csv/metrics.csv`, `config.yaml`, `result.json` and `samples.jsonl` where they exist.

    Raises:
        UserError: `run_dir` is not a folder.
    """
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder at {run_dir}: give the folder that a run wrote")
    notes: list[str] = []
    result = read_result(run_dir / "result.json", notes)
    samples = read_samples(run_dir / "samples.jsonl", notes)
    metrics = read_metrics(run_dir / "csv" / "metrics.csv")
    steps = sorted({step for series in metrics.values() for step in series})
    validated = max(metrics.get("val/perplexity", {}), default=0.0)
    base = _validation(metrics, 0.0) | mapping(result.get("base"))
    final = _validation(metrics, validated or None) | mapping(result.get("final"))
    finite = {c: [v for v in s.values() if math.isfinite(v)] for c, s in metrics.items()}
    speed, mfu, memory = (
        finite.get(f"perf/{name}") for name in ("tokens_per_sec", "mfu", "peak_mem_gib")
    )

    page = template("report.html.jinja").render(
        name=result.get("name") or run_dir.resolve().name,
        result=result,
        notes=notes,
        base=base,
        final=final,
        change=percent_change(base.get("val/perplexity"), final.get("val/perplexity")),
        last_step=steps[-1] if steps else None,
        speed=statistics.median(speed) if speed else None,
        mfu=statistics.median(mfu) if mfu else None,
        memory=max(memory) if memory else None,
        figures=[
            _figure(plot, metrics[plot.column], steps[-1], base.get("val/perplexity"))
            for plot in PLOTS
            if plot.column in metrics
        ],
        health=[
            figure
            for title, columns in FAMILIES
            if (figure := _family(title, columns, metrics, steps[-1] if steps else 0)) is not None
        ],
        missing=[
            plot.title[0].lower() + plot.title[1:] for plot in PLOTS if plot.column not in metrics
        ],
        samples=samples,
        files=_files(run_dir, mapping(result.get("outputs"))),
        config=read(run_dir / "config.yaml"),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace", newline="\n")  # lone surrogates: "?"
    return path


def _validation(metrics: dict[str, Series], step: float | None) -> dict[str, Any]:
    columns = ("val/loss", "val/perplexity")
    return {c: metrics[c][step] for c in columns if step in metrics.get(c, {})}


def _files(run_dir: Path, outputs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, path, and a link where the path lies in the run folder."""
    own = ("config.yaml", "csv/metrics.csv", "result.json", "samples.jsonl")
    found = {Path(path).stem: path for path in own if (run_dir / path).is_file()}
    rows = []
    for label, path in (outputs | found).items():
        inside = not Path(str(path)).is_absolute() and (run_dir / str(path)).exists()
        rows.append((label, str(path), f"./{quote(str(path))}" if inside else ""))
    return rows


def _family(
    title: str, expression: str, metrics: dict[str, Series], last_step: float
) -> dict[str, Any] | None:
    """Several columns in one figure; None if there is none of them."""
    found = []
    for column, series in metrics.items():
        match = re.fullmatch(expression, column)
        points = [(x, y) for x, y in series.items() if math.isfinite(y)]
        if match and points:
            found.append((match[1].replace("layer_", "layer "), points))
    found.sort(key=lambda curve: curve[0])
    if not found:
        return None
    if r"\d" in expression and len(found) > MOST_CURVES:
        kept = np.linspace(0, len(found) - 1, MOST_CURVES).round().astype(int)
        title += f": {MOST_CURVES} of {len(found)}"
        found = [found[i] for i in kept]
    curves: list[Curve] = []
    for i, (_, points) in enumerate(found):
        x, y = (np.array(numbers) for numbers in zip(*points, strict=True))
        marker = {"marker": "o", "markersize": 4} if len(y) <= 25 else {}
        curves.append((*thinned(x, y), line_style(i) | marker))
    plot = Plot(expression, title)
    lasts = "; ".join(f"{label} {value(float(p[-1][1]))}" for label, p in found)
    return {
        "title": title,
        "legend": [(label, legend(i)) for i, (label, _) in enumerate(found)],
        "description": f"{title}, by step; last of each: {lasts}",
        "svg": draw(plot, curves, np.array([]), last_step, needs_log(plot, curves)),
    }


def _figure(plot: Plot, series: Series, last_step: float, base: Any) -> dict[str, Any]:
    """Title, caption, description and drawing of one column."""
    steps, values = np.array(list(series)), np.array(list(series.values()))
    finite = np.isfinite(values)
    n_bad = len(values) - int(finite.sum())
    bad = f"{n_bad:,} of {len(values):,} not finite" if n_bad else ""
    if n_bad == len(values):
        return {"title": plot.title, "bad": bad}
    x, y = steps[finite], values[finite]
    caption = [f"last {value(y[-1])}"]
    curves: list[Curve] = []
    if plot.column == "val/perplexity" and is_number(base) and math.isfinite(base):
        style = {"color": BASE, "linestyle": (0, (4, 3)), "linewidth": 1.4}
        curves.append((np.array([0.0, last_step]), np.array([base, base]), style))
        caption.append(f"dashed: base model, {value(base)}")
    half_window = len(y) // 50 if plot.smoothed else 0
    if half_window:
        curves.append((*thinned(x, y), {"color": LINE, "linewidth": 0.9, "alpha": 0.35}))
        curves.append((*running_median(x, y, half_window), {"color": LINE, "linewidth": 2}))
        caption.append(f"bold: median of {2 * half_window + 1:,} readings")
    else:
        marker = {"marker": "o", "markersize": 4} if len(y) <= 25 else {}
        curves.append((*thinned(x, y), {"color": LINE, "linewidth": 1.6, **marker}))
    log = needs_log(plot, curves)
    if log:
        caption.append("log scale")
    return {
        "title": plot.title,
        "bad": bad,
        "caption": ", ".join(caption),
        "description": f"{plot.title} by step, {len(y)} readings: first {value(y[0])}, lowest "
        f"{value(y.min())}, highest {value(y.max())}, last {value(y[-1])}",
        "svg": draw(plot, curves, steps[~finite], last_step, log),
    }
