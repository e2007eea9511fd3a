"""transformers' model with our ops: against the stock path where that is right, and against each
row alone in it where it is not."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2LM
from mamba2_train.transformers_bridge import accelerate


@pytest.fixture
def stock(small_config, random_model, transformers_model):
    """The stock model and a copy of it that is ours, both in float64."""

    def make(**fields):
        config = small_config(n_groups=2, tie_embeddings=False, **fields)
        ours = random_model(config, seed=3, dtype=torch.float64)
        return transformers_model(config, ours.state_dict()).double().eval()

    return make


@pytest.fixture
def pair(stock):
    def make(**fields):
        model = stock(**fields)
        return model, accelerate(copy.deepcopy(model))

    return make


def tokens(shape, seed=0):
    return torch.randint(0, 80, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    # the stock scan computes in float32 whatever it is given
    return (a - b).abs().max() <= 2e-5 * b.abs().max()


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def summed(outs_and_labels):
    """The token mean of several calls' losses."""
    losses = [(out.loss, int((labels[:, 1:] != -100).sum())) for out, labels in outs_and_labels]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def assert_same_gradients(ours, theirs):
    ours, theirs = gradients(ours), gradients(theirs)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, name
        assert close(ours[name], expected), name


@pytest.mark.parametrize("dt_limit", [(0.0, float("inf")), (0.0, 0.2)])
@pytest.mark.parametrize("training", [False, True])
def test_unpadded_logits_loss_and_gradients_are_the_stock_ones(pair, dt_limit, training):
    theirs, ours = (model.train(training) for model in pair(dt_limit=dt_limit))
    ids = tokens((2, 37))
    expected, out = theirs(ids, labels=ids), ours(ids, labels=ids)
    assert close(out.logits, expected.logits)
    assert close(out.loss, expected.loss)
    expected.loss.backward()
    out.loss.backward()
    assert_same_gradients(ours, theirs)


def test_packed_documents_are_what_each_is_alone(pair):
    theirs, ours = pair()
    lengths = (11, 1, 20, 6)
    documents = [tokens((1, n), n) for n in lengths]
    ids = torch.cat([*documents, torch.zeros(1, 3, dtype=torch.long)], 1)
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, -1]), torch.tensor([*lengths, 3]))
    labels = ids.clone()
    out = ours(ids, labels=labels, seq_idx=seq_idx[None].int())
    alone = [theirs(d, labels=d) for d in documents if d.shape[1] > 1]
    kept = [d for d in documents if d.shape[1] > 1]
    start = 0
    for document in documents:
        part = out.logits[:, start : start + document.shape[1]]
        assert close(part, theirs(document).logits)
        start += document.shape[1]
    expected = summed(zip(alone, kept, strict=True))
    assert close(out.loss, expected)
    assert not close(theirs(ids, labels=labels, seq_idx=seq_idx[None].int()).loss, expected)
    out.loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


