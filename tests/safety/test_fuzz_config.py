"""Random settings: each set trains a step, or is refused in one line that names what is wrong.

Fields and their types are the schema's own; the values are some that fit and some that do not.
"""

import random
import types
import typing
from collections import Counter

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mamba2_train.schema import TrainConfig

SMALL = ["model.source=base", "trainer.max_steps=1", "callbacks.samples.prompts=[]"]
CHOICES = {
    "adapter": ["lora", "full"],
    "quantization": ["none", "nf4", "int8", "fp4"],
    "optimizer": ["adamw", "adafactor", "muon", "adamw_8bit", "nonsense"],
    "scheduler": ["cosine", "linear", "wsd", "constant"],
    "strategy": ["auto", "single", "ddp", "fsdp"],
    "precision": ["fp32", "bf16", "bf16-mixed"],
    "long_context": ["none", "exact", "truncated"],
    "logger": ["csv", "csv", "nowhere"],
}
# what would start other processes, wait for a network, or write elsewhere
LEFT = {
    *("run_dir", "resume", "debug", "name", "strategy.num_nodes", "strategy.devices"),
    *("strategy.accelerator", "logger.wandb", "data.num_workers", "model.preset"),
    *("strategy.dry_run", "strategy.data_size", "strategy.tensor_size", "strategy.kind"),
    *("callbacks.samples.max_new_tokens", "trainer.max_steps", "trainer.max_epochs"),
}
ODD = [
    *("-1", "0", "1", "2", "7", "100", "0.5", "1e-3", "1e30", "-0.0", ".inf", ".nan", "null"),
    *("true", "false", "''", "' '", "abc", "[]", "[1,2]", "[a,b]", "{}", "{a: 1}", "[[1]]"),
    *("99999999999999999999", "../x", "'\u2028'", "'a b'", "\u00e9", "0x10", "1_000", "'[x](y)'"),
]


def fields(model, path=""):
    """(path, type) of every leaf below a group, those of each member of a union too."""
    for name, field in model.model_fields.items():
        where = f"{path}{name}"
        groups = [
            t for t in parts(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)
        ]
        if groups and not where.startswith("data.sources"):
            for group in groups:
                yield from fields(group, f"{where}.")
        else:
            yield where, field.annotation, field.default


def parts(annotation):
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for inner in typing.get_args(annotation):
            yield from parts(inner)
    else:
        yield annotation


FIELDS = [f for f in {f[0]: f for f in fields(TrainConfig)}.values() if f[0] not in LEFT]


def fitting(rng, annotation, default):
    """A value of the type, as the command line has it."""
    some = []
    for part in parts(annotation):
        if typing.get_origin(part) is typing.Literal:
            some += [str(value) for value in typing.get_args(part)]
        some += {
            int: ["1", "2", "3", "16"],
            float: ["0.1", "0.5", "1.0", "1e-4"],
            bool: ["true", "false"],
            type(None): ["null"],
        }.get(part if isinstance(part, type) else None, [])
    if default is not PydanticUndefined and isinstance(default, bool | int | float):
        some.append(str(default).lower())
    return rng.choice(some or ODD)


def drawn(seed):
    """A set of overrides."""
    rng = random.Random(seed)
    chosen = [
        f"{g}={rng.choice(CHOICES[g])}" for g in rng.sample(sorted(CHOICES), rng.choice([0, 1, 2]))
    ]
    for path, annotation, default in rng.sample(FIELDS, rng.choice([1, 1, 2, 3])):
        wrong = rng.random() < 0.3
        value = rng.choice(ODD) if wrong else fitting(rng, annotation, default)
        chosen.append(f"{'++' if rng.random() < 0.8 else ''}{path}={value}")
    return chosen


def outcome(code, said):
    if code == 0:
        return "ran"
    errors = [line for line in said.splitlines() if line.startswith("error")]
    if code == 1 and len(errors) == 1 and "Traceback" not in said and len(errors[0]) > 10:
        return "refused"
    return f"{code}: {said[-1500:]}"


@pytest.mark.parametrize(
    "seeds",
    [
        range(15),
        range(15, 30),
        range(146, 147),  # stops early, in an epoch that ends without a validation
        *(
            pytest.param(range(a, a + 50), marks=[pytest.mark.slow, pytest.mark.timeout(1500)])
            for a in range(0, 500, 50)
        ),
    ],
    ids=str,
)
def test_settings_at_random(folder, safe, seeds):
    def without_report():  # which takes longer than all else
        from mamba2_train import run

        run.write_report = lambda folder: folder / "report.html"

    outcomes = Counter()
    for seed in seeds:
        overrides = drawn(seed)
        code, said = safe.run(
            folder, "train", *SMALL, f"run_dir=fuzz-{seed}", *overrides, before=without_report
        )
        found = outcome(code, said)
        assert found in ("ran", "refused"), (seed, overrides, found)
        outcomes[found] += 1
    assert min(outcomes["ran"], outcomes["refused"]) >= len(seeds) // 5, outcomes


def test_the_judge_sees_a_traceback():
    assert outcome(1, "error: data.seq_len: too small") == "refused"
    assert outcome(1, "Traceback (most recent call last):\nerror: data.seq_len: x") != "refused"
    assert outcome(-11, "") != "refused"
