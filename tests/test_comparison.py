"""The page about several runs: every figure on it recomputed here, and no run that stops it."""

import csv
import html
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from mamba2_train.comparison import find_runs
from mamba2_train.errors import UserError
from mamba2_train.report import compare

HOSTILE = "<script>alert('x')</script> & <img src=\"https://example.com/x.png\">"
# held-out perplexities at steps 10, 20, 30 as logged, one step earlier
SCORES = {"a": [30.0, 20.0, 25.0], "b": [40.0, 35.0, 22.5], "c": [50.0, math.nan, 45.0]}


def write_run(folder: Path, lr: float, scores: list[float], *, finished: bool = True) -> None:
    config = {"name": "x", "run_dir": str(folder), "optimizer": {"kind": "adamw", "lr": lr}}
    (folder / "csv").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": s, "train/loss": 3 + math.exp(-s * lr)} for s in range(30)]
    rows += [{"step": 10 * i + 9, "val/perplexity": p} for i, p in enumerate(scores)]
    with (folder / "csv" / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "val/perplexity"])
        writer.writeheader()
        writer.writerows(rows)
    if finished:
        result = {"status": "finished", "steps": 30, "seconds": 75.0, "model": {"trainable": 1234}}
        result |= {"base": {"val/perplexity": 60.0}}
        (folder / "result.json").write_text(json.dumps(result))
        sample = {"prompt": "Love is", "before": "base", "after": f"{HOSTILE} {lr}"}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")


@pytest.fixture
def sweep(tmp_path):
    """Two runs that ended, one that did not, and one of which nothing can be read."""
    folder = tmp_path / "sweep"
    write_run(folder / "a", 0.1, SCORES["a"])
    write_run(folder / "b", 0.2, SCORES["b"])
    write_run(folder / "c", 0.2, SCORES["c"], finished=False)
    (folder / "a" / "checkpoints" / "step-00000020.ckpt").touch()
    (folder / "broken" / "csv").mkdir(parents=True)
    (folder / "broken" / "config.yaml").write_text("model: [unclosed")
    (folder / "broken" / "result.json").write_bytes(b'{"na\xff')
    return folder


def rows(page: str, heading: str) -> list[list[str]]:
    """Texts of the cells of the table below a heading, one list for each row of its body."""
    table = re.search(rf'<h2 id="{heading}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    found = []
    for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        texts = [re.sub(r"<(svg.*?</svg|[^>]*)>", " ", cell, flags=re.DOTALL) for cell in cells]
        found.append([" ".join(html.unescape(text).split()) for text in texts])
    return found


def test_each_run_with_its_best_checkpoint(sweep, tmp_path):
    out = compare([sweep / name for name in ("a", "b", "c", "broken")], tmp_path / "cmp.html")
    page = out.read_text()
    a, b, c, broken = rows(page, "runs")
    assert a[:4] == ["a", "finished", "20.00 (best) −66.7 % from 60.00", a[3]]
    assert a[3] == "step 20 checkpoints/step-00000020.ckpt"
    assert 'href="sweep/a/checkpoints/step-00000020.ckpt"' in page
    assert a[4:6] == ["30", "1 min 15 s"]
    assert a[8] == "1,234"
    assert b[2:4] == ["22.50 −62.5 % from 60.00", "step 30 not kept"]
    assert c[:4] == ["c", "unfinished", "45.00", "step 30 not kept"]  # nan is not the best
    assert broken[:3] == ["broken", "nothing logged", "—"]
    assert "broken: config.yaml could not be read" in page
    assert "broken: result.json could not be read" in page


def test_settings_that_differ_and_no_others(sweep, tmp_path):
    page = compare([sweep / "a", sweep / "b"], tmp_path / "cmp.html").read_text()
    assert rows(page, "settings") == [["optimizer.lr", "0.1", "0.2"]]
    page = compare([sweep / "b", sweep / "c"], tmp_path / "cmp.html").read_text()
    assert "None: the configs are equal." in page


def test_many_runs_stand_below_one_another(sweep, tmp_path):
    for i in range(12):
        write_run(sweep / f"r{i}", 0.01 * i, SCORES["a"])
    page = compare(find_runs([str(sweep)]), tmp_path / "cmp.html").read_text()
    settings = rows(page, "settings")
    assert [row[1] for row in settings if row[0] == "r7"] == [str(0.01 * 7)]
    assert len(settings) == 15  # the broken one has none
    styles = re.findall(r'<path d="M0 5H32"(.*?)/>', page.split('id="settings"')[0])
    assert len(set(styles)) == 16  # each told from the others by colour or dashes


def test_the_drawn_curves_are_the_logged_ones(sweep, tmp_path):
    """Heights in the SVG, scaled by two of them, give the perplexities of both runs."""
    page = compare([sweep / "a", sweep / "b"], tmp_path / "cmp.html").read_text()
    drawing = re.search(r"Held-out perplexity</h3>.*?(<svg.*?</svg>)", page, re.DOTALL)[1]
    heights = []
    for i, name in enumerate("ab"):
        group = re.search(rf'id="[\w-]*-run-{i}">(.*?)</g>', drawing, re.DOTALL)[1]
        assert f"var(--run-{i})" in group
        path = re.search(r'<path d="([^"]+)"', group)[1]
        ys = [-float(y) for _, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)]
        heights += list(zip(ys, SCORES[name], strict=True))
    (low, lowest), (high, highest) = min(heights), max(heights)
    for height, score in heights:
        expected = (score - lowest) / (highest - lowest)
        assert (height - low) / (high - low) == pytest.approx(expected, abs=1e-3)


def test_the_page_loads_and_runs_nothing_and_hides_runs_by_keys(sweep, tmp_path):
    page = compare([sweep / "a", sweep / "b"], tmp_path / "cmp.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "<img" not in page
    assert html.escape(HOSTILE, quote=False).split(" &amp;")[0] in page.replace("&#39;", "'")
    assert not re.search(r"""(src|href|url\()=?["']?(https?:)?//""", page)
    for i in range(2):
        assert f'<input type="checkbox" id="show-{i}" checked>' in page
        assert f"body:has(#show-{i}:not(:checked))" in page
        assert f"of-run-{i}" in page
    assert compare([sweep / "a", sweep / "b"], tmp_path / "again.html").read_text() == page


def test_runs_are_found_by_folder_name_and_glob(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    every = [sweep / name for name in ("a", "b", "broken", "c")]

    def found(*words):
        return [run.resolve() for run in find_runs(words)]

    assert found("sweep") == every
    assert found("sweep/[ab]") == [
        sweep / "a",
        sweep / "b",
    ]
    assert found("sweep/b", "sweep") == [sweep / "b", sweep / "a", sweep / "broken", sweep / "c"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "sweep").rename(tmp_path / "runs" / "sweep")
    every = [tmp_path / "runs" / "sweep" / run.name for run in every]
    assert found("sweep") == every
    assert found("a") == every[:1]
    for word in ("nowhere", "runs/sweep/z*"):
        with pytest.raises(UserError, match=re.escape(f"there is no run at {word}")):
            find_runs([word])


def test_what_cannot_be_compared_is_the_users_error(sweep, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        compare([tmp_path / "nowhere"], tmp_path / "cmp.html")
    with pytest.raises(UserError, match="no run to compare"):
        compare([], tmp_path / "cmp.html")
    with pytest.raises(UserError, match="cannot be written"):
        compare([sweep / "a"], sweep)
