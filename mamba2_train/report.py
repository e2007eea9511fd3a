"""A run folder as one HTML page: what was trained, how it went, and how to do it again.

    csv/metrics.csv + config.yaml + result.json + samples.jsonl -> report.html

The page loads nothing and runs nothing: plots are inline SVG, drawn in placeholder colours that
are then exchanged for the template's CSS variables, so that they follow light, dark and print.
Every input may be missing, empty or torn by a crash; the page shows what there is and says what
it could not read. Equal inputs give equal bytes.
"""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from mamba2_train.errors import UserError

Series = dict[float, float]  # step -> value, ascending

LINE, BASE, BAD, AXIS, GRID = "#fe0001", "#fe0002", "#fe0003", "#fe0004", "#fe0005"
CSS_COLOURS = {
    LINE: "var(--line)",
    BASE: "var(--base)",
    BAD: "var(--bad)",
    AXIS: "currentColor",
    GRID: "var(--rule)",
}
MAX_BUCKETS = 500  # of drawn points; each keeps its lowest and its highest, so spikes survive
LOG_SCALE_FROM = 30.0  # highest over lowest value
SMOOTHED_SHARE = 25  # the smoothed line averages over 1/25 of the readings


class Plot(NamedTuple):
    """One figure of the page: a column of the metrics, its title, and how it is drawn."""

    column: str
    title: str
    smoothed: bool = False
    from_zero: bool = False


