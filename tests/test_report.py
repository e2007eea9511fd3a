"""The report of a run: every figure on it recomputed here, and no input that stops it."""

import csv
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mamba2_train.errors import UserError
from mamba2_train.report import write_report

TITLES = [
    "Training loss",
    "Held-out perplexity",
    "Learning rate",
    "Gradient norm",
    "Tokens per second",
    "Peak memory (GiB)",
]
COLUMNS = [
    "epoch",
    "perf/mfu",
    "perf/peak_mem_gib",
    "perf/step_seconds",
    "perf/tokens_per_sec",
    "step",
    "train/grad_norm",
    "train/loss",
    "train/lr",
    "val/loss",
    "val/perplexity",
]
N_STEPS = 120
HOSTILE = "<script>alert('x')</script> & <img src=\"https://example.com/x.png\">"


class Page(HTMLParser):
    """Tags, attributes and text of a report; every element but void ones must be closed in turn."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.texts: dict[str, list[str]] = {}  # by the innermost tag
        self.figures: dict[str, str] = {}  # label of a headline figure -> value and detail
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open
        headline = re.search(r'<dl class="headline">(.*?)</dl>', self.source, re.DOTALL)
        for cell in re.findall(r"<div>(.*?)</div>", headline[1] if headline else "", re.DOTALL):
            label, *rest = re.findall(r">([^<>]+)</d[td]>", cell)
            self.figures[label] = " | ".join(rest)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def text(self) -> str:
        return "\n".join(t for tag, texts in self.texts.items() if tag != "style" for t in texts)

    def plots(self) -> list[str]:
        """Titles of the figures that hold a drawing."""
        figures = re.findall(r"<figure>(.*?)</figure>", self.source, re.DOTALL)
        return [re.search(r"<h3>(.*?)</h3>", f)[1] for f in figures if "<svg" in f]  # type: ignore[index]


def readings() -> list[dict[str, float]]:
    """Rows as CSVLogger writes them: validation apart from training."""
    rows: list[dict[str, float]] = []
    for step in range(N_STEPS + 1):
        if step:
            rows.append(
                {
                    "step": step,
                    "epoch": 0,
                    "train/loss": 2 + math.exp(-step / 40) + 0.1 * math.sin(7 * step),
                    "train/lr": 2e-4 * (1 - step / N_STEPS),
                    "train/grad_norm": 1 + 0.3 * math.cos(5 * step),
                    "perf/tokens_per_sec": 1000.0 + 37 * (step % 11),
                    "perf/mfu": 0.3 + 0.001 * (step % 7),
                    "perf/peak_mem_gib": 3 + 0.0125 * step,
                    "perf/step_seconds": 0.5,
                }
            )
        if step % 30 == 0:
            loss = 2 + math.exp(-step / 40)
            rows.append({"step": step, "val/loss": loss, "val/perplexity": math.exp(loss)})
    return rows


def write_csv(run: Path, rows: list[dict[str, float]], columns: list[str] = COLUMNS) -> None:
    (run / "csv").mkdir(parents=True, exist_ok=True)
    with (run / "csv" / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def result() -> dict:
    rows = [row for row in readings() if "val/loss" in row]
    base, final = (
        {key: row[key] for key in ("val/loss", "val/perplexity")} for row in (rows[0], rows[-1])
    )
    return {
        "name": "quotes & <co>",
        "command": "mamba2-train model.source=a/b 'data.source=<b>my</b> file.jsonl'",
        "started": "2026-01-02T03:04:05",
        "seconds": 4337.4,
        "device": "NVIDIA H100",
        "status": "finished",
        "model": {"source": "a/b", "parameters": 1_344_000_000, "trainable": 13_762_560},
        "data": {"train_documents": 12_840, "train_tokens": 3_120_448, "val_documents": 512},
        "base": base,
        "final": final,
        "tokens_seen": 491_520,
        "steps": N_STEPS,
        "versions": {"torch": "2.13.0", "mamba2-train": "0.1.0"},
        "outputs": {"adapter": "adapter", "checkpoint": "gone.ckpt", "odd": "javascript:alert(1)"},
        "next": "mamba2-generate model=runs/x prompt='<i>Hello'",
    }


def curves(path: Path, title: str) -> list[list[tuple[float, float]]]:
    """The points of each curve of a figure, in the SVG's units: y counts downwards."""
    source = path.read_text(encoding="utf-8")
    drawing = re.search(rf"{title}</h3>.*?(<svg.*?</svg>)", source, re.DOTALL)
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="[^"]*var\(--line\)', drawing[1])  # type: ignore[index]
    pairs = [re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path) for path in paths]
    return [[(float(x), float(y)) for x, y in points] for points in pairs]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_csv(folder, readings())
    (folder / "adapter").mkdir()
    (folder / "config.yaml").write_text("model:\n  source: a/b\n  note: <i>x</i>\n")
    (folder / "result.json").write_text(json.dumps(result()))
    samples = [
        {"prompt": "Write <b>:", "before": HOSTILE, "after": "line\u2028separator"},
        {"prompt": "empty", "before": "", "after": "tail \ud800"},
    ]
    lines = (json.dumps(s, ensure_ascii="\ud800" in s["after"]) + "\n" for s in samples)
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_every_figure_is_on_the_page(run: Path) -> None:
    path = write_report(run)
    page, rows, facts = Page(path), readings(), result()
    assert path == run / "report.html"
    before, after = facts["base"]["val/perplexity"], facts["final"]["val/perplexity"]
    speed = statistics.median(r["perf/tokens_per_sec"] for r in rows if "train/loss" in r)
    mfu = statistics.median(r["perf/mfu"] for r in rows if "train/loss" in r)
    assert page.figures == {
        "Held-out perplexity": f"{before:.2f} → {after:.3f}"
        f" | −{100 * (before - after) / before:.1f} %",
        "Held-out loss": f"3.000 → {facts['final']['val/loss']:.3f}",
        "Steps": "120 | 491,520 tokens",
        "Time": "1 h 12 min",
        "Tokens per second": f"{speed:,.0f} | median, MFU {100 * mfu:.1f} %",
        "Peak memory": "4.500 GiB",
        "Trainable parameters": f"13.8 M | {100 * 13_762_560 / 1_344_000_000:.3f} % of 1.34 B",
    }
    assert page.plots() == TITLES
    assert page.texts["h1"] == ["quotes & <co>"]
    assert page.texts["title"] == ["quotes & <co>: finished"]
    assert facts["command"] in page.texts["pre"]
    assert facts["next"] in page.texts["pre"]
    assert (run / "config.yaml").read_text().strip() in page.texts["pre"]
    for fact in ("12,840 documents, 3.12 M tokens", "512 documents", "NVIDIA H100", "2.13.0"):
        assert fact in page.texts["dd"]
    assert "2026-01-02 03:04:05" in page.texts["dd"]


