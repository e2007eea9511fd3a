"""The harness's adapter: its own evaluation of tiny local tasks, offline, against sums by hand."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.generation import generate
from mamba2_train.harness import HarnessModel

BASE = FOLDER / "tiny_base"


@pytest.fixture(scope="module")
def harness():
    return HarnessModel(load_pretrained(BASE), load_tokenizer(BASE), batch_size=3)


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def sum_by_hand(harness, context, continuation):
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logp = F.log_softmax(harness.model(ids).logits[0].double(), -1)
    part = logp[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    greedy = bool((part.argmax(-1) == target).all())
    return part.gather(1, target[:, None]).sum().item(), greedy


def test_it_is_registered():
    assert get_model("mamba2-train") is HarnessModel


def test_loglikelihoods(harness):
    encode = harness.tokenizer.encode
    pairs = [
        ("Love is", " not"),
        ("It", " was the best of times, it was"),
        ("", "The LORD"),
        ("A long context, and then some more of it,", " a"),
        ("In the", " beginning"),
    ]
    greedy = harness.tokenizer.decode(
        generate(harness.model, torch.tensor([encode("Love is")]), max_new_tokens=1)[0, -1:]
    )
    pairs.append(("Love is", greedy))
    found = harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        head = encode(context) or [harness.eot_token_id]
        expected, expected_greedy = sum_by_hand(harness, head, encode(continuation))
        assert value == pytest.approx(expected, rel=1e-4)
        assert is_greedy == expected_greedy
    assert found[-1][1]
    assert not found[1][1]


def test_rolling_over_a_long_text_equals_one_pass(harness, monkeypatch):
    monkeypatch.setattr("mamba2_train.harness.SEGMENT", 7)
    text = "It was the best of times, it was the worst of times, it was the age of wisdom."
    (found,) = harness.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text,)), disable_tqdm=True
    )
    expected, _ = sum_by_hand(harness, [harness.eot_token_id], harness.tokenizer.encode(text))
    assert found == pytest.approx(expected, rel=1e-5)


def test_generate_until(harness):
    ids = harness.tokenizer.encode("Love is")
    out = generate(harness.model, torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :]
    text = harness.tokenizer.decode(out)
    stop = text[6:9]
    found = harness.generate_until(
        requests(
            "generate_until",
            ("Love is", {"until": [stop], "max_gen_toks": 12}),
            ("Love is", {"until": ["@@"], "max_gen_toks": 12, "do_sample": False}),
        ),
        disable_tqdm=True,
    )
    assert found == [text.split(stop)[0], text]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A task of choices and one of perplexity, as files; to index the harness's own takes long."""
    own = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own)
    rows = [
        {"q": "Love is", "choices": [" not", " purple"], "answer": 0},
        {"q": "In the", "choices": [" zebra", " beginning"], "answer": 1},
        {"q": "The LORD", "choices": [" said", " seventeen"], "answer": 0},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "In the beginning was the word."}) + "\n")
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    choices = common | {
        "task": "tiny_choices",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}},
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    text = common | {
        "task": "tiny_text",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "t.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in (choices, text):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder, rows


def test_the_command_runs_local_tasks(harness, tasks, tmp_path, monkeypatch, capsys):
    from mamba2_train.commands import evaluate as command

    folder, rows = tasks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        ["mamba2-eval", "tasks=[tiny_choices,tiny_text]", f"task_path={folder}", "out=e.json"],
    )
    command.main()
    results = json.loads((tmp_path / "e.json").read_text())["results"]["embedded"]
    encode = harness.tokenizer.encode
    right = 0
    for row in rows:
        sums = [sum_by_hand(harness, encode(row["q"]), encode(c))[0] for c in row["choices"]]
        right += sums.index(max(sums)) == row["answer"]
    assert results["tiny_choices"]["acc"] == pytest.approx(right / 3)
    text = "In the beginning was the word."
    total, _ = sum_by_hand(harness, [harness.eot_token_id], encode(text))
    bits = -total / len(text.encode()) / torch.tensor(2.0).log().item()
    assert results["tiny_text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert "tiny_choices acc" in capsys.readouterr().out


def test_answers_of_several_processes_come_in_order(harness, monkeypatch):
    pairs = [(a, " and more") for a in ("Love is", "It", "In the beginning of", "A", "")]
    expected = harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    given = []

    def gather(parts, mine):
        given.append(mine)
        parts[:] = given[-2:]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for rank in (0, 1):  # the second has the answers of the first
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        if rank == 0:
            with pytest.raises(IndexError):
                harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        else:
            found = harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [len(answers) for answers in given] == [3, 2]
    assert found == [(pytest.approx(a, rel=1e-5), b) for a, b in expected]


@pytest.mark.slow
def test_two_processes_answer_like_one(tasks, tmp_path, monkeypatch, torchrun):
    from mamba2_train.commands import evaluate as command

    folder, _ = tasks
    chosen = ["tasks=[tiny_choices,tiny_text]", f"task_path={folder}"]
    monkeypatch.setattr("sys.argv", ["mamba2-eval", *chosen, f"out={tmp_path / 'one.json'}"])
    command.main()
    torchrun("evaluate.py", *chosen, "strategy=ddp", f"out={tmp_path / 'two.json'}")
    one, two = (
        json.loads((tmp_path / f"{name}.json").read_text())["results"]["embedded"]
        for name in ("one", "two")
    )
    assert one["tiny_choices"] == two["tiny_choices"]
    assert two["tiny_text"]["bits_per_byte"] == pytest.approx(
        one["tiny_text"]["bits_per_byte"], rel=1e-6
    )


def test_an_unknown_task_is_refused(tasks):
    from mamba2_train.commands.evaluate import Subject, _tasks
    from mamba2_train.schema import EvaluateConfig

    config = EvaluateConfig.model_construct(tasks=["tinny"], task_path=tasks[0])
    with pytest.raises(UserError, match="no task 'tinny'"):
        _tasks(Subject("embedded", None), config, None)
