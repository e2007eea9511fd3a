"""Rows of a file to gradients, by the path that training takes: no arrangement changes a number.

The truth knows nothing of rows, packing, padding, labels or windows: each document by itself goes
through the model, one batch of one, and its cross-entropy is written out here. What is compared
went through TextDataModule, its collator and Mamba2Module inside Lightning's Trainer.

float64 must agree to 1e-10; float32 to 1e-5 of the *float64* truth, or three times as far from it
as the documents by themselves are in float32.
"""

import json
import random

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from mamba2_train.adapters import add_lora
from mamba2_train.assets import FOLDER
from mamba2_train.data.config import DataConfig
from mamba2_train.data.datamodule import TextDataModule
from mamba2_train.data.packing import IGNORED
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.module import Mamba2Module
from mamba2_train.schema import AdamWConfig, SchedulerConfig

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}
SEQ_LEN = 160
# in tokens, about; some beyond the scan's chunks of 64, some with a single learned token
PROMPTS = (3, 40, 1, 90, 12, 5, 70, 2, 30, 9, 55, 4, 20, 1)
COMPLETIONS = (110, 1, 60, 30, 2, 75, 44, 1, 9, 130, 3, 25, 15, 6)
WORDS = ["love", "is", "a", "the", "of", "fool", "wise", "heart", "never", "money", "time", "world"]

# adapter, model, checkpointing
VARIANTS = {
    "whole": ("full", {}, "none"),
    "whole, 8 groups": ("full", {"n_groups": 8, "use_bias": True}, "full"),
    "lora, 2 groups": ("lora", {"n_groups": 2, "tie_embeddings": False}, "selective"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER / "tiny_base")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=prompt)),
            "completion": " " + " ".join(rng.choices(WORDS, k=completion)),
        }
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": row["prompt"]} for row in rows]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


@pytest.fixture(params=VARIANTS, scope="module")
def build(request, small_config, random_model):
    """The variant's model in a dtype: every weight random, both of LoRA's included."""
    adapter, fields, checkpointing = VARIANTS[request.param]

    def make(dtype):
        model = random_model(small_config(vocab_size=4096, **fields), dtype=torch.float64)
        if adapter == "lora":
            targets = ["in_proj", "out_proj", "embeddings"]
            if not model.config.tie_embeddings:
                targets.append("lm_head")
            add_lora(model, targets, r=4, alpha=8)
            generator = torch.Generator().manual_seed(1)
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data = 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        model.set_checkpointing(checkpointing)
        return model.to(dtype)

    return make


def documents(tokenizer, source):
    """Ids and learned mask of each row, written out here."""
    found = []
    for row in map(json.loads, (source / "train.jsonl").read_text().splitlines()):
        prompt = tokenizer.encode(row["prompt"])
        completion = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        learned = [False] * len(prompt) + [True] * len(completion)
        found.append((torch.tensor([prompt + completion]), torch.tensor(learned)))
    return found


def truth(model, alone):
    """Mean loss, every gradient, and logits by document."""
    total, count, logits = torch.zeros(()).to(model.lm_head.weight.dtype), 0, {}
    model.zero_grad(set_to_none=True)
    for ids, learned in alone:
        out = model(ids).logits[0]
        logits[tuple(ids[0].tolist())] = out.detach()
        targets = ids[0, 1:][learned[1:]]
        total = total + F.cross_entropy(out[:-1][learned[1:]], targets, reduction="sum")
        count += len(targets)
    (total / count).backward()
    return (total / count).item(), gradients(model), logits


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert found
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return found


class Plain(Mamba2Module):
    """Steps of SGD, after which the gradients still lie there: as scaled, before any optimizer."""

    rate = 0.0

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.rate)


def trained(model, data, *, accumulate=None, rate=0.0, steps=1):
    """Loss and gradients of the last step of a run; one step over all there is when left out."""
    dtype = model.lm_head.weight.dtype
    module = Plain(
        model,
        AdamWConfig(kind="adamw", lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0),
        SchedulerConfig(kind="constant", warmup_fraction=0.0, min_lr_fraction=1.0),
        total_steps=steps,
    )
    module.rate = rate
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true" if dtype == torch.float64 else "32-true",
        max_steps=steps,
        accumulate_grad_batches=accumulate or len(data.train_dataloader()),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.zero_grad(set_to_none=True)
    trainer.fit(module, datamodule=data)
    return trainer.callback_metrics["train/loss"].item(), gradients(model)