PLOTS = (
    Plot("train/loss", "Training loss", smoothed=True),
    Plot("val/perplexity", "Held-out perplexity"),
    Plot("train/lr", "Learning rate", from_zero=True),
    Plot("train/grad_norm", "Gradient norm", smoothed=True),
    Plot("perf/tokens_per_sec", "Tokens per second", from_zero=True),
    Plot("perf/peak_mem_gib", "Peak memory, GiB", from_zero=True),
)


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, one self-contained page about the run, and return its path.

    Reads `csv/metrics.csv`, `config.yaml`, `result.json` and `samples.jsonl` where they exist.

    Raises:
        UserError: `run_dir` is not a folder.
    """
    if not run_dir.is_dir():
        raise UserError(f"There is no run folder at {run_dir}: give the folder a run has written.")
    notes: list[str] = []
    metrics = _read_metrics(run_dir / "csv" / "metrics.csv")
    result = _read_result(run_dir / "result.json", notes)
    samples = _read_samples(run_dir / "samples.jsonl", notes)
    config = run_dir / "config.yaml"
    base, final = _validation(result, "base", metrics), _validation(result, "final", metrics)

    last_step = max((step for series in metrics.values() for step in series), default=0.0)
    drawn = [plot for plot in PLOTS if metrics.get(plot.column)]
    template = resources.files("mamba2_train.assets").joinpath("report.html.jinja")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        name=result.get("name") or run_dir.resolve().name,
        status=result.get("status") or "no result yet",
        notes=notes,
        headline=_headline(result, metrics, base, final),
        figures=[_figure(plot, metrics[plot.column], last_step, base) for plot in drawn],
        missing=[plot.title.split(",")[0].lower() for plot in PLOTS if plot not in drawn],
        samples=samples,
        facts=_facts(result),
        command=result.get("command"),
        next=result.get("next"),
        files=_files(run_dir, _section(result, "outputs")),
        versions=_section(result, "versions"),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace", newline="\n")  # lone surrogates: "?"
    return path


def _read_metrics(path: Path) -> dict[str, Series]:
    """Column -> readings. Where a resumed run logged a step again, the later row counts."""
    metrics: dict[str, Series] = {}
    if not path.is_file():
        return metrics
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            step = _parsed(row.get("step"))
            if step is None or not math.isfinite(step):
                continue
            for column, cell in row.items():
                value = _parsed(cell)
                if value is not None:
                    metrics.setdefault(column, {})[step] = value
    return {column: dict(sorted(series.items())) for column, series in metrics.items()}


def _parsed(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):  # an empty cell, a word, a torn row
        return None


def _read_result(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path.name} could not be read: {error}.")
        return {}
    if isinstance(result, dict):
        return result
    notes.append(f"{path.name} could not be read: it holds a {type(result).__name__}.")
    return {}


def _read_samples(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    if not path.is_file():
        return samples
    # not splitlines: a sample may hold U+2028, which JSON leaves as it is
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except ValueError:
            sample = None
        if isinstance(sample, dict):
            samples.append(sample)
        else:
            notes.append(f"{path.name}: line {number} could not be read.")
    return samples


def _section(result: dict[str, Any], key: str) -> dict[str, Any]:
    section = result.get(key)
    return section if isinstance(section, dict) else {}


def _validation(
    result: dict[str, Any], key: str, metrics: dict[str, Series]
) -> dict[str, float | None]:
    """Loss and perplexity of "base" or "final": as the result has it, else as it was logged."""
    found = {}
    for column in ("val/loss", "val/perplexity"):
        logged = metrics.get(column, {})
        fallback = logged.get(0.0) if key == "base" else logged.get(max(logged, default=0.0) or -1)
        found[column] = _number(_section(result, key).get(column, fallback))
    return found


def _headline(
    result: dict[str, Any],
    metrics: dict[str, Series],
    base: dict[str, float | None],
    final: dict[str, float | None],
) -> list[dict[str, str]]:
    """The row of figures: label, value, detail, and whether the value is good or bad news."""
    before, after = base["val/perplexity"], final["val/perplexity"]
    change, tone = "", ""
    if before and after and math.isfinite(before) and math.isfinite(after):
        percent = 100 * (after / before - 1)
        change = f"{percent:+.1f} %".replace("-", "−")
        tone = "bad" if percent > 0 else "good"
    losses = _arrow(base["val/loss"], final["val/loss"])
    speed = _finite(metrics, "perf/tokens_per_sec")
    mfu = _finite(metrics, "perf/mfu")
    memory = _finite(metrics, "perf/peak_mem_gib")
    model = _section(result, "model")
    parameters, trainable = _number(model.get("parameters")), _number(model.get("trainable"))
    logged = max(metrics.get("train/loss", {}), default=None)
    steps = _number(result.get("steps", logged))
    seen = _number(result.get("tokens_seen"))
    rows = [
        ("Held-out perplexity", _arrow(before, after), change, tone),
        ("Held-out loss", losses, "", ""),
        ("Steps", _show(steps, _count), _show(seen, "{:,.0f} tokens".format), ""),
        ("Time", _show(_number(result.get("seconds")), _duration), "", ""),
        (
            "Tokens per second",
            _count(statistics.median(speed)) if speed else "",
            f"median, MFU {100 * statistics.median(mfu):.1f} %" if mfu else "median",
            "",
        ),
        ("Peak memory", f"{max(memory):.3g} GiB" if memory else "", "", ""),
        (
            "Trainable parameters",
            _show(trainable, _count),
            f"{100 * trainable / parameters:.3g} % of {_count(parameters)}"
            if trainable is not None and parameters
            else "",
            "",
        ),
    ]
    keys = ("label", "value", "detail", "tone")
    return [dict(zip(keys, row, strict=True)) for row in rows if row[1]]


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    model, data = _section(result, "model"), _section(result, "data")

    def size(split: str) -> str:
        documents, tokens = (
            _number(data.get(f"{split}_{unit}")) for unit in ("documents", "tokens")
        )
        parts = [
            _show(documents, "{:,.0f} documents".format),
            _show(tokens, "{:,.0f} tokens".format),
        ]
        return ", ".join(part for part in parts if part)

    rows = [
        ("Model", str(model.get("source") or "")),
        ("Training data", size("train")),
        ("Held-out data", size("val")),
        ("Device", str(result.get("device") or "")),
        ("Started", str(result.get("started") or "").replace("T", " ")),
    ]
    return [row for row in rows if row[1]]


def _files(run_dir: Path, outputs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, path, and a link where the path lies in the run folder."""
    own = {"config": "config.yaml", "metrics": "csv/metrics.csv", "result": "result.json"}
    own["samples"] = "samples.jsonl"
    present = {label: path for label, path in own.items() if (run_dir / path).is_file()}
    rows = []
    for label, path in {**outputs, **present}.items():
        inside = not Path(str(path)).is_absolute() and (run_dir / str(path)).exists()
        rows.append((label, str(path), f"./{quote(str(path))}" if inside else ""))
    return rows


