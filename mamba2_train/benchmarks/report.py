"""BENCHMARKS.md, its plots and the figures as JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mamba2_kernels.benchmark import machine as cpu
from mamba2_train.benchmarks.pair import Result

PLOTS = Path("docs/benchmarks")  # below the folder that BENCHMARKS.md is in

# what `make bench` cannot measure on every machine stays as it is
KEPT = "<!-- What follows is written by hand; `make bench` keeps it. -->"

INTRODUCTION = """\
# Benchmarks

Written by `make bench`. Ours is `mamba2-train`; theirs is transformers' Mamba2ForCausalLM with
peft's adapter under TRL's SFTTrainer, in PyTorch code on a CPU, as ours. Both read the same
weights, the same first adapter and the same rows, with AdamW, a constant learning rate and the norm
of the gradient clipped at 1. Each side is a process; the two step in turn, each repetition starts
both anew, and the first step of each does not count. peft refuses LoRA on `out_proj`: here that
guard is lifted.

Where the losses of any step differ by more than the tolerance, no time is reported.
"""

READING = """\
tokens/s: median, with lowest and highest, of the tokens that are learned from. CPU: seconds of all
cores to a token, theirs over ours. Memory: the highest resident set (VmHWM) of a step, less what is
there between steps but for gradients and the optimizer's state: above the weights and libraries.
"""


def machine() -> dict[str, str]:
    found = {"cpu": cpu()}
    for name in ("torch", "transformers", "peft", "trl", "lightning", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def table(results: list[Result]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| workload | ours, tokens/s | theirs, tokens/s | faster | CPU | ours, MB | theirs, MB "
        "| memory | losses differ by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        title = r.workload.title
        if r.failure is not None:
            lines.append(f"| {title} | {r.failure} | | | | | | | |")
            continue
        o, p = r.ours, r.peer
        cells = [
            title,
            *(_rate(side.rate, side.spread) for side in (o, p)),
            f"**{o.rate / p.rate:.1f}x**",
            f"{p.cpu_per_token / o.cpu_per_token:.1f}x",
            *(f"{side.peak / 1e6:,.0f}" for side in (o, p)),
            f"{o.peak / p.peak:.0%}",
            f"{r.difference:.1g} ({r.workload.tolerance:g})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rate(median: float, spread: tuple[float, float]) -> str:
    low, high = spread
    return f"{median:,.0f} ({low:,.0f}–{high:,.0f})"


def write(out: Path, results: list[Result], others: dict[str, Any]) -> None:
    """
    Args:
        others: what `profiles`, `lengths`, `startup` and `scan` have measured, by their names;
            and what is to be known of the `machine`.
    """
    folder = out / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    about = machine() | others.get("machine", {})
    found = {**others, "machine": about, "workloads": [as_json(r) for r in results]}
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [INTRODUCTION, *(f"- {k}: {v}" for k, v in about.items()), "", *table(results)]
    lines += ["", READING]
    good = [r for r in results if r.failure is None]
    if good:
        plot_pairs(good, folder / "speed.svg", folder / "memory.svg")
        lines += [f"![tokens per second]({PLOTS}/speed.svg)", f"![memory]({PLOTS}/memory.svg)", ""]
    sections: dict[str, Callable[[Any], list[str]]] = {
        "profiles": _profiles,
        "lengths": _lengths,
        "startup": _startup,
        "scan": _scan,
    }
    for name, section in sections.items():
        if name in others:
            lines += section(others[name])
    if "lengths" in others:
        plot_lengths(others["lengths"], folder / "lengths.svg")
    page = out / "BENCHMARKS.md"
    kept = page.read_text().partition(KEPT)[2] if page.exists() else ""
    page.write_text("\n".join(lines).rstrip() + "\n\n" + KEPT + (kept or "\n"))


def as_json(r: Result) -> dict[str, Any]:
    return asdict(r) | {"losses_differ_by": None if r.failure else r.difference}


def _profiles(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    lines = ["## Where a step's time goes", ""]
    lines += ["Seconds of one step by kind of operation, PyTorch's profiler.", ""]
    for title, sides in found.items():
        ours, peer = sides["ours"], sides["peer"]
        lines += [f"| {title} | ours | theirs |", "|---|---|---|"]
        for kind in peer:
            lines.append(
                f"| {kind} | {ours[kind]:.3f} ({ours[kind] / sum(ours.values()):.0%}) "
                f"| {peer[kind]:.3f} ({peer[kind] / sum(peer.values()):.0%}) |"
            )
        totals = (f"{sum(side.values()):.3f}" for side in (ours, peer))
        lines += [f"| all | {' | '.join(totals)} |", ""]
    return lines


def _lengths(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Long rows", "", "Tiny shape, `long_context=exact` in segments of 2,048 tokens,"]
    lines += ["`model.checkpointing=full`, fp32, one thread; one step, above the weights.", ""]
    lines += ["| tokens | CPU ms/token | MB | of them states |", "|---|---|---|---|"]
    for r in rows:
        per_token = 1e3 * r["seconds"] / r["tokens"]
        states = r["states"] / 1e6
        lines.append(
            f"| {r['tokens']:,} | {per_token:.2f} | {r['peak'] / 1e6:.0f} | {states:.1f} |"
        )
    return [*lines, "", f"![time and memory by length]({PLOTS}/lengths.svg)", ""]


def _startup(s: dict[str, Any]) -> list[str]:
    lines = ["## Start-up", ""]
    if "failure" in s:
        return [*lines, s["failure"], ""]
    ratio = s["slowest"] / s["median"]
    return [
        *lines,
        f"`mamba2-train` on the embedded base: {s['first']:.1f} s from the start of the process to "
        f"the end of its first step ({s['first_cpu']:.1f} s of CPU), the base's evaluation and "
        f"samples included. Of the {s['steps']} steps that follow the slowest takes {ratio:.2f} "
        f"times the median, {s['median']:.3f} s.",
        "",
    ]


def _scan(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## The scan alone",
        "",
        "fp32, beside transformers' PyTorch code, both checked first.",
    ]
    lines += ["", "| shape | pass | ours, ms | theirs, ms | faster |", "|---|---|---|---|---|"]
    for r in rows:
        if "failure" in r:
            lines.append(f"| {r['shape']} | {r['failure']} | | | |")
            continue
        cells = [r["shape"], r["pass"], f"{1e3 * r['ours']:.1f}", f"{1e3 * r['peer']:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {r['peer'] / r['ours']:.1f}x |")
    return [*lines, ""]


def plot_pairs(results: list[Result], speed: Path, memory: Path) -> None:
    """Bars of both sides, on a logarithmic scale: workloads differ a hundredfold."""
    titles = [r.workload.title for r in results]
    rates = [(r.ours.rate, r.peer.rate) for r in results]
    peaks = [(r.ours.peak / 1e6, r.peer.peak / 1e6) for r in results]
    _bars(titles, rates, "tokens per second", speed)
    _bars(titles, peaks, "MB above the weights", memory)


def _bars(titles: list[str], pairs: list[tuple[float, float]], label: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(titles) + 1.2), layout="constrained")
    axes = figure.subplots()
    for i, (ours, theirs) in enumerate(pairs):
        for offset, value, colour in ((-0.2, ours, "#1f6fb4"), (0.2, theirs, "#c8c8c8")):
            axes.barh(i + offset, value, 0.38, color=colour)
            axes.annotate(
                f"{value:,.0f}", (value, i + offset), (3, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
    axes.set_yticks(range(len(titles)), titles, fontsize=8)
    axes.set(xscale="log", xlabel=f"{label} (blue: ours, grey: transformers + peft + TRL)")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def plot_lengths(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    tokens = [r["tokens"] for r in rows]
    time.plot(tokens, [1e3 * r["seconds"] / r["tokens"] for r in rows], "o-", color="#1f6fb4")
    memory.plot(tokens, [r["peak"] / 1e6 for r in rows], "o-", color="#1f6fb4")
    for axes, label in ((time, "CPU ms per token"), (memory, "MB above the weights")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
        axes.set(xlabel="tokens in a row", ylabel=label, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