def loaded(tokenizer, source, file="train.jsonl", **settings):
    data = TextDataModule(
        DataConfig(
            source=str(source / file),
            validation_source=str(source / file),
            **({"seq_len": SEQ_LEN, "batch_size": 100} | settings),
        ),
        tokenizer,
        seed=0,
    )
    data.setup()
    return data


def error(got, expected):
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()


class Check:
    """Compares with the float64 truth, and in float32 with what float32 costs a document alone."""

    def __init__(self, build, alone, dtype):
        self.dtype = dtype
        self.loss, self.gradients, self.logits = truth(build(torch.float64), alone)
        self.price = {}
        if dtype == torch.float32:
            _, rounded, _ = truth(build(torch.float32), alone)
            self.price = {n: error(rounded[n], g) for n, g in self.gradients.items()}

    def step(self, loss, gradients):
        limit = LIMIT[self.dtype]
        # the logged loss is float32 whatever the model is
        assert loss == pytest.approx(self.loss, rel=1e-6)
        assert gradients.keys() == self.gradients.keys()
        for name, expected in self.gradients.items():
            most = max(limit, 3 * self.price.get(name, 0.0))
            assert most < 1e-4, name
            assert error(gradients[name], expected) <= most, name

    def logits_of(self, model, batch):
        """Each document's, found in the batch by its tokens; returns how many there are."""
        with torch.no_grad():
            logits = model(batch["input_ids"], seq_idx=batch["seq_idx"]).logits
        found = 0
        for row, ids in enumerate(batch["input_ids"]):
            for document in range(int(batch["seq_idx"][row].max()) + 1):
                at = batch["seq_idx"][row] == document
                expected = self.logits[tuple(ids[at].tolist())]
                assert error(logits[row, at], expected) <= LIMIT[self.dtype]
                found += 1
        return found


@pytest.fixture(params=LIMIT, ids=["fp64", "fp32"], scope="module")
def check(request, build, tokenizer, source):
    return Check(build, documents(tokenizer, source), request.param)


def test_packed_documents_equal_each_alone(build, check, tokenizer, source):
    data = loaded(tokenizer, source)
    (batch,) = data.train_dataloader()
    starts = batch["seq_idx"].diff(dim=1) == 1
    assert starts.sum(1).max() >= 2  # a row of three documents at least
    assert (starts.nonzero()[:, 1] % 64 > 1).any()  # inside a chunk of the scan
    model = build(check.dtype)
    assert check.logits_of(model, batch) == len(PROMPTS)
    check.step(*trained(model, data))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_unpadded_ones(build, check, tokenizer, source, side):
    data = loaded(tokenizer, source, packing="none", padding_side=side)
    (batch,) = data.train_dataloader()
    widths = (batch["seq_idx"] >= 0).sum(1)
    assert widths.min() < 20 < 140 < widths.max()
    model = build(check.dtype)
    assert check.logits_of(model, batch) == len(PROMPTS)
    check.step(*trained(model, data))


@pytest.mark.parametrize(("packing", "batch_size"), [("bfd", 1), ("none", 4)])
def test_any_accumulation_equals_one_batch(build, check, tokenizer, source, packing, batch_size):
    """Micro-batches of very unequal numbers of learned tokens, the last one of fewer rows."""
    data = loaded(tokenizer, source, packing=packing, batch_size=batch_size)
    counts = [int((b["labels"] != IGNORED).sum()) for b in data.train_dataloader()]
    assert len(counts) > 1
    assert max(counts) > 1.5 * min(counts)
    check.step(*trained(build(check.dtype), data))


@pytest.mark.parametrize("cuts", [(64, 128), (1, 50, 51, 119)])
def test_split_with_carried_state_equals_whole(build, check, tokenizer, source, cuts):
    """Packed rows cut anywhere, each segment from the state that the one before it left: labels
    reach across the cuts, and so do the gradients."""
    (batch,) = loaded(tokenizer, source).train_dataloader()
    model = build(check.dtype)
    labels, seq_idx = batch["labels"], batch["seq_idx"]
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    ends = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1), value=True)
    following = following.masked_fill(ends, IGNORED)
    state, total = None, 0.0
    for start, stop in zip((0, *cuts), (*cuts, SEQ_LEN), strict=True):
        at = slice(start, stop)
        out = model(
            batch["input_ids"][:, at],
            shift_labels=following[:, at],
            seq_idx=seq_idx[:, at],
            state=state,
            return_state=True,
            reduction="sum",
        )
        state, total = out.state, total + out.loss
    loss = total / (following != IGNORED).sum()
    loss.backward()
    check.step(loss.item(), gradients(model))


