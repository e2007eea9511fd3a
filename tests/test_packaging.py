"""The wheel holds what it needs and nothing else, and runs from an empty folder."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build leaves folders in its source tree."""
    out = tmp_path_factory.mktemp("dist")
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT)
    for name in files.decode().splitlines():
        if (ROOT / name).is_file():
            target = out / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, out / "source"],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"mamba2_configs", "mamba2_recipes", "mamba2_kernels", "mamba2_train"}
    for folder, installed in (("configs", "mamba2_configs"), ("recipes", "mamba2_recipes")):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"{installed}/{path.relative_to(ROOT / folder)}" in names
    for folder in ("mamba2_train", "kernels/mamba2_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert str(path.relative_to((ROOT / folder).parent)) in names
    assert "mamba2_train/assets/tiny_base/model.safetensors" in names
    assert wheel.stat().st_size < 12e6


def test_runs_from_an_empty_folder(wheel, tmp_path):
    """In an environment of its own that sees this one's libraries, but not our source tree."""
    builder = venv.EnvBuilder(system_site_packages=False, with_pip=False)
    builder.create(tmp_path / "env")
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    # our own editable install must not answer for the wheel
    (site / "libraries.pth").write_text("\n".join(libraries))
    python = tmp_path / "env" / "bin" / "python"
    empty = tmp_path / "empty"
    empty.mkdir()
    where = (
        "import mamba2_configs, mamba2_train; print(mamba2_configs.__file__, mamba2_train.__file__)"
    )
    run = {
        "cwd": empty,
        "capture_output": True,
        "text": True,
        "env": {**os.environ, "PYTHONPATH": ""},
    }
    found = subprocess.run([python, "-c", where], **run)
    assert found.stdout.count(str(site)) == 2, found.stdout + found.stderr
    command = (
        "import sys; sys.argv = ['mamba2-generate', 'prompt=Love', 'max_new_tokens=3']; "
        "from mamba2_train.commands.generate import main; main()"
    )
    done = subprocess.run([python, "-c", command], **run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Love")
    composed = (
        "import sys; sys.argv = ['mamba2-train', '--cfg', 'job']; "
        "from mamba2_train.commands.train import main; main()"
    )
    done = subprocess.run([python, "-c", composed], **run)
    assert "source: embedded" in done.stdout, done.stderr
    assert list(empty.iterdir()) == []
