"""Keys and tokens are planted wherever a user has them, and looked for in all that a run leaves."""

import gzip
import logging
import os
import subprocess
import sys
import zipfile

import pytest
import yaml

from mamba2_train.errors import UserError
from mamba2_train.redaction import RedactingFormatter, redacted, refuse_secrets

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_" + "PlantedTokenOfTheHub" * 2,
    "MY_TRACKER_PASSWORD": "correct horse battery staple",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYplanted",
}
REMOTE = "https://somebody:" + "ghp_" + "PlantedTokenOfTheForge0123456789012@forge.example/x.git"
SECRETS = [*PLANTED.values(), "PlantedTokenOfTheForge"]


def holding(folder, *said):
    """What holds a secret: files, unpacked where they are packed, and what was said."""
    contents = {f"said {i}": text.encode() for i, text in enumerate(said)}
    for file in (f for f in folder.rglob("*") if f.is_file()):
        contents[str(file)] = file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                contents[f"{file}!"] = b"".join(archive.read(n) for n in archive.namelist())
        if file.suffix == ".gz":
            contents[f"{file}!"] = gzip.decompress(contents[str(file)])
    return [(name, s) for name, raw in contents.items() for s in SECRETS if s.encode() in raw]


def plant():
    os.environ |= PLANTED


def test_the_search_sees_a_secret(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", "a" * 99 + SECRETS[0])
    assert holding(tmp_path)
    assert not holding(tmp_path / "nothing", "a word")


def test_a_run_leaves_none(tmp_path, safe, folder):
    """Checkpoints, logs, report, config, wandb's offline folder and the terminal, of a run in a
    repository whose remote has a token, with a key set through Hydra on the command line."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", REMOTE], check=True)

    def before():
        plant()
        logging.getLogger("mamba2_train").warning("a library said %s", PLANTED["HF_TOKEN"])
        from mamba2_train import run

        announce = run.Run.announce

        def loud(self):
            announce(self)
            url = f"https://me:{PLANTED['MY_TRACKER_PASSWORD']}@host"
            logging.getLogger("some.library").warning("retrying %s", url)

        run.Run.announce = loud

    arguments = [
        f"model.source={folder / 'base'}",
        f"data.source={folder / 'rows.jsonl'}",
        "logger=wandb",
        "run_dir=run",
    ]
    code, said = safe.run(tmp_path, "train", *arguments, before=before)
    assert code == 0, said
    run = tmp_path / "run"
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert (run / "report.html").exists()
    assert "retrying https://***@host" in (run / "logs" / "rank-0.log").read_text()
    assert not holding(run, said)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", ["user", "bug"])
def test_the_end_of_a_run_shows_none(folder, safe, kind, debug):
    def before():
        plant()
        from mamba2_train.commands import train

        def fail(*_):
            error = UserError if kind == "user" else ValueError
            raise error(f"cannot reach {REMOTE} with {PLANTED['WANDB_API_KEY']}")

        train.model_shape = fail

    options = ("run_dir=failed", f"debug={debug}")
    code, said = safe.run(folder, "train", *options, before=before)
    assert code == 1
    assert "cannot reach https://***@" in said
    assert ("Traceback" in said) == (debug or kind == "bug")
    assert not holding(folder / "failed", said)


LEAKS = {
    "logger.tags=['${oc.env:HF_TOKEN}']": "logger.tags.0: holds the value of HF_TOKEN",
    "logger.project='${oc.env:MY_TRACKER_PASSWORD}'": "holds the value of MY_TRACKER_PASSWORD",
    f"logger.project=a-{PLANTED['WANDB_API_KEY']}-b": "holds the value of WANDB_API_KEY",
    "data.source='https://me:secret@host/rows.jsonl'": "holds a password or token in a URL",
    "model.source=hf_0123456789abcdefghijABCDEFGHIJ": "holds what looks like a key",
    "callbacks.samples.prompts=[sk-0123456789abcdefghijABCDEFGHIJ]": "holds what looks like a key",
    "+hydra.job.env_set.NEW_API_KEY=hf_0123456789abcdefghijABCDEFGHIJ": "hydra.job.env_set",
}


@pytest.mark.parametrize(("override", "message"), LEAKS.items())
def test_a_setting_that_holds_one_is_refused(folder, safe, override, message):
    code, said = safe.run(folder, "train", "run_dir=leaky", override, before=plant)
    assert code == 1
    assert message in safe.one_line(said)
    assert not (folder / "leaky").exists()
    assert not holding(folder / "leaky", said)


def test_a_config_of_the_users_with_one(tmp_path, folder, safe):
    recipe = {"defaults": ["train", "_self_"], "logger": {"tags": ["${oc.env:HF_TOKEN}"]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    where = ("run_dir=leaky", f"--config-dir={tmp_path}", "--config-name=mine")
    code, said = safe.run(folder, "train", *where, before=plant)
    assert code == 1
    assert "holds the value of HF_TOKEN" in safe.one_line(said)


def test_what_is_struck_out_and_what_is_not(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "short")
    monkeypatch.setenv("OTHER_TOKEN", "a long enough value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false and long")
    text = "x a long enough value y WANDB_API_KEY=abc, hf_0123456789abcdefghij https://a:b@c git@d"
    assert redacted(text) == "x *** y WANDB_API_KEY=***, *** https://***@c git@d"
    plain = "short, false and long, eos_token='</s>', https://host/x@y, sk-learn, 0123456789abcdef"
    assert redacted(plain) == plain
    refuse_secrets({"a": [plain, {"b": 3}], "c": "ssh://git@host/x"})
    refuse_secrets({"prompt": text}, leave=("prompt",))
    with pytest.raises(UserError, match=r"a\.1\.b: holds the value of OTHER_TOKEN"):
        refuse_secrets({"a": ["x", {"b": "a long enough value"}]})


def test_a_logged_traceback(monkeypatch):
    monkeypatch.setenv("OTHER_TOKEN", "a long enough value")
    try:
        raise RuntimeError("because of a long enough value")
    except RuntimeError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, sys.exc_info())
    line = RedactingFormatter("%(message)s").format(record)
    assert "because of ***" in line
    assert "long enough" not in line