def test_a_window_cut_short_by_the_end_of_an_epoch(build, tokenizer, source):
    """Seven micro-batches by threes: the third step has one, and is a whole step all the same."""
    settings = {"packing": "none", "batch_size": 2, "shuffle": False}
    data = loaded(tokenizer, source, **settings)
    rate = 0.2
    model = build(torch.float64)
    trained(model, data, accumulate=3, rate=rate, steps=3)
    expected = build(torch.float64)
    alone = documents(tokenizer, source)
    for window in (alone[:6], alone[6:12], alone[12:]):
        _, grads, _ = truth(expected, window)
        with torch.no_grad():
            for name, p in expected.named_parameters():
                if name in grads:
                    p -= rate * grads[name]
    before, weights = dict(build(torch.float64).named_parameters()), dict(model.named_parameters())
    for name, p in expected.named_parameters():
        if p.requires_grad:
            assert error(weights[name] - before[name], p - before[name]) <= 1e-9, name


def test_four_workers_equal_one(tokenizer, source):
    """In two epochs, for the workers of the first one stay."""
    batches = []
    for num_workers in (1, 4):
        data = loaded(tokenizer, source, num_workers=num_workers, batch_size=1)
        loader = data.train_dataloader()
        batches.append([batch for _ in range(2) for batch in loader])
    assert len(batches[0]) == len(batches[1]) == 2 * len(loader) > 6
    for one, four in zip(*batches, strict=True):
        assert one.keys() == four.keys()
        assert all(torch.equal(one[name], four[name]) for name in one)


def test_labels_do_not_cross_from_one_document_to_the_next(build, tokenizer, source):
    """Text is learned from its first token on; in a row that token has a neighbour before it,
    which would be asked to predict it."""
    data = loaded(tokenizer, source, "texts.jsonl")
    (batch,) = data.train_dataloader()
    ids, seq_idx = batch["input_ids"], batch["seq_idx"]
    starts = F.pad(seq_idx.diff(dim=1) > 0, (1, 0))
    assert starts.sum() >= 5
    assert (batch["labels"][starts] == ids[starts]).all()
    alone = []
    for row in map(json.loads, (source / "texts.jsonl").read_text().splitlines()):
        document = [*tokenizer.encode(row["text"]), tokenizer.eos_token_id]
        alone.append((torch.tensor([document]), torch.ones(len(document), dtype=torch.bool)))
    expected, gradients, _ = truth(build(torch.float64), alone)
    loss, found = trained(build(torch.float64), data)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert all(error(found[name], gradient) <= 1e-10 for name, gradient in gradients.items())
    # the control: what it would be if they did
    logits = build(torch.float64)(ids, seq_idx=seq_idx).logits.detach()
    crossing = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert abs(crossing.item() - expected) > 1e-4 * expected


def test_the_mean_of_means_would_be_seen(build, tokenizer, source):
    """The control of the accumulation above: weighing micro-batches alike gives another loss."""
    data = loaded(tokenizer, source, packing="none", batch_size=1)
    model = build(torch.float64)
    with torch.no_grad():
        means = [model(**batch).loss for batch in data.train_dataloader()]
    expected, _, _ = truth(model, documents(tokenizer, source))
    assert abs(torch.stack(means).mean().item() - expected) > 1e-3 * expected


def test_packed_documents_equal_each_alone_through_the_kernels(
    small_config, random_model, tokenizer, source, monkeypatch
):
    """Once through the Triton kernels, on the interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    from mamba2_kernels.interpreter import repaired
    from mamba2_kernels.launch import launches

    def build(dtype):
        config = small_config(vocab_size=4096, n_layers=1, d_state=16, headdim=32, chunk_size=32)
        return random_model(config, dtype=dtype)

    data = loaded(tokenizer, source, "texts.jsonl", seq_len=40, limit_rows=3)
    (batch,) = data.train_dataloader()
    alone = []
    for row, of in zip(batch["input_ids"], batch["seq_idx"], strict=True):
        for document in range(int(of.max()) + 1):
            ids = row[None, of == document]
            alone.append((ids, torch.ones(ids.shape[1], dtype=torch.bool)))
    assert len(alone) > len(batch["input_ids"])  # some row holds two
    check = Check(build, alone, torch.float32)
    model = build(torch.float32)
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    with repaired():
        before = launches.copy()
        check.step(*trained(model, data))
    assert (launches - before)["scan_kernel"] > 0