def test_nothing_is_loaded_run_or_taken_for_markup(run: Path) -> None:
    page = Page(write_report(run))
    assert not {"script", "img", "link", "iframe", "object", "b", "i"} & set(page.tags)
    assert HOSTILE in page.text()
    assert "line\u2028separator" in page.text()
    assert "tail ?" in page.text()  # half a surrogate pair cannot be written
    links = {value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")}
    outside = {link for link in links if not link.startswith(("./", "#"))}
    assert not outside
    for link in links - outside:
        assert link.startswith("#") or (run / link).exists()
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", page.source)
    spaces = [v for _, name, v in page.attributes if name.startswith("xmlns")]
    assert len(re.findall(r"https?://", page.source)) == len(spaces) + 1  # the escaped sample's
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_colours_are_variables_that_both_themes_define(run: Path) -> None:
    source = Page(write_report(run)).source
    style, body = source.split("</style>", 1)
    used = set(re.findall(r"var\((--[\w-]+)\)", source))
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for variable in used:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark
    drawings = "".join(re.findall(r"<svg.*?</svg>", body, re.DOTALL))
    assert "var(--line)" in drawings
    assert "var(--base)" in drawings  # the dashed line
    assert not re.findall(r"(?:fill|stroke): (?!none|var)[^;\"]+", drawings)


def test_equal_inputs_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    other = tmp_path / "elsewhere" / "run"
    shutil.copytree(run, other)
    script = "import sys, pathlib; from mamba2_train.report import write_report as w\n"
    script += "w(pathlib.Path(sys.argv[1])); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(other)], check=True, timeout=60)
    assert (other / "report.html").read_bytes() == first


def test_an_empty_folder_is_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert page.texts["h1"] == [tmp_path.name]
    assert "no result yet" in page.texts["span"]
    assert "No metrics were recorded yet." in page.texts["p"]
    assert page.plots() == []
    assert page.figures == {}
    assert "details" not in page.tags
    assert "None" not in page.text()


@pytest.mark.parametrize("name", ["csv/metrics.csv", "config.yaml", "result.json", "samples.jsonl"])
def test_any_file_may_be_missing_empty_or_torn(run: Path, name: str) -> None:
    write_csv(run, readings(), ["step", "train/loss"])  # quick: one plot
    whole = (run / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff\xfe", None):
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(content)
        page = Page(write_report(run))
        assert "None" not in page.text()
        assert page.plots() == ["Training loss"] or name == "csv/metrics.csv"


def test_what_could_not_be_read_is_said(run: Path) -> None:
    (run / "result.json").write_text('{"name": "x"')
    (run / "samples.jsonl").write_text('{"prompt": "p", "after": "a"}\n\n[1]\n{"pro')
    page = Page(write_report(run))
    notes = [text for text in page.texts["p"] if "could not be read" in text]
    assert len(notes) == 3
    assert notes[0].startswith("result.json")
    assert "line 3" in notes[1]
    assert "line 4" in notes[2]
    assert page.tags.count("article") == 1


def test_any_key_may_be_absent(run: Path) -> None:
    write_csv(run, [])  # quick: nothing is drawn
    for key in result():
        facts = {other: value for other, value in result().items() if other != key}
        (run / "result.json").write_text(json.dumps(facts))
        assert "None" not in Page(write_report(run)).text()


@pytest.mark.parametrize("value", [None, 3, "text", ["list"], {"a": {"b": 1}}, True, math.nan])
def test_any_key_may_hold_another_kind(run: Path, value: object) -> None:
    write_csv(run, [])
    nested = {k: dict.fromkeys(v, value) if type(v) is dict else v for k, v in result().items()}
    for facts in (dict.fromkeys(result(), value), nested, value):
        (run / "result.json").write_text(json.dumps(facts))
        assert Page(write_report(run)).text().strip()


def test_without_a_result_the_metrics_speak(run: Path) -> None:
    (run / "result.json").unlink()
    page, rows = Page(write_report(run)), [r for r in readings() if "val/loss" in r]
    shown = page.figures["Held-out perplexity"].split(" | ")[0]
    first, last = (float(text) for text in shown.split(" → "))
    assert first == pytest.approx(rows[0]["val/perplexity"], rel=1e-3)
    assert last == pytest.approx(rows[-1]["val/perplexity"], rel=1e-3)
    assert page.figures["Last logged step"] == str(N_STEPS)


def test_worse_is_said_to_be_worse(run: Path) -> None:
    facts = result() | {"base": {"val/perplexity": 10.0}, "final": {"val/perplexity": 12.5}}
    (run / "result.json").write_text(json.dumps(facts))
    page = Page(write_report(run))
    assert page.figures["Held-out perplexity"] == "10.00 → 12.50 | +25.0 %"
    assert '<dd class="detail bad">+25.0 %' in page.source


def test_a_run_that_has_only_its_base_says_so(run: Path) -> None:
    (run / "result.json").unlink()
    write_csv(run, readings()[:5])
    page = Page(write_report(run))
    assert page.figures["Held-out perplexity"] == f"{math.exp(3):.2f} (base)"


def test_a_wide_range_is_drawn_on_a_log_scale(run: Path) -> None:
    rows = [{"step": s, "train/loss": 10.0 ** -(s / 10), "train/lr": 2.0**-s} for s in range(41)]
    write_csv(run, rows)
    path = write_report(run)
    assert path.read_text(encoding="utf-8").count("log scale") == 1  # a learning rate is linear
    (points,) = curves(path, "Training loss")
    slopes = [b[1] - a[1] for a, b in itertools.pairwise(points)]
    assert slopes == pytest.approx([slopes[0]] * 40, abs=1e-3)


def test_a_column_that_was_not_logged_is_named(run: Path) -> None:
    columns = [c for c in COLUMNS if c not in ("perf/peak_mem_gib", "perf/mfu", "train/lr")]
    write_csv(run, readings(), columns)
    page = Page(write_report(run))
    assert page.plots() == [t for t in TITLES if t not in ("Learning rate", "Peak memory (GiB)")]
    assert "Not recorded: learning rate, peak memory (GiB)." in page.texts["p"]
    assert "Peak memory" not in page.figures
    assert page.figures["Tokens per second"].endswith("| median")


def test_a_single_row_is_drawn(run: Path) -> None:
    write_csv(run, [{"step": 1, "train/loss": 2.5}])
    page = Page(write_report(run))
    assert page.plots() == ["Training loss"]
    assert "<use " in page.source.split("Training loss</h3>")[1]  # a marker: no line has one point


def test_values_that_are_not_finite_are_counted_and_left_out(run: Path) -> None:
    rows = readings()
    for row in rows:
        if row["step"] in (50, 51) and "train/loss" in row:
            row["train/loss"] = math.nan if row["step"] == 50 else math.inf
        if "train/grad_norm" in row:
            row["train/grad_norm"] = math.nan
        if row["step"] == 7:
            row["perf/tokens_per_sec"] = math.inf
    write_csv(run, rows)
    page = Page(write_report(run))
    assert "2 of 120 not finite" in page.texts["span"]
    assert "120 of 120 not finite" in page.texts["span"]
    assert page.plots() == [title for title in TITLES if title != "Gradient norm"]
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert not [drawing for drawing in drawings if re.search(r"\b(nan|inf)\b", drawing)]
    assert page.figures["Tokens per second"].startswith("1,")


def test_the_drawn_loss_is_the_logged_loss(run: Path) -> None:
    """The raw curve read back from the SVG, scaled by its own extremes."""
    raw, _ = curves(write_report(run), "Training loss")
    losses = [row["train/loss"] for row in readings() if "train/loss" in row]
    assert len(raw) == len(losses)
    heights = [-y for _, y in raw]  # SVG counts downwards
    low, high = min(heights), max(heights)
    for height, loss in zip(heights, losses, strict=True):
        expected = (loss - min(losses)) / (max(losses) - min(losses))
        assert (height - low) / (high - low) == pytest.approx(expected, abs=1e-3)


def test_a_long_run_stays_a_small_page_and_keeps_its_spike(run: Path) -> None:
    rows = [{"step": s, "train/grad_norm": 1 + 0.1 * math.sin(s)} for s in range(30_000)]
    rows[12_345]["train/grad_norm"] = 9.0
    write_csv(run, rows)
    path = write_report(run)
    assert path.stat().st_size < 60_000
    raw, smoothed = curves(path, "Gradient norm")
    heights = [-y for _, y in raw]
    ordinary = sorted(heights)[-2]
    assert max(heights) - ordinary > 10 * (ordinary - min(heights))
    spike_at = (raw[heights.index(max(heights))][0] - raw[0][0]) / (raw[-1][0] - raw[0][0])
    assert spike_at == pytest.approx(12_345 / 29_999, abs=1e-3)
    assert max(-y for _, y in smoothed) <= ordinary


def test_what_was_watched_is_drawn_by_kind_and_layer(run: Path) -> None:
    """Of twenty layers eight, evenly spread, each with a name beside its line."""
    layers = [f"decay/layer_{i:02}_p50" for i in range(20)]
    norms = ["grad_norm/in_proj_lora_A", "grad_norm/conv1d"]
    watched = {column: 0.5 + 0.01 * i for i, column in enumerate([*layers, *norms])}
    rows = [*readings(), *({"step": s, **watched} for s in (40, 80))]
    write_csv(run, rows, [*COLUMNS, *layers, *norms, "decay/layer_00_p05"])
    page = Page(write_report(run))
    titles = ["Gradient norms by kind", "Median decay by layer, exp(dt A): 8 of 20"]
    assert page.plots() == [*TITLES, *titles]
    named = [text for text in page.texts["span"] if text.startswith(("layer", "in_proj", "conv1d"))]
    kept = [0, 3, 5, 8, 11, 14, 16, 19]
    assert named == ["conv1d", "in_proj_lora_A", *(f"layer {i:02}" for i in kept)]
    section = page.source.split("Median decay by layer")[1].split("</figure>")[0]
    assert [f"var(--run-{i})" in section for i in range(9)] == [True] * 8 + [False]


def test_the_first_of_two_validations_at_a_step_counts(run: Path) -> None:
    (run / "result.json").unlink()
    best = {"step": N_STEPS, "val/loss": 1.0, "val/perplexity": math.e}
    write_csv(run, [*readings(), best])
    assert "2.718" not in Page(write_report(run)).figures["Held-out perplexity"]


def test_no_folder_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        write_report(tmp_path / "nowhere")