def test_seq_idx_is_forgotten_after_the_call(pair):
    _, ours = pair()
    ids = tokens((1, 12))
    plain, hidden = ours(ids).logits, ours.backbone(ids).last_hidden_state
    ours(ids, seq_idx=torch.arange(12, dtype=torch.int32)[None] // 4)
    assert torch.equal(ours.backbone(ids).last_hidden_state, hidden)
    assert torch.equal(ours(ids).logits, plain)
    with pytest.raises(ValueError, match="seq_idx"):
        ours(ids, seq_idx=torch.zeros(1, 5, dtype=torch.int32))
    assert torch.equal(ours.backbone(ids).last_hidden_state, hidden)
    assert torch.equal(ours(ids).logits, plain)


def padded(rows, side):
    width = max(r.shape[1] for r in rows)
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = row.shape[1]
        place = slice(width - n, width) if side == "left" else slice(n)
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_what_each_is_alone(pair, side):
    theirs, ours = pair()
    rows = [tokens((1, n), n) for n in (19, 5, 12)]
    ids, mask = padded(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    out = ours(ids, attention_mask=mask, labels=labels)
    alone = [theirs(row, labels=row) for row in rows]
    for i, row in enumerate(rows):
        assert close(out.logits[i][mask[i] == 1], alone[i].logits[0]), len(row)
    expected = summed(zip(alone, rows, strict=True))
    assert close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dt_limit", [(0.0, float("inf")), (0.0, 0.2)])
def test_a_cache_goes_on_as_each_row_would_alone(pair, side, dt_limit):
    """After a padded prompt, by several tokens, then by one at a time: the logits of the stock
    model's forward over the whole row, which is right where nothing is padded or cached."""
    theirs, ours = pair(dt_limit=dt_limit)
    rows = [tokens((1, n), n) for n in (19, 2, 12)]
    ids, mask = padded(rows, side)
    more = tokens((3, 9), 50)
    whole = [
        theirs(torch.cat([row, more[i : i + 1]], 1)).logits[0, -9:] for i, row in enumerate(rows)
    ]
    with torch.no_grad():
        out = ours(ids, attention_mask=mask, use_cache=True)
        out = ours(more[:, :4], cache_params=out.cache_params, use_cache=True)
        assert all(close(out.logits[i], whole[i][:4]) for i in range(3))
        for t in range(4, 9):
            out = ours(more[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
            assert all(close(out.logits[i, 0], whole[i][t]) for i in range(3))


def test_generate_gives_the_stock_tokens(pair):
    theirs, ours = pair()
    ids = tokens((2, 15))
    ids[0, :6] = 0
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=mask, **how)
    assert len(set(expected[1, 15:].tolist())) > 3
    assert torch.equal(ours.generate(ids, attention_mask=mask, **how), expected)


def with_lora(model, targets):
    model = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.double()


@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_wrapped_by_peft(stock, first):
    theirs, ours = with_lora(stock(), ["in_proj"]), stock()
    if first == "accelerate":
        ours = with_lora(accelerate(ours), ["in_proj"])
    else:
        ours = accelerate(with_lora(ours, ["in_proj"]))
    ids = tokens((2, 21))
    expected, out = theirs(input_ids=ids, labels=ids), ours(input_ids=ids, labels=ids)
    assert close(out.logits, expected.logits)
    expected.loss.backward()
    out.loss.backward()
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys()
    assert all(close(a[name], b[name]) for name in b)


def test_lora_on_out_proj_is_heard_and_learns(stock):
    """Against the stock model with the product of the adapter added to its weights."""
    model = stock().train()
    with pytest.raises(ValueError, match="out_proj"):
        with_lora(stock(), ["out_proj"])
    ours = with_lora(accelerate(copy.deepcopy(model)), ["out_proj"]).train()
    with torch.no_grad():
        for i, block in enumerate(model.backbone.layers):
            lora = ours.base_model.model.backbone.layers[i].mixer.out_proj
            block.mixer.out_proj.weight += 2 * (
                lora.lora_B["default"].weight @ lora.lora_A["default"].weight
            )
    documents = [tokens((1, n), n) for n in (13, 8)]
    ids = torch.cat(documents, 1)
    seq_idx = torch.tensor([0] * 13 + [1] * 8, dtype=torch.int32)[None]
    out = ours(input_ids=ids, labels=ids, seq_idx=seq_idx)
    alone = [model(d, labels=d) for d in documents]
    assert close(out.logits, torch.cat([a.logits for a in alone], 1))
    summed(zip(alone, documents, strict=True)).backward()
    out.loss.backward()
    for i, block in enumerate(model.backbone.layers):
        lora = ours.base_model.model.backbone.layers[i].mixer.out_proj
        a, b, dw = lora.lora_A["default"], lora.lora_B["default"], block.mixer.out_proj.weight.grad
        assert close(a.weight.grad, 2 * b.weight.T @ dw)
        assert close(b.weight.grad, 2 * dw @ a.weight.T)


def test_lora_on_conv1d_is_still_refused(stock):
    with pytest.raises(ValueError, match="conv1d"):
        with_lora(accelerate(stock()), ["conv1d"])


def test_checkpointing_gives_the_same_gradients_and_hears_seq_idx(pair):
    _, ours = pair()
    kept = copy.deepcopy(ours).train()
    ours.train().gradient_checkpointing_enable()
    ids, seq_idx = tokens((1, 24)), (torch.arange(24, dtype=torch.int32) // 9)[None]
    for model in (kept, ours):
        model(ids, labels=ids, seq_idx=seq_idx).loss.backward()
    assert all(torch.equal(g, gradients(kept)[name]) for name, g in gradients(ours).items())


def test_twice_is_once_and_a_save_is_the_stock_models(pair, tmp_path):
    theirs, ours = pair()
    accelerate(ours)
    hooks = len(ours._forward_pre_hooks) + len(ours.backbone._forward_pre_hooks)
    assert hooks == 2
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    files = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()} == files
    again = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "ours").double().eval()
    ids = tokens((1, 9))
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_what_is_no_mamba2_of_transformers_is_refused(small_config):
    with pytest.raises(UserError, match="Mamba2LM holds no Mamba2 model of transformers"):
        accelerate(Mamba2LM(small_config()))
