"""What the preview shows, against the rows' own text."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mamba2_train.assets import FOLDER
from mamba2_train.data.config import DataConfig
from mamba2_train.data.preview import preview
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError

ROWS = [
    {"prompt": "Is [this] é?", "completion": ""},
    {"prompt": "Is [this] é?", "completion": " Yes, 漢字."},
    {"prompt": "Define hope.", "completion": " Desire."},
    {"prompt": "Never", "completion": " shown."},
]


def shown(tokenizer, rows=ROWS, color_system=None, **settings):
    out = io.StringIO()
    console = Console(
        file=out, width=200, force_terminal=True, color_system=color_system, highlight=False
    )
    settings = {"preview": 2} | settings
    numbered = (Row(values, "hub/rows[train]", i) for i, values in enumerate(rows, 1))
    preview(numbered, tokenizer, DataConfig(source="x", **settings), console)
    return out.getvalue()


def test_what_is_learned_is_marked(tokenizer):
    n = [len(tokenizer.encode(r["prompt"])) for r in ROWS]
    m = [len(tokenizer.encode(r["completion"])) + 1 for r in ROWS]
    share = [round(100 * m[i] / (n[i] + m[i])) for i in range(4)]
    assert shown(tokenizer) == (
        "format prompt_completion; what is learned (completion) is between ⟦ and ⟧\n\n"
        f"hub/rows[train], row 2  {n[1] + m[1]} tokens, {m[1]} learned ({share[1]}%)\n"
        "Is [this] é?⟦ Yes, 漢字.<|endoftext|>⟧\n\n"
        f"hub/rows[train], row 3  {n[2] + m[2]} tokens, {m[2]} learned ({share[2]}%)\n"
        "Define hope.⟦ Desire.<|endoftext|>⟧\n"
    )


def test_colours_tell_what_is_learned_and_what_is_special(tokenizer):
    text = shown(tokenizer, color_system="standard", preview=1)
    dim, green, special, off = "\x1b[2m", "\x1b[32m", "\x1b[4;32m", "\x1b[0m"
    assert f"{dim}Is [this] é?{off}{green} Yes, 漢字.{off}{special}<|endoftext|>{off}\n" in text
    assert "⟦" not in text


def test_the_first_token_is_never_learned_and_long_documents_are_cut(tokenizer):
    text = shown(tokenizer, [{"text": "Word. " * 50}], seq_len=8)
    n = len(tokenizer.encode("Word. " * 50)) + 1
    assert f"{n} tokens, {n - 1} learned" in text
    assert "shown up to data.seq_len=8 (long_documents: split)" in text
    first = tokenizer.decode(tokenizer.encode("Word. " * 50)[:8])
    head = tokenizer.decode(tokenizer.encode("Word. ")[:1])
    assert text.endswith(f"\n{head}⟦{first[len(head) :]}⟧\n")


def test_nothing_to_show_is_told(tokenizer):
    with pytest.raises(UserError) as caught:
        shown(tokenizer, ROWS[:1])
    assert str(caught.value) == (
        "hub/rows[train]: none of its first 1 rows leaves anything to learn under "
        "data.loss_on=completion; check that 'completion' is the right column and not empty"
    )


def test_the_command_shows_and_stops_before_any_weight_is_read(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(FOLDER / "tiny_base", model)
    (model / "model.safetensors").unlink()
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + '\n' }}"
        "{% endif %}{% endfor %}"
    )
    (tmp_path / "chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Sky?"}, '
        '{"role": "assistant", "content": "Blue."}]}\n'
    )
    done = subprocess.run(
        [
            Path(sys.executable).parent / "mamba2-train",
            "model.source=model",
            "data=local",
            "data.source=chats.jsonl",
            "data.chat_template=chat.jinja",
            "data.loss_on=assistant",
            "data.preview=3",
        ],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Sky?\n⟦Blue.<|endoftext|>⟧\n")
    assert not (tmp_path / "runs").exists()
