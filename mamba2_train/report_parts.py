"""What the pages about runs are made of: a run folder's files, numbers as text, plots as SVG.

Plots are drawn in placeholder colours that are then exchanged for the template's CSS variables, so
that they follow light, dark and print. Every input may be missing, empty or torn by a crash.
"""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import ChainableUndefined, Environment, FunctionLoader, Template
from markupsafe import Markup

Series = dict[float, float]  # step -> value, steps ascending
Curve = tuple[np.ndarray, np.ndarray, dict[str, Any]]  # x, y, how it is drawn

LINE, BASE, BAD, AXIS, GRID = "#fe0001", "#fe0002", "#fe0003", "#fe0004", "#fe0005"
RUNS = tuple(f"#fd000{i}" for i in range(8))  # of several runs, in turn
CSS_VARIABLES = {LINE: "line", BASE: "base", BAD: "bad", AXIS: "muted", GRID: "rule"}
CSS_VARIABLES |= {color: f"run-{i}" for i, color in enumerate(RUNS)}
# told apart without colours too
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.2)), (0, (7, 1.5, 1.5, 1.5)))
MAX_POINTS = 500  # of a drawn curve; a raw one has twice as many, the extremes of each bucket
LOG_FROM = 30.0  # highest over lowest value


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
    Plot("perf/peak_mem_gib", "Peak memory (GiB)", from_zero=True),
)


def template(name: str) -> Template:
    """Of the embedded pages, with the filters `value`, `compact` and `duration`."""
    assets = resources.files("mamba2_train.assets")
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=ChainableUndefined,
        loader=FunctionLoader(lambda file: assets.joinpath(file).read_text(encoding="utf-8")),
    )
    environment.filters |= {f.__name__: _or_words(f) for f in (value, compact, duration)}
    return environment.get_template(name)


def value(number: float) -> str:
    """Four significant digits, trailing zeros among them; whole from a thousand on."""
    if number == 0 or 1e3 <= abs(number) < 1e9:
        return f"{number:,.0f}"
    return f"{number:#.4g}".rstrip(".")


def compact(number: float) -> str:
    """Three significant digits and a unit from a million on: `640`, `13.8 M`, `1.34 B`."""
    for unit, letter in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """The two largest units: `2 d 3 h`, `1 h 12 min`, `5 min 3 s`; tenths below ten seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    (hours, minutes), rest = divmod(round(seconds) // 60, 60), round(seconds) % 60
    amounts = [(hours // 24, "d"), (hours % 24, "h"), (minutes, "min"), (rest, "s")]
    while not amounts[0][0]:
        del amounts[0]
    return " ".join(f"{amount} {unit}" for amount, unit in amounts[:2] if amount)


def _or_words(form: Callable[[float], str]) -> Callable[[Any], str]:
    """`form` for whatever a file may hold in a number's place."""

    def checked(number: Any) -> str:
        if not is_number(number):
            return ""
        return form(number) if math.isfinite(number) else "not finite"

    return checked


def is_number(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool)


