"""Where a run's figures go: `csv/metrics.csv` always, and to any of wandb, TensorBoard, trackio and
MLflow that was asked for.

A run that goes on computes again what it logged behind its checkpoint, to the same bits. The CSV is
cut back to the checkpoint, and all that it then holds is offered to the others again, for a process
that was killed may have taken some of it along. None of them can forget a point: what each has got
is noted in `tracking.json`, beside the id by which it is found again, and is not sent twice.
"""

import atexit
import contextlib
import importlib.util
import io
import json
import logging
import netrc
import os
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger

from mamba2_train.errors import UserError
from mamba2_train.processes import agreed
from mamba2_train.schema import LoggerConfig
from mamba2_train.tracking import CSV_FOLDER, write_json

logger = logging.getLogger(__name__)

NOTES = "tracking.json"  # in the run folder
PATIENCE = 2.0  # seconds for wandb's server to answer
PACKAGES = {  # module, and what pip calls it
    "wandb": ("wandb", "wandb"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
WandbMode = Literal["online", "offline"]
Rows = list[dict[str, Any]]


def check_loggers(config: LoggerConfig) -> WandbMode:
    """Raise a UserError if a tracker's package is missing; returns how wandb is to run, as the
    first rank has decided in at most 3 s."""
    for name in config.trackers:
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"logger={name} needs a package that is missing: pip install {package}")
    if config.wandb is None or config.wandb == "offline":
        return "offline"
    asked = config.wandb
    return agreed("wandb_mode", lambda: wandb_mode(asked))  # type: ignore[return-value]


def wandb_mode(asked: Literal["auto", "online"]) -> WandbMode:
    """Online where there is a key that the server takes within two seconds.

    Raises:
        UserError: `online` was asked for, and there is no key, or no such answer.
    """
    url = wandb_url()
    if asked == "auto" and os.environ.get("WANDB_MODE", "online") != "online":
        return "offline"
    key = os.environ.get("WANDB_API_KEY") or stored_key(url)
    fault = "there is no key: set WANDB_API_KEY" if not key else wandb_fault(url, key)
    if not fault:
        return "online"
    if asked == "online":
        raise UserError(f"logger.wandb=online: {fault}; or set logger.wandb=offline")
    if key:
        logger.warning("wandb goes on offline: %s; `wandb sync` later", fault)
    return "offline"


def wandb_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def stored_key(url: str) -> str | None:
    """What `wandb login` has left."""
    try:
        found = netrc.netrc().authenticators(urlsplit(url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def wandb_fault(url: str, key: str, timeout: float = PATIENCE) -> str:
    """Why the server at `url` cannot be logged to; empty if it can."""
    answers: list[str] = []

    def ask() -> None:
        token = b64encode(f"api:{key}".encode()).decode()
        request = urllib.request.Request(
            f"{url}/graphql",
            data=json.dumps({"query": "query Viewer { viewer { id } }"}).encode(),
            headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                viewer = json.load(response)["data"]["viewer"]
            answers.append("" if viewer else f"{url} does not know the key: set WANDB_API_KEY")
        except urllib.error.HTTPError as error:
            known = error.code in (401, 403)
            what = "does not take the key" if known else f"answered with {error.code}"
            answers.append(f"{url} {what}")
        except (OSError, ValueError, KeyError, TypeError):  # no such name, no route, no wandb
            answers.append(f"{url} did not answer as wandb does")

    # in a thread: no timeout bounds the look-up of a name
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 0.5)
    return answers[0] if answers else f"{url} did not answer within {timeout:g} s"


class Tracker(Protocol):
    """One place that figures are sent to. `id` finds it again when the run goes on; `arrived` is
    the last step that it has of each group, where it knows better than our notes."""

    id: str | None
    arrived: dict[str, int] | None

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def samples(self, rows: Rows, step: int) -> None: ...

    def close(self, succeeded: bool) -> None: ...


class Wandb:
    """`wandb/` in the run folder. What it has not yet put on the disk or sent, up to half a minute,
    dies with its process; so it is told everything again. Online it knows how many calls have come;
    offline a new file takes the place of what there was, which is put aside."""

    arrived: dict[str, int] | None = {}  # noqa: RUF012

    def __init__(
        self, config: LoggerConfig, name: str, folder: Path, mode: WandbMode, known: str | None
    ) -> None:
        # its own banner and console capture would bury the summary
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        import wandb

        if mode == "offline":
            for part in folder.glob("wandb/offline-run-*"):
                aside = folder / "wandb" / "superseded" / part.name
                aside.parent.mkdir(exist_ok=True)
                part.rename(aside)
        self.wandb = wandb
        self.run = wandb.init(
            project=config.project,
            name=name,
            dir=folder,
            mode=mode,
            tags=config.tags,
            id=known,
            resume="allow" if known and mode == "online" else None,
            settings=wandb.Settings(init_timeout=20),
        )
        self.id: str | None = self.run.id
        self.calls, self.calls_known = 0, self.run.starting_step
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def configure(self, settings: dict[str, Any]) -> None:
        self.run.config.update(settings, allow_val_change=True)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._log(metrics | {"step": step})

    def samples(self, rows: Rows, step: int) -> None:
        table = self.wandb.Table(columns=list(rows[0]), data=[list(r.values()) for r in rows])
        self._log({"samples": table, "step": step})

    def _log(self, values: dict[str, Any]) -> None:
        if self.calls >= self.calls_known:
            self.run.log(values)
        self.calls += 1

    def close(self, succeeded: bool) -> None:
        self.run.finish(0 if succeeded else 1)


class TensorBoard:
    """`tensorboard/` in the run folder; each process of the run adds a file."""

    id: str | None = None
    arrived: dict[str, int] | None = None

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(folder / "tensorboard")

    def configure(self, settings: dict[str, Any]) -> None:
        lines = "".join(f"    {key}: {value}\n" for key, value in _flat(settings).items())
        self.writer.add_text("config", lines, 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()  # else a process that is killed takes two minutes of it along

    def samples(self, rows: Rows, step: int) -> None:
        head = "| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|\n"
        body = "".join("| " + " | ".join(map(_cell, r.values())) + " |\n" for r in rows)
        self.writer.add_text("samples", head + body, step)
        self.writer.flush()

    def close(self, succeeded: bool) -> None:
        self.writer.close()


class Trackio:
    """trackio's own database, in its cache or TRACKIO_DIR; `trackio show` draws it. It takes half a
    second until a point is on the disk."""

    def __init__(self, config: LoggerConfig, name: str, known: str | None) -> None:
        import trackio

        self.trackio = trackio
        self.id: str | None = known or name
        self.arrived: dict[str, int] | None = {}
        for point in trackio.SQLiteStorage.get_logs(config.project, self.id) if known else ():
            group = "samples" if "samples" in point else group_of(point)
            self.arrived[group] = max(self.arrived.get(group, -1), point["step"])
        with contextlib.redirect_stdout(io.StringIO()):  # six lines of advice
            self.run = trackio.init(
                project=config.project,
                name=self.id,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def configure(self, settings: dict[str, Any]) -> None:
        self.run.config.update(_flat(settings))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def samples(self, rows: Rows, step: int) -> None:
        columns, data = list(rows[0]), [list(r.values()) for r in rows]
        self.run.log({"samples": self.trackio.Table(columns=columns, data=data)}, step=step)

    def close(self, succeeded: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()  # or it finishes once more, aloud, at the exit


class MLflow:
    """The server or folder of MLFLOW_TRACKING_URI, or `mlflow/` in the run folder."""

    arrived: dict[str, int] | None = None

    def __init__(self, config: LoggerConfig, name: str, folder: Path, known: str | None) -> None:
        # or a server that is gone keeps each point waiting for 14 minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (folder / "mlflow").resolve().as_uri()
        with _quiet("mlflow", "alembic"):
            from mlflow import MlflowClient

            self.client = MlflowClient(uri)
            if known is None:
                found = self.client.get_experiment_by_name(config.project)
                of = found.experiment_id if found else self.client.create_experiment(config.project)
                tags = {"mlflow.runName": name} | dict.fromkeys(config.tags, "true")
                known = self.client.create_run(of, run_name=name, tags=tags).info.run_id
            else:
                self.client.update_run(known, status="RUNNING")
        self.id: str | None = known
        self.run_id: str = known
        atexit.register(self.close, False)

    def configure(self, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        # a parameter never changes: what a run goes on with is in the file alone
        if not self.client.get_run(self.run_id).data.params:
            params = [Param(k, str(v)[:500]) for k, v in _flat(settings).items()]
            for i in range(0, len(params), 100):
                self.client.log_batch(self.run_id, params=params[i : i + 100])
        self.client.log_dict(self.run_id, settings, "config.json")

    def log(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(key, value, now, step) for key, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=points)

    def samples(self, rows: Rows, step: int) -> None:
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        self.client.log_text(self.run_id, text, f"samples/step-{step:08d}.json")

    def close(self, succeeded: bool) -> None:
        atexit.unregister(self.close)
        self.client.set_terminated(self.run_id, "FINISHED" if succeeded else "FAILED")


class Trackers(Logger):
    """Lightning's logger for all of them, of the first rank; each gets a point once.

    One that fails is left out from then on, with a warning: it is not worth the run.
    """

    def __init__(self, config: LoggerConfig, name: str, run_dir: Path, mode: WandbMode) -> None:
        super().__init__()
        self.config, self.run_name, self.folder, self.mode = config, name, run_dir, mode
        self.open: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}  # tracker -> its id, and the last step of each group

    @property
    def name(self) -> str:
        return self.run_name

    @property
    def version(self) -> str:
        return self.folder.name

    def begin(self, settings: dict[str, Any], *, goes_on: bool) -> None:
        """Open all that was asked for, as what this run folder's figures went to before.

        Raises:
            UserError: a tracker cannot be opened, and the run has only begun.
        """
        with contextlib.suppress(OSError, ValueError):
            self.notes = dict(json.loads((self.folder / NOTES).read_text()))
        name = f"{self.run_name}-{self.folder.name}"
        makers: dict[str, Callable[[str | None], Any]] = {
            "wandb": lambda known: self._wandb(name, known),
            "tensorboard": lambda known: TensorBoard(self.folder),
            "trackio": lambda known: Trackio(self.config, name, known),
            "mlflow": lambda known: MLflow(self.config, name, self.folder, known),
        }
        for kind in self.config.trackers:
            note = self.notes.setdefault(kind, {"id": None, "logged": {}})
            try:
                tracker = makers[kind](note["id"])
                tracker.configure(settings)
            except Exception as error:
                if not goes_on:
                    raise UserError(
                        f"logger={kind} cannot be opened: {_line(error)}; mend that, or leave it "
                        "out of logger="
                    ) from error
                logger.warning("the run goes on without %s: %s", kind, _line(error))
                continue
            note["id"] = tracker.id
            if tracker.arrived is not None:
                note["logged"] = dict(tracker.arrived)
            self.open[kind] = tracker
        self._write_notes()

    def _wandb(self, name: str, known: str | None) -> Wandb:
        try:
            return Wandb(self.config, name, self.folder, self.mode, known)
        except Exception as error:
            if self.mode == "offline" or self.config.wandb == "online":
                raise
            logger.warning("wandb goes on offline: %s; `wandb sync` later", _line(error))
            return Wandb(self.config, name, self.folder, "offline", known)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        at = int(step or 0)
        self._send(group_of(metrics), at, lambda tracker: tracker.log(metrics, at))

    def replay(self, points: list[dict[str, float]], samples: dict[int, Rows]) -> None:
        """What was logged up to the checkpoint, in order; `samples` by the step of their points."""
        for point in points:
            step = int(point["step"])
            self.log_metrics({k: v for k, v in point.items() if k != "step"}, step)
            if group_of(point) == "val":
                self.log_samples(samples.pop(step, []), step)

    def log_samples(self, rows: Rows, step: int) -> None:
        """A table of texts, a row each with the same keys."""
        if rows:
            self._send("samples", step, lambda tracker: tracker.samples(rows, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """`begin` has done it."""

    def close(self, succeeded: bool) -> None:
        for kind, tracker in self.open.items():
            try:
                tracker.close(succeeded)
            except Exception as error:
                logger.warning("%s could not be closed: %s", kind, _line(error))
        self.open = {}

    def _send(self, group: str, step: int, send: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self.open.items()):
            logged = self.notes[kind]["logged"]
            if step <= logged.get(group, -1):
                continue
            try:
                send(tracker)
            except Exception as error:
                del self.open[kind]
                logger.warning("the run goes on without %s: %s", kind, _line(error))
            logged[group] = step
        if self.open:
            self._write_notes()

    def _write_notes(self) -> None:
        try:
            write_json(self.folder / NOTES, self.notes)
        except OSError as error:
            logger.warning("%s cannot be written: %s", NOTES, error)


def build_loggers(config: LoggerConfig, name: str, run_dir: Path, mode: WandbMode) -> list[Logger]:
    """The CSV first, which the report is made from."""
    csv = CSVLogger(run_dir, name=None, version=CSV_FOLDER)
    return [csv, *([Trackers(config, name, run_dir, mode)] if config.trackers else [])]


def group_of(metrics: Iterable[str]) -> str:
    """What is logged in one call, and at most once in a step."""
    groups = {key.partition("/")[0] for key in metrics}
    return next((group for group in ("val", "train") if group in groups), "health")


def trackers_of(loggers: list[Logger]) -> Trackers | None:
    return next((x for x in loggers if isinstance(x, Trackers)), None)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _cell(text: Any) -> str:
    """Of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


@contextlib.contextmanager
def _quiet(*names: str) -> Any:
    """Without what these packages say below a warning."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