def _figure(
    plot: Plot, series: Series, last_step: float, base: dict[str, float | None]
) -> dict[str, Any]:
    """Title, caption, description and drawing of one column."""
    steps, values = np.array(list(series)), np.array(list(series.values()))
    finite = np.isfinite(values)
    n_bad = int((~finite).sum())
    bad = f"{n_bad} of {len(values)} readings not finite" if n_bad else ""
    figure = {"title": plot.title, "bad": bad, "caption": "", "description": "", "svg": None}
    if not finite.any():
        return figure
    x, y = steps[finite], values[finite]
    reference = base["val/perplexity"] if plot.column == "val/perplexity" else None
    if reference is not None and not math.isfinite(reference):
        reference = None
    window = len(y) // SMOOTHED_SHARE if plot.smoothed else 0
    figure["caption"] = ", ".join(
        part
        for part in (
            f"last {_value(y[-1])}",
            f"dashed: base model, {_value(reference)}" if reference is not None else "",
            f"bold: mean of {window} readings" if window > 1 else "",
        )
        if part
    )
    figure["description"] = (
        f"{plot.title} by step: {len(y)} readings, first {_value(y[0])}, lowest "
        f"{_value(y.min())}, highest {_value(y.max())}, last {_value(y[-1])}"
    )
    figure["svg"] = _draw(plot, x, y, steps[~finite], last_step, window, reference)
    return figure


def _draw(
    plot: Plot,
    x: np.ndarray,
    y: np.ndarray,
    bad_steps: np.ndarray,
    last_step: float,
    window: int,
    reference: float | None,
) -> Markup:
    """The plot as an `<svg>` element whose colours are CSS variables and whose ids are its own."""
    import matplotlib.style  # here: it costs a second, and only this function needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    name = plot.column.replace("/", "-").replace("_", "-")
    own_style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.5}
    buffer = io.StringIO()
    with matplotlib.style.context(["default", own_style]):  # not the user's matplotlibrc
        figure = Figure(figsize=(400 / 72, 215 / 72))
        axes = figure.add_axes((0.12, 0.13, 0.86, 0.83))
        if reference is not None:
            axes.axhline(reference, color=BASE, linestyle=(0, (4, 3)), linewidth=1.4)
        marker = "o" if len(x) <= 25 else None
        if window > 1:
            axes.plot(*_thinned(x, y), color=LINE, linewidth=0.9, alpha=0.35)
            axes.plot(*_thinned(x, _smoothed(y, window)), color=LINE, linewidth=2)
        else:
            axes.plot(*_thinned(x, y), color=LINE, linewidth=1.6, marker=marker, markersize=4)
        axes.plot(
            bad_steps,
            np.full(len(bad_steps), 0.03),
            "|",
            color=BAD,
            transform=axes.get_xaxis_transform(),
        )

        # one step axis for all plots, so that they can be compared
        axes.set_xlim(-0.02 * max(last_step, 1), 1.02 * max(last_step, 1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
        if y.min() > 0 and y.max() / y.min() > LOG_SCALE_FROM and not plot.from_zero:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=7))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if plot.from_zero and y.min() >= 0 and y.max() > 0:
                axes.set_ylim(0, 1.08 * y.max())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(colors=AXIS, length=0, pad=5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.set_axisbelow(True)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)

    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the DTD's address
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for placeholder, colour in CSS_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return Markup(svg)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= 2 * MAX_BUCKETS:
        return x, y
    edges = np.linspace(0, len(x), MAX_BUCKETS + 1).astype(int)
    keep = {0, len(x) - 1}
    for low, high in zip(edges, edges[1:], strict=False):
        keep |= {low + int(y[low:high].argmin()), low + int(y[low:high].argmax())}
    index = sorted(keep)
    return x[index], y[index]


def _smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean; at both ends over the readings that exist."""
    kernel = np.ones(window)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")


def _finite(metrics: dict[str, Series], column: str) -> list[float]:
    return [value for value in metrics.get(column, {}).values() if math.isfinite(value)]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def _show(value: float | None, form: Callable[[float], str]) -> str:
    """`form(value)`; nothing for nothing, and a word for what is not finite."""
    if value is None:
        return ""
    return form(value) if math.isfinite(value) else "not finite"


def _arrow(before: float | None, after: float | None) -> str:
    return " → ".join(part for part in (_show(before, _value), _show(after, _value)) if part)


def _value(value: float) -> str:
    """Four significant digits, without an exponent for what a reader meets."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _count(value: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    """The two largest units: `2 d 3 h`, `1 h 12 min`, `5 min 3 s`; tenths below ten seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    rest, parts = round(seconds), []
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        amount, rest = divmod(rest, unit)
        if amount or parts:
            parts.append((amount, name))
    return " ".join(f"{amount} {name}" for amount, name in parts[:2] if amount)


def _tick(value: float) -> str:
    if abs(value) >= 1e4:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:g}".replace("-", "−")