def mapping(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else {}


def percent_change(before: Any, after: Any) -> float | None:
    if not (is_number(before) and is_number(after) and before > 0):
        return None
    change = 100 * (after / before - 1)
    return change if math.isfinite(change) else None


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_result(path: Path, notes: list[str]) -> dict[str, Any]:
    text = read(path)
    try:
        result = json.loads(text or "{}")
    except ValueError as error:
        result = error
    if not isinstance(result, dict):
        notes.append(f"{path.name} could not be read: {result}")
    return mapping(result)


def read_samples(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    samples = []
    # not splitlines: a sample may hold U+2028, which JSON leaves as it is
    for number, line in enumerate(read(path).split("\n"), start=1):
        try:
            samples.append(dict(json.loads(line or "{}")))
        except (TypeError, ValueError):
            notes.append(f"{path.name}: line {number} could not be read")
    return [sample for sample in samples if sample]


def read_metrics(path: Path) -> dict[str, Series]:
    """Column -> readings. Of two rows with one step the first counts: the evaluation of the best
    weights, after the last step, is logged at that step too."""
    metrics: dict[str, Series] = {}
    for row in csv.DictReader(io.StringIO(read(path), newline="")):
        cells = {column: _parsed(cell) for column, cell in row.items()}
        step = cells.pop("step", None)
        if step is None or not math.isfinite(step):
            continue
        for column, number in cells.items():
            if number is not None:
                metrics.setdefault(column, {}).setdefault(step, number)
    return {column: dict(sorted(series.items())) for column, series in metrics.items()}


def _parsed(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):  # an empty cell, a torn row
        return None


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each bucket, so that spikes survive."""
    if len(x) <= 2 * MAX_POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for low, high in itertools.pairwise(np.linspace(0, len(x), MAX_POINTS + 1).astype(int)):
        keep |= {low + int(y[low:high].argmin()), low + int(y[low:high].argmax())}
    index = sorted(keep)
    return x[index], y[index]


def running_median(x: np.ndarray, y: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Median over `half` readings to either side, or those that exist: a spike leaves no trace."""
    centres = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).astype(int))
    return x[centres], np.array([np.median(y[max(0, c - half) : c + half + 1]) for c in centres])


def line_style(index: int) -> dict[str, Any]:
    """How the curve number `index` of several is drawn: no two of the first 32 alike."""
    dash = DASHES[(index + index // len(RUNS)) % len(DASHES)]
    return {"color": RUNS[index % len(RUNS)], "linestyle": dash, "linewidth": 1.8}


def legend(index: int) -> dict[str, Any]:
    """`color` and `dash` of that curve, for the template's macro `line`."""
    dash = line_style(index)["linestyle"]
    shown = "" if dash == "-" else " ".join(f"{2 * length:g}" for length in dash[1])
    return {"color": index % len(RUNS), "dash": shown}


def needs_log(plot: Plot, curves: list[Curve]) -> bool:
    drawn = np.concatenate([y for _, y, _ in curves])
    low, high = float(drawn.min()), float(drawn.max())
    return not plot.from_zero and low > 0 and high / low > LOG_FROM


def draw(
    plot: Plot, curves: list[Curve], bad_steps: np.ndarray, last_step: float, log: bool
) -> Markup:
    """The plot as an `<svg>` element whose colours are CSS variables and whose ids are its own."""
    import matplotlib.style  # here: only this function needs it, and it is slow to load
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    name = re.sub(r"\W", "-", plot.column)
    ours = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.5}
    with matplotlib.style.context(["default", ours]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(400 / 72, 215 / 72))
        axes = figure.add_axes((0.12, 0.13, 0.86, 0.83))
        for x, y, style in curves:
            axes.plot(x, y, **style)
        floor = np.full(len(bad_steps), 0.03)
        axes.plot(bad_steps, floor, "|", color=BAD, transform=axes.get_xaxis_transform())

        end = max(last_step, 1)  # one step axis for all plots, so that they can be compared
        axes.set_xlim(-0.02 * end, 1.02 * end)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        low, high = min(y.min() for _, y, _ in curves), max(y.max() for _, y, _ in curves)
        if plot.from_zero and low >= 0 and high > 0:
            axes.set_ylim(0, 1.08 * high)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 1e3 else (1,)))
            axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda tick, _: _tick(tick)))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=AXIS, length=0, pad=5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)

    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the DTD's address
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for placeholder, variable in CSS_VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return Markup(svg)


def _tick(number: float) -> str:
    size = abs(number)
    if size >= 1e9 or 0 < size < 1e-3:
        mantissa, exponent = f"{number:.5e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    elif size >= 1e6:
        text = f"{number / 1e6:g}M"
    elif size >= 1e4:
        text = f"{number / 1e3:g}k"
    else:
        text = f"{number:g}"
    return text.replace("-", "−")
