"""Rows that go on where those of the last batch stopped: the truth is each document by itself."""

import numpy as np
import pytest
import torch

from mamba2_train.data.documents import Documents
from mamba2_train.data.loaders import BatchSampler, LaneSampler
from mamba2_train.data.packing import Collator, arrange
from mamba2_train.long_context import continued

LENGTHS = [5, 1, 90, 16, 3, 41, 8]
SEQ_LEN = 8


@pytest.fixture
def documents():
    random = np.random.default_rng(0)
    n = sum(LENGTHS)
    return Documents(
        tokens=random.permutation(n).astype(np.int32),  # each token once: it tells where it is
        learned=random.random(n) < 0.7,
        bounds=np.append(0, np.cumsum(LENGTHS)),
        counts={"documents": len(LENGTHS)},
    )


def batches(documents, epoch=0, *, batch_size=1, world=1, rank=0, shuffle=False, start=0):
    data = arrange(documents, SEQ_LEN, "continued")
    sampler = LaneSampler(
        len(documents.tokens),
        SEQ_LEN,
        seed=1,
        rank=rank,
        world=world,
        shuffle=shuffle,
        batch_size=batch_size,
    )
    sampler.set_epoch(epoch)
    rows = list(BatchSampler(sampler, batch_size, (epoch, start)))
    assert len(rows) == len(BatchSampler(sampler, batch_size)) - start
    collate = Collator(0, "right", SEQ_LEN)
    return [collate([data[span] for span in batch]) for batch in rows]


def lanes(made):
    """Each row of the batches end to end, without padding."""
    joined = {name: torch.cat([batch[name] for batch in made], dim=1) for name in made[0]}
    return [
        {name: t[i][joined["seq_idx"][i] >= 0] for name, t in joined.items()}
        for i in range(len(joined["input_ids"]))
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_lanes_hold_every_document_once_and_predict_all_it_teaches(documents, batch_size, shuffle):
    found = lanes(batches(documents, batch_size=batch_size, shuffle=shuffle))
    stream = {name: torch.cat([lane[name] for lane in found]) for name in found[0]}
    seen = []
    for number in range(len(LENGTHS)):
        here = stream["seq_idx"] == number
        tokens = stream["input_ids"][here]
        i = next(i for i, b in enumerate(documents.bounds) if documents.tokens[b] == tokens[0])
        span = slice(documents.bounds[i], documents.bounds[i + 1])
        assert tokens.tolist() == documents.tokens[span].tolist()
        taught = np.where(documents.learned[span], documents.tokens[span], -100)[1:]
        assert stream["shift_labels"][here].tolist() == [*taught.tolist(), -100]
        seen.append(i)
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert (seen == sorted(seen)) is not shuffle
    sizes = [len(lane["input_ids"]) for lane in found]
    assert max(sizes) - min(sizes) < batch_size


def test_epochs_differ_and_a_position_is_gone_on_from(documents):
    first, again, second = (batches(documents, e, batch_size=2, shuffle=True) for e in (0, 0, 1))
    same = [torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True)]
    assert all(same)
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])
    rest = batches(documents, 1, batch_size=2, shuffle=True, start=4)
    for a, b in zip(rest, second[4:], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_ranks_share_the_lanes_of_one(documents):
    one = batches(documents, batch_size=4, shuffle=True)
    first, second = (
        batches(documents, batch_size=2, world=2, rank=r, shuffle=True) for r in (0, 1)
    )
    for batch, a, b in zip(one, first, second, strict=True):
        for name in batch:
            both = torch.stack([a[name], b[name]], dim=1).flatten(0, 1)
            assert torch.equal(both, batch[name])


@pytest.mark.parametrize("shuffle", [False, True])
def test_carried_states_give_each_document_its_whole_past(
    documents, small_config, random_model, shuffle
):
    model = random_model(small_config(vocab_size=sum(LENGTHS)), dtype=torch.float64)
    found, state = torch.zeros((), dtype=torch.float64), None
    with torch.no_grad():
        for batch in batches(documents, shuffle=shuffle):
            loss, _, state = continued(model, batch, state)
            found += loss
        truth = torch.zeros_like(found)
        for start, stop in zip(documents.bounds, documents.bounds[1:], strict=False):
            ids = torch.from_numpy(documents.tokens[start:stop].astype(np.int64))[None]
            learned = torch.from_numpy(documents.learned[start:stop])[None]
            labels = ids.masked_fill(~learned, -100)
            truth += model(ids, labels=labels, reduction="sum").loss
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
