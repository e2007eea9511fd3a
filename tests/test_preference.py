"""objective=dpo: the loss of pairs, its gradients, and the reference under the adapter.

The truth knows nothing of rows, packing, adapters or our ops: transformers' Mamba2ForCausalLM, once
with the base's weights and once with those that the adapter makes of them by its formula, each
document alone in float64; the loss of a pair is written out here. Where TRL is installed, its
DPOTrainer too. What is compared went through TextDataModule and PreferenceModule in Lightning.
"""

import json
import math
import random
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from mamba2_train.adapters import add_lora
from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.data.config import DataConfig
from mamba2_train.data.datamodule import TextDataModule
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2LM
from mamba2_train.preference import PreferenceModule, adapters_off, by_answer
from mamba2_train.schema import AdamWConfig, DpoConfig, SchedulerConfig

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import preference_ranks

SEQ_LEN = 128
# in tokens, about
PROMPTS = (3, 12, 1, 30, 7, 5, 20)
CHOSEN = (40, 1, 20, 9, 2, 33, 14)
REJECTED = (5, 30, 1, 22, 40, 3, 14)
WORDS = ["love", "is", "a", "the", "of", "fool", "wise", "heart", "never", "money", "time", "world"]
RANK, ALPHA = 3, 6
IN_FULL = ["conv1d", "A_log", "norm"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER / "tiny_base")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = random.Random(0)

    def words(n):
        return " ".join(rng.choices(WORDS, k=n))

    rows = [
        {"prompt": words(p), "chosen": f" {words(c)}", "rejected": f" {words(r)}"}
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def build(small_config, random_model):
    """A model whose every weight is random, the adapter's two factors too unless it is fresh."""

    def make(dtype=torch.float64, in_full=(), fresh=False, checkpointing="none", **fields):
        config = small_config(vocab_size=4096, tie_embeddings=False, **fields)
        model = random_model(config, dtype=torch.float64)
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        targets = ["in_proj", "out_proj", "embeddings"]
        add_lora(model, targets, r=RANK, alpha=ALPHA, dropout=0.0, in_full=in_full)
        generator = torch.Generator().manual_seed(1)
        if not fresh:
            for name, p in model.named_parameters():
                if "lora_" in name:
                    draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.data = 0.05 * draw
        model.set_checkpointing(checkpointing)
        return model.to(dtype), base

    return make


def moved(model):
    """As a first step of training would: what is trained in full is no longer what it was."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" not in name:
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data += 0.05 * draw.to(p.dtype)


def adapted_weights(model, base):
    """The weights that the adapter makes of the base: W + alpha / r B A."""
    now = {name: p.detach().double() for name, p in model.named_parameters()}
    weights = {}
    for name in base:
        module, _, leaf = name.rpartition(".")
        key = name if name in now else f"{module}.base_layer.{leaf}"
        weights[name] = now[key].clone()
        if f"{module}.lora_A.default.weight" in now:
            A, B = (now[f"{module}.lora_{x}.default.weight"] for x in "AB")
            weights[name] += ALPHA / RANK * B @ A
        elif f"{module}.lora_embedding_A.default" in now:
            A, B = (now[f"{module}.lora_embedding_{x}.default"] for x in "AB")
            weights[name] += ALPHA / RANK * (B @ A).T
    return weights


def documents(tokenizer, source):
    """Of each pair the ids of both documents, and the length of the prompt."""
    found = []
    for row in map(json.loads, source.read_text().splitlines()):
        prompt = tokenizer.encode(row["prompt"])
        for side in ("chosen", "rejected"):
            ids = [*prompt, *tokenizer.encode(row[side]), tokenizer.eos_token_id]
            found.append((torch.tensor([ids]), len(prompt)))
    return found


def logps(model, alone):
    """(pairs, 2): each document by itself, in a batch of one."""
    sums = []
    for ids, n_prompt in alone:
        # transformers' logits are float32 whatever its weights are
        log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        of_tokens = log_probs.gather(1, ids[0, 1:, None])[n_prompt - 1 :]
        sums.append(of_tokens.sum())
    return torch.stack(sums).view(-1, 2)


def pair_loss(policy, reference, lengths, beta, loss_type="sigmoid", smoothing=0.0):
    """From the papers, a pair at a time."""
    losses = []
    for (c, r), (ref_c, ref_r), (n_c, n_r) in zip(policy, reference, lengths, strict=True):
        d = beta * ((c - ref_c) - (r - ref_r))
        if loss_type == "sigmoid":
            right = torch.log1p(torch.exp(-d))
            wrong = torch.log1p(torch.exp(d))
            losses.append((1 - smoothing) * right + smoothing * wrong)
        elif loss_type == "ipo":
            losses.append(((c - ref_c) / n_c - (r - ref_r) / n_r - 0.5 / beta) ** 2)
        else:
            losses.append((1 - d).clamp(min=0))
    return torch.stack(losses).mean()


class Truth:
    def __init__(self, transformers_model, build, alone, **options):
        model, base = build(**options)
        config = model.config
        with torch.no_grad():
            self.reference = logps(transformers_model(config, base), alone)
            if options.get("in_full"):
                moved(model)
            self.policy = logps(transformers_model(config, adapted_weights(model, base)), alone)
        lengths = torch.tensor([ids.shape[1] - n for ids, n in alone]).view(-1, 2)
        self.lengths = lengths
        # for gradients to 1e-9: ours, each document alone; transformers computes parts in float32
        plain = Mamba2LM(config).double()
        plain.load_state_dict(base)
        with torch.no_grad():
            self.own_reference = logps(plain, alone)
        torch.testing.assert_close(self.own_reference, self.reference, rtol=1e-6, atol=1e-4)
        self.model, self.alone = model, alone

    def loss(self, **objective):
        return pair_loss(self.policy, self.reference, self.lengths, **objective).item()

    def gradients(self, **objective):
        self.model.zero_grad(set_to_none=True)
        policy = logps(self.model, self.alone)
        torch.testing.assert_close(policy, self.policy, rtol=1e-6, atol=1e-4)
        pair_loss(policy, self.own_reference, self.lengths, **objective).backward()
        return gradients(self.model)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


class Plain(PreferenceModule):
    """Steps of nothing, after which the gradients still lie there, as scaled."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def trainer_for(dtype, **options):
    return L.Trainer(
        accelerator="cpu",
        precision="64-true" if dtype == torch.float64 else "32-true",
        logger=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def module_of(model, beta=0.1, loss_type="sigmoid", smoothing=0.0):
    return Plain(
        model,
        AdamWConfig(kind="adamw", lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0),
        SchedulerConfig(kind="constant", warmup_fraction=0.0, min_lr_fraction=1.0),
        1,
        objective=DpoConfig(kind="dpo", beta=beta, loss_type=loss_type, label_smoothing=smoothing),
    )


def trained(module, data):
    """Metrics and gradients of a step over all there is."""
    model = module.model
    n = len(data.train_dataloader())
    trainer = trainer_for(
        model.lm_head.weight.dtype, max_steps=1, accumulate_grad_batches=n, limit_val_batches=0
    )
    model.zero_grad(set_to_none=True)
    trainer.fit(module, datamodule=data)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return metrics, gradients(model)


def loaded(tokenizer, source, **settings):
    settings = {"seq_len": SEQ_LEN, "batch_size": 100, "shuffle": False} | settings
    path = str(source)
    config = DataConfig(source=path, validation_source=path, loss_on="pairs", **settings)
    data = TextDataModule(config, tokenizer, seed=0)
    data.setup()
    return data


def assert_close(got, expected, limit=1e-9):
    assert got.keys() == expected.keys()
    assert got
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= limit * gradient.norm(), name
        assert gradient.norm() > 0, name


@pytest.fixture(scope="module")
def truth(transformers_model, build, tokenizer, source):
    return Truth(transformers_model, build, documents(tokenizer, source))


@pytest.mark.parametrize(
    "objective",
    [
        {"beta": 0.1},
        {"beta": 0.5, "smoothing": 0.2},
        {"beta": 0.3, "loss_type": "ipo"},
        {"beta": 0.4, "loss_type": "hinge"},
    ],
    ids=["sigmoid", "smoothed", "ipo", "hinge"],
)
def test_packed_pairs_equal_each_document_alone(truth, build, tokenizer, source, objective):
    data = loaded(tokenizer, source)
    (batch,) = data.train_dataloader()
    assert (batch["seq_idx"].max(1).values >= 3).any()  # two pairs in a row
    metrics, found = trained(module_of(build()[0], **objective), data)
    # what is logged is float32
    assert metrics["train/loss"] == pytest.approx(truth.loss(**objective), rel=1e-5)
    assert_close(found, truth.gradients(**objective))


@pytest.mark.parametrize(
    ("settings", "checkpointing"),
    [
        ({"batch_size": 1}, "none"),
        ({"batch_size": 2, "packing": "none", "padding_side": "left"}, "full"),
        ({"batch_size": 1, "num_workers": 1, "seq_len": 100}, "selective"),
    ],
    ids=["accumulated", "one pair to a row", "other rows"],
)
def test_any_arrangement_is_one_batch(truth, build, tokenizer, source, settings, checkpointing):
    data = loaded(tokenizer, source, **settings)
    pairs = [int(b["seq_idx"].max(1).values.add(1).sum()) // 2 for b in data.train_dataloader()]
    assert sum(pairs) == len(PROMPTS)
    assert len(set(pairs)) > 1  # so that a mean of means would be another number
    metrics, found = trained(module_of(build(checkpointing=checkpointing)[0]), data)
    assert metrics["train/loss"] == pytest.approx(truth.loss(beta=0.1), rel=1e-5)
    assert_close(found, truth.gradients(beta=0.1))


def test_metrics_are_those_of_the_pairs(truth, build, tokenizer, source):
    data = loaded(tokenizer, source, batch_size=1)
    module = module_of(build()[0], beta=0.2)
    metrics, _ = trained(module, data)
    rewards = 0.2 * (truth.policy - truth.reference)
    ahead = (rewards[:, 0] > rewards[:, 1]).double()
    assert 0 < ahead.mean() < 1
    expected = {
        "loss": truth.loss(beta=0.2),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "rewards/accuracy": ahead.mean(),
        "logps/chosen": truth.policy[:, 0].mean(),
        "logps/rejected": truth.policy[:, 1].mean(),
    }
    validated = trainer_for(torch.float64).validate(module, datamodule=data, verbose=False)[0]
    for name, value in expected.items():
        assert metrics[f"train/{name}"] == pytest.approx(float(value), rel=1e-5)
        assert validated[f"val/{name}"] == pytest.approx(float(value), rel=1e-5)
    assert "val/perplexity" not in validated


def test_what_is_trained_in_full_is_off_in_the_reference(
    transformers_model, build, tokenizer, source
):
    alone = documents(tokenizer, source)
    truth = Truth(transformers_model, build, alone, in_full=IN_FULL)
    model, _ = build(in_full=IN_FULL)
    module = module_of(model)  # the reference is what the weights are now
    moved(model)
    metrics, found = trained(module, loaded(tokenizer, source))
    assert metrics["train/loss"] == pytest.approx(truth.loss(beta=0.1), rel=1e-5)
    assert_close(found, truth.gradients(beta=0.1))
    names = {name for name in found if "lora_" not in name}
    assert len(names) == 2 * 5 + 1  # of two blocks, and the last norm
    # nor is it saved
    assert not [name for name in module._trained() if "copies" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_loses_log_2_exactly(build, tokenizer, source, dtype):
    model, _ = build(torch.float32, fresh=True, checkpointing="selective")
    if dtype == torch.bfloat16:  # as precision=bf16 has it: LoRA alone in float32
        for name, p in model.named_parameters():
            if p.dim() > 1 and "lora_" not in name and "conv" not in name:
                p.data = p.data.bfloat16()
    module = module_of(model)
    (batch,) = loaded(tokenizer, source).train_dataloader()
    loss, n_pairs = module._losses(batch)
    assert n_pairs == len(PROMPTS)
    assert loss.item() / len(PROMPTS) == pytest.approx(math.log(2), rel=1e-15)
    loss.backward()
    moving = {n: p.grad.norm() > 0 for n, p in model.named_parameters() if p.requires_grad}
    # what begins as zero moves first: its partner's gradient is a product with it
    zero = {n for n, p in model.named_parameters() if p.requires_grad and not p.any()}
    assert len(zero) == 5
    assert {name for name, moves in moving.items() if moves} == zero


def test_the_adapter_is_off_and_on_again(build, tokenizer, source):
    model, _ = build()
    (batch,) = loaded(tokenizer, source).train_dataloader()
    trained_before = [n for n, p in model.named_parameters() if p.requires_grad]
    ids, seq_idx = batch["input_ids"], batch["seq_idx"]
    with torch.no_grad():
        on = model(ids, seq_idx=seq_idx).logits
        with adapters_off(model):
            off = model(ids, seq_idx=seq_idx).logits
            assert [n for n, p in model.named_parameters() if p.requires_grad] == trained_before
        with pytest.raises(IndexError), adapters_off(model):
            model(ids + 4096)
        again = model(ids, seq_idx=seq_idx).logits
    assert torch.equal(on, again)
    assert (on - off).abs().max() > 1e-2


def test_sums_go_to_their_documents():
    seq_idx = torch.tensor([[0, 0, 1, 1, 2, 3], [-1, 0, 0, 1, 1, -1], [-1] * 6])
    values = torch.tensor([[1.0, 2, 4, 8, 16, 32], [64, 1, 2, 4, 8, 64], [9] * 6])
    sums = by_answer(values, seq_idx)
    assert sums.shape == (3, 4, 2)
    assert sums[:, :2].tolist() == [[[3, 12], [16, 32]], [[3, 12], [0, 0]], [[0, 0], [0, 0]]]
    assert not sums[:, 2:].any()


def test_trl_comes_to_the_same_loss_and_metrics(
    build, transformers_model, tokenizer, source, tmp_path
):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, base = build()
    config = model.config
    policy = transformers_model(config, adapted_weights(model, base)).float()
    reference = transformers_model(config, base).float()
    rows = list(map(json.loads, source.read_text().splitlines()))
    for objective in (
        {"beta": 0.1},
        {"beta": 0.3, "loss_type": "ipo"},
        {"beta": 0.4, "loss_type": "hinge"},
    ):
        arguments = trl.DPOConfig(
            output_dir=str(tmp_path),
            beta=objective["beta"],
            loss_type=[objective.get("loss_type", "sigmoid")],
            per_device_train_batch_size=len(rows),
            gradient_checkpointing=False,
            max_length=None,
            use_cpu=True,
            bf16=False,
            report_to=[],
            dataset_num_proc=None,
        )
        theirs = trl.DPOTrainer(
            model=policy,
            ref_model=reference,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        (batch,) = theirs.get_train_dataloader()
        expected = theirs.compute_loss(theirs.model, batch).item()
        metrics, _ = trained(
            module_of(build(torch.float32)[0], **objective), loaded(tokenizer, source)
        )
        assert metrics["train/loss"] == pytest.approx(expected, abs=1e-4, rel=1e-4)
        logged = theirs._metrics["train"]
        for ours, name in (
            ("rewards/chosen", "rewards/chosen"),
            ("rewards/rejected", "rewards/rejected"),
            ("rewards/margins", "rewards/margins"),
            ("rewards/accuracy", "rewards/accuracies"),
            ("logps/chosen", "logps/chosen"),
            ("logps/rejected", "logps/rejected"),
        ):
            assert metrics[f"train/{ours}"] == pytest.approx(logged[name][-1], rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory, small_config, random_model):
    """A folder with a base, and the steps of one process with all rows of a step in one batch."""
    folder = tmp_path_factory.mktemp("ranks")
    save_pretrained(random_model(small_config(), dtype=torch.float64), folder / "base")
    return folder, preference_ranks.run(folder, "single", 1)


def assert_equal_runs(found, expected, limit):
    torch.testing.assert_close(found["metrics"], expected["metrics"], rtol=1e-5, atol=1e-6)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() < limit, name


def test_two_ranks_equal_one_batch(one_batch, torchrun):
    """By copies, by weights spread over them, and by heads spread over them."""
    folder, expected = one_batch
    strategies = "ddp", "fsdp", "tp"
    torchrun("preference_ranks.py", str(folder), *strategies)
    for strategy in strategies:
        assert_equal_runs(torch.load(folder / f"{strategy}.pt"), expected, 1e-9)


def test_a_resumed_run_over_4_bits_comes_to_the_same_bits(
    small_config, random_model, tokenizer, tmp_path, train
):
    """What is trained in full has moved by then: the reference must be the base's again."""
    save_pretrained(random_model(small_config(d_model=64, vocab_size=4096)), tmp_path / "base")
    save_tokenizer(tokenizer, tmp_path / "base")
    common = [
        *("objective=dpo", "data=local", "data.source=embedded:preferences", "data.limit_rows=60"),
        *(f"model.source={tmp_path / 'base'}", "quantization=nf4", "adapter.train=[conv1d,A_log]"),
        *("data.seq_len=160", "data.batch_size=2", "trainer.accumulate=2", "trainer.log_every=1"),
        *("scheduler=constant", "trainer.validate_every=2", "optimizer.lr=0.01", "logger=csv"),
        *("callbacks.samples.prompts=[]", "trainer.progress_bar=false", "trainer.max_epochs=null"),
        "scheduler.warmup_fraction=0",
    ]
    for run, steps in (("whole", 4), ("cut", 2), ("cut", 4)):
        train(*common, f"run_dir={tmp_path / run}", f"trainer.max_steps={steps}", "resume=auto")
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "cut")]
    assert results[1]["resumed"] == 2
    assert results[0]["base"]["val/loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert results[0]["final"] == results[1]["final"]
    assert results[0]["final"]["val/loss"] < math.log(2)
    for file in ("adapter_model.safetensors", "trained_in_full.safetensors"):
        whole, cut = ((tmp_path / run / "adapter" / file).read_bytes() for run in ("whole", "cut"))
        assert whole == cut


def test_pairs_too_long(tokenizer, source):
    with pytest.raises(UserError, match=r"pairs.jsonl, line \d: a pair stays .* \d+ tokens"):
        loaded(tokenizer, source, seq_len=40)
    data = loaded(tokenizer, source, seq_len=40, long_documents="truncate", packing="none")
    whole = {tuple(ids[0].tolist()): n for ids, n in documents(tokenizer, source)}
    for batch in data.train_dataloader():
        for row, seq_idx in zip(batch["input_ids"], batch["seq_idx"], strict=True):
            sides = [tuple(row[seq_idx == side].tolist()) for side in (0, 1)]
            assert sum(map(len, sides)) <= 40
            assert all(any(w[: len(side)] == side for w in whole) for side in sides)
            cut = [side for side in sides if side not in whole]
            # what the shorter one leaves is used
            assert not cut or sum(map(len, sides)) >= 39


def test_only_pairs_will_do(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="columns chosen and rejected, and rows of format"):
        loaded(tokenizer, path)
