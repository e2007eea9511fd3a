"""Where figures go: what is chosen, how wandb is decided, and that a tracker never ends a run."""

import contextlib
import importlib.util
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from mamba2_train import loggers
from mamba2_train.commands import extend_hydra
from mamba2_train.errors import UserError
from mamba2_train.loggers import NOTES, Trackers, build_loggers, check_loggers, wandb_mode
from mamba2_train.schema import LoggerConfig, validated

KEY = "a-key-that-is-nobodys"


def config(**fields) -> LoggerConfig:
    return LoggerConfig(**({"wandb": None, "project": "p"} | fields))


@pytest.mark.parametrize(
    ("choice", "trackers"),
    [
        ([], ["wandb"]),
        (["logger=none"], []),
        (["logger=csv"], []),
        (["logger=tensorboard"], ["tensorboard"]),
        (["logger=[csv,trackio]"], ["trackio"]),
        (["logger=[wandb,csv]"], ["wandb"]),
        (
            ["logger=[wandb,tensorboard,trackio,mlflow]"],
            ["wandb", "tensorboard", "trackio", "mlflow"],
        ),
    ],
)
def test_one_word_each_and_several_at_once(choice, trackers):
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", overrides=choice)
    assert validated(LoggerConfig, dict(composed.logger)).trackers == trackers


def test_how_wandb_runs_can_be_said_outright():
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", overrides=["logger.wandb=offline", "logger.project=mine"])
    chosen = validated(LoggerConfig, dict(composed.logger))
    assert (chosen.wandb, chosen.project) == ("offline", "mine")


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mlflow-skinny"):
        check_loggers(config(mlflow=True))
    check_loggers(config())  # the CSV needs none


