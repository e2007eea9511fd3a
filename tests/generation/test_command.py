"""mamba2-generate: what it prints and writes, and its faults, each of one line."""

import io
import json
import re
import shutil
import sys

import pytest

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.commands import generate as command
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.generation import complete
from mamba2_train.generation.chat import rendered

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PLAIN = ["temperature=0", "max_new_tokens=8"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command with its overrides, as typed; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides, stdin=""):
        monkeypatch.setattr(sys, "argv", ["mamba2-generate", *overrides])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            command.main()
        except SystemExit as leave:
            code = leave.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def base():
    return load_pretrained(FOLDER / "tiny_base").eval(), load_tokenizer(FOLDER / "tiny_base")


@pytest.fixture
def talker(tmp_path):
    """The embedded base with a chat template."""
    shutil.copytree(FOLDER / "tiny_base", tmp_path / "talker")
    (tmp_path / "talker" / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(tmp_path / "talker")


def expected(base, prompts, **how):
    model, tokenizer = base
    ids = [p if isinstance(p, list) else tokenizer.encode(p) for p in prompts]
    return [c.text for c in complete(model, tokenizer, ids, max_new_tokens=8, **how)]


def test_a_prompt(run, base):
    (text,) = expected(base, ["Love is"], temperature=0.9, min_p=0.1, seed=4, stop=["."])
    code, out, _ = run(
        "prompt=Love is", "max_new_tokens=8", "temperature=0.9", "min_p=0.1", "seed=4",
        "top_p=1", "stop=[.]",
    )  # fmt: skip
    assert (code, out) == (0, f"Love is{text}\n")


def test_many_prompts(run, base, tmp_path):
    prompts = ["Love is", "The", "A quarrel, it's said"]
    texts = expected(base, prompts)
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    rows = [{"prompt": p, "n": i} for i, p in enumerate(prompts)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, _ = run("prompts=p.txt", "batch_size=2", *PLAIN)
    assert code == 0
    assert [json.loads(line)["completion"] for line in out.splitlines()] == texts
    code, out, err = run("prompts=p.jsonl", "out=out.jsonl", *PLAIN)
    assert code == 0, err
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [w["completion"] for w in written] == texts
    assert [w["n"] for w in written] == [0, 1, 2]


def test_a_saved_state(run, base, tmp_path):
    (tmp_path / "long.txt").write_text("It is a truth universally acknowledged, " * 20)
    code, out, err = run("prompt_file=long.txt", "save_state=s", "max_new_tokens=0")
    assert (code, out) == (0, ""), err
    tokenizer = base[1]
    head = tokenizer.encode((tmp_path / "long.txt").read_text())
    for prompt in ("that a man", "but"):
        (text,) = expected(base, [head + tokenizer.encode(prompt)])
        code, out, _ = run("state=s", f"prompt={prompt}", *PLAIN)
        assert (code, out) == (0, f"{prompt}{text}\n")


def test_a_chat(run, base, talker):
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello, you"}]
    (answer,) = expected(base, [rendered(asked, talker)])
    chat = ["checkpoint=talker", "chat=true", "system=Be kind.", *PLAIN]
    code, out, err = run(*chat, "prompt=Hello, you")
    assert (code, out) == (0, f"{answer}\n"), err
    again = [{"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
    (second,) = expected(base, [rendered([*asked, *again], talker)])
    code, out, _ = run(*chat, stdin="Hello, you\nAnd?\n")
    assert (code, out) == (0, f"{answer}\n{second}\n")


FAULTS = {
    "nothing": ([], "nothing to continue"),
    "empty": (["prompt="], "prompt is empty"),
    "two": (["prompt=a", "prompts=b"], "prompt and prompts are set"),
    "too long": (["prompt=a b c d e f", "max_prompt_tokens=3"], "max_prompt_tokens is 3"),
    "no file": (["prompts=nowhere.txt"], "nowhere.txt cannot be read"),
    "no prompts": (["prompts=blank.txt"], "blank.txt holds no prompt"),
    "empty line": (["prompts=gap.txt"], "gap.txt, line 2: the prompt is empty"),
    "no json": (["prompts=bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
    "no prompt": (["prompts=other.jsonl"], "other.jsonl, line 1: .*prompt, only text"),
    "no template": (["prompt=a", "chat=true"], "no chat template"),
    "no state": (["prompt=a", "state=nowhere"], "there is no state"),
    "zero": (["prompt=a", "max_new_tokens=0"], "max_new_tokens is 0"),
    "temperature": (["prompt=a", "temperature=-1"], "temperature: .*got -1"),
    "out": (["prompt=a", "out=x"], "out=x is for many prompts"),
    "nowhere to write": (["prompts=one.txt", "out=no/where.jsonl"], "cannot be written"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(run, tmp_path, name):
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    (tmp_path / "one.txt").write_text("a\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{oops\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    overrides, message = FAULTS[name]
    code, _, err = run(*overrides)
    assert code == 1
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not list(tmp_path.glob(".*"))