class Server:
    """What wandb's server may be like."""

    def __init__(self, answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                answer(handler)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def says(status, body):
    def answer(handler):
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(json.dumps(body).encode())

    return answer


def drips(handler):
    """A byte every now and then: no timeout between two of them ends it."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):  # once nobody listens any more
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)


ANSWERS = {
    "takes the key": (says(200, {"data": {"viewer": {"id": "x"}}}), ""),
    "does not know the key": (says(200, {"data": {"viewer": None}}), "does not know the key"),
    "refuses the key": (says(401, {}), "does not take the key"),
    "is no wandb": (says(200, ["hello"]), "did not answer as wandb does"),
    "fails": (says(502, {}), "answered with 502"),
    "says nothing": (lambda handler: time.sleep(20), "did not answer"),
    "never ends": (drips, "did not answer within"),
}


@pytest.fixture
def server(monkeypatch, request):
    answer, fault = ANSWERS[request.param]
    server = Server(answer)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(loggers, "PATIENCE", 0.5)
    monkeypatch.setattr(loggers.wandb_fault, "__defaults__", (0.5,))
    yield fault
    server.server.shutdown()


@pytest.mark.parametrize("server", ANSWERS, indirect=True, ids=str)
def test_wandb_is_online_where_the_server_takes_the_key(server, caplog):
    started = time.monotonic()
    mode = wandb_mode("auto")
    assert time.monotonic() - started < 3
    assert mode == ("offline" if server else "online")
    assert bool(server) == ("wandb goes on offline" in caplog.text)
    assert server in caplog.text
    assert KEY not in caplog.text
    if server:
        with pytest.raises(UserError, match=server) as fault:
            wandb_mode("online")
        assert KEY not in str(fault.value)
    else:
        assert wandb_mode("online") == "online"


@pytest.mark.parametrize("url", ["http://10.255.255.1:9", "http://no-such-host.invalid"])
def test_an_address_that_nobody_is_at_takes_less_than_three_seconds(monkeypatch, url):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    started = time.monotonic()
    assert wandb_mode("auto") == "offline"
    assert time.monotonic() - started < 3


def test_without_a_key_nobody_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(loggers, "wandb_fault", lambda *_: pytest.fail("asked"))
    assert wandb_mode("auto") == "offline"
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        wandb_mode("online")
    netrc = tmp_path / ".netrc"  # as `wandb login` writes it
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    monkeypatch.setattr(loggers, "wandb_fault", lambda url, key: "" if key == KEY else "other")
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"


class Recorder:
    """A tracker that keeps what it is told, and fails when it is told to."""

    id = "this-one"
    arrived = None

    def __init__(self, known):
        self.known, self.told, self.broken, self.closed = known, [], False, None

    def configure(self, settings):
        self.settings = settings

    def log(self, metrics, step):
        if self.broken:
            raise OSError(28, "No space left on device")
        self.told.append((step, metrics))

    def samples(self, rows, step):
        self.told.append((step, rows))

    def close(self, succeeded):
        self.closed = succeeded


@pytest.fixture
def trackers(monkeypatch, tmp_path):
    """Two in the places of TensorBoard and MLflow; each call is a new process of one run."""
    made = []

    def start(goes_on=False):
        pair = []

        def make(*arguments):
            pair.append(Recorder(arguments[-1]))
            return pair[-1]

        monkeypatch.setattr(loggers, "TensorBoard", make)
        monkeypatch.setattr(loggers, "MLflow", make)
        _, both = build_loggers(config(tensorboard=True, mlflow=True), "x", tmp_path, "offline")
        both.begin({"a": 1}, goes_on=goes_on)
        made.append(pair)
        return both, *pair

    return start


def test_each_point_is_sent_once(trackers, tmp_path):
    """A second process of the run offers again what the first has sent, and goes on."""
    both, first, _ = trackers()
    points = [{"step": float(s), "train/loss": 1.0 / (s + 1)} for s in range(4)]
    points.insert(2, {"step": 1.0, "val/loss": 0.7})
    for point in points[:4]:
        both.log_metrics({k: v for k, v in point.items() if k != "step"}, int(point["step"]))
    rows = [{"prompt": "a", "text": "b"}]
    both.log_samples(rows, 1)
    both.log_samples(rows, 1)
    assert [step for step, _ in first.told] == [0, 1, 1, 2, 1]
    both, again, other = trackers(goes_on=True)
    assert other.known == "this-one"  # the id
    both.replay(points, {1: rows, 3: rows})
    assert again.told == [(3, {"train/loss": 0.25})]
    both.log_metrics({"val/loss": 0.6, "epoch": 0}, 3)
    both.log_metrics({"val/loss": 0.6, "epoch": 0}, 3)  # of the best weights, after the training
    assert [step for step, _ in again.told] == [3, 3]
    notes = json.loads((tmp_path / NOTES).read_text())
    assert notes["tensorboard"]["logged"] == {"train": 3, "val": 3, "samples": 1}


def test_what_never_arrived_is_sent_again(trackers):
    """The notes say that it was sent; the tracker knows better."""
    both, _, _ = trackers()
    for step in range(3):
        both.log_metrics({"train/loss": float(step)}, step)
    both, again, _ = trackers(goes_on=True)
    both.notes["tensorboard"]["logged"] = {"train": 0}  # as `arrived` would make them
    both.replay([{"step": float(s), "train/loss": float(s)} for s in range(3)], {})
    assert [step for step, _ in again.told] == [1, 2]


def test_a_tracker_that_fails_is_left_out_with_a_warning(trackers, caplog):
    both, first, second = trackers()
    first.broken = True
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            both.log_metrics({"train/loss": 1.0}, step)
    assert caplog.text.count("the run goes on without tensorboard: [Errno 28] No space") == 1
    assert [step for step, _ in second.told] == [0, 1, 2]
    both.close(True)
    assert (first.closed, second.closed) == (None, True)


def test_a_tracker_that_cannot_be_opened_ends_a_new_run_alone(monkeypatch, tmp_path, caplog):
    def fail(*_):
        raise OSError("connection refused\nby the server")

    monkeypatch.setattr(loggers, "MLflow", fail)
    both = Trackers(config(mlflow=True), "x", tmp_path, "offline")
    with pytest.raises(UserError, match="logger=mlflow cannot be opened: connection refused by"):
        both.begin({}, goes_on=False)
    both.begin({}, goes_on=True)
    assert "the run goes on without mlflow" in caplog.text
    both.log_metrics({"train/loss": 1.0}, 0)


def test_wandb_that_fails_to_start_online_goes_on_offline_if_it_may(monkeypatch, tmp_path, caplog):
    def start(config, name, folder, mode, known):
        if mode == "online":
            raise TimeoutError("init timed out")
        return Recorder(known)

    monkeypatch.setattr(loggers, "Wandb", start)
    Trackers(config(wandb="auto"), "x", tmp_path, "online").begin({}, goes_on=False)
    assert "wandb goes on offline: init timed out" in caplog.text
    with pytest.raises(UserError, match="logger=wandb cannot be opened: init timed out"):
        Trackers(config(wandb="online"), "x", tmp_path, "online").begin({}, goes_on=False)


def test_other_ranks_open_and_write_nothing(tmp_path):
    """Which never come to `begin`."""
    both = Trackers(config(wandb="offline", tensorboard=True), "x", tmp_path, "offline")
    both.log_metrics({"train/loss": 1.0}, 0)
    both.log_samples([{"prompt": "a"}], 0)
    both.close(True)
    assert not list(Path(tmp_path).iterdir())
