"""How well a model predicts documents: perplexity, bits per byte, accuracy, loss by position.

    perplexity     exp(sum of token losses / number of tokens)
    bits per byte  sum of token losses / ln 2 / bytes of the tokens' text

Each document is read whole, from an empty state; a long one a segment at a time, the state carried
from one to the next, which gives the losses of one pass over all of it in the memory of a segment.
As in training, nothing predicts a document's first token, and only what is learned there counts
here; bytes are those of the tokens that count, so tokenizers of any kind compare.

Of several processes each reads every n-th batch, and `Score.of_all_ranks` adds up their sums.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mamba2_train.data.chat import set_template
from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import (
    ROWS_AT_ONCE,
    Documents,
    load_documents,
    load_held_out_documents,
    load_parts,
    would_be_held_out,
)
from mamba2_train.loss import IGNORED
from mamba2_train.model import Mamba2LM, Mamba2State

UNCUT = 2**30  # tokens: no document is longer


@dataclass
class Score:
    """Sums over the tokens that count. Bin i of `by_position` holds positions 2^i to 2^(i+1) - 1
    of their documents, with position 1 the first one that is predicted."""

    loss: float = 0.0  # nats
    n_tokens: int = 0
    n_bytes: int = 0
    n_correct: int = 0
    n_documents: int = 0
    loss_by_position: NDArray[np.float64] = field(default_factory=lambda: np.zeros(32))
    tokens_by_position: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(32, dtype=np.int64)
    )

    def of_all_ranks(self, add_up: Callable[[Tensor], Tensor]) -> "Score":
        """The sums over all processes.

        Args:
            add_up: of a float64 tensor of each process, the sum.
        """
        numbers = [self.loss, self.n_tokens, self.n_bytes, self.n_correct, self.n_documents]
        mine = np.concatenate([numbers, self.loss_by_position, self.tokens_by_position])
        found = add_up(torch.from_numpy(mine)).numpy()  # counts below 2^53 are exact in float64
        n_tokens, n_bytes, n_correct, n_documents = map(int, found[1:5])
        by_position, tokens_by_position = np.split(found[5:], 2)
        return Score(
            float(found[0]),
            n_tokens,
            n_bytes,
            n_correct,
            n_documents,
            by_position,
            tokens_by_position.astype(np.int64),
        )

    def values(self) -> dict[str, Any]:
        """As JSON holds them."""
        mean = self.loss / self.n_tokens
        bins = np.flatnonzero(self.tokens_by_position)
        return {
            "documents": self.n_documents,
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "loss": mean,
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "bits_per_byte": self.loss / math.log(2) / self.n_bytes if self.n_bytes else None,
            "accuracy": self.n_correct / self.n_tokens,
            "loss_by_position": [
                {
                    "from": int(2**i),
                    "to": int(2 ** (i + 1) - 1),
                    "tokens": int(self.tokens_by_position[i]),
                    "loss": float(self.loss_by_position[i] / self.tokens_by_position[i]),
                }
                for i in bins
            ],
        }


def whole_documents(config: DataConfig, tokenizer: Any, part: str) -> Documents:
    """The documents of a data source, uncut, from the cache where they have been made before.

    Args:
        part: "held_out", what a training run with this config would hold out, or "all" rows that
            it would train or validate on.
    """
    set_template(tokenizer, config.chat_template)
    uncut = {"seq_len": UNCUT, "packing": "none", "length_grouped": False, "streaming": False}
    whole = config.model_copy(update=uncut)
    mixture, held_out = load_parts(whole, ROWS_AT_ONCE)
    if part == "all":
        return load_held_out_documents([*mixture.parts, *held_out], whole, tokenizer)
    if held_out:
        return load_held_out_documents(held_out, whole, tokenizer)
    return would_be_held_out(load_documents(whole, tokenizer), config)


@torch.no_grad()
def score(
    model: Mamba2LM,
    documents: Documents,
    bytes_of: NDArray[np.int64],
    *,
    segment_len: int = 1024,
    batch_tokens: int = 4096,
    on_documents: Callable[[int], None] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Score:
    """Losses of `documents` under `model`.

    Args:
        bytes_of: (vocab_size,) bytes of each token, from `token_bytes`.
        segment_len: most tokens of a document in one pass; a choice of memory, not of numbers.
        batch_tokens: most tokens, of all documents, in one pass.
        on_documents: told how many documents a finished batch had.
        rank, world: read batches rank, rank + world, ... only.
    """
    model.eval()
    total = Score()
    lengths = documents.lengths
    order = np.argsort(-lengths, kind="stable")
    start = batch = 0
    while start < len(order):
        width = min(int(lengths[order[start]]), segment_len)
        some = order[start : start + max(1, batch_tokens // width)]
        if batch % world == rank:
            _score_batch(model, documents, some, bytes_of, segment_len, total)
            total.n_documents += len(some)
        start += len(some)
        batch += 1
        if on_documents is not None:
            on_documents(len(some))
    return total


def token_bytes(tokenizer: Any, vocab_size: int) -> NDArray[np.int64]:
    """(vocab_size,) UTF-8 bytes that each token adds to a text; 0 for special tokens."""
    sizes = np.zeros(vocab_size, dtype=np.int64)
    added = tokenizer.added_tokens_decoder
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    byte_level = '"ByteLevel"' in json.dumps(decoder)
    for piece, i in tokenizer.get_vocab().items():
        if i in added:
            sizes[i] = 0 if added[i].special else len(added[i].content.encode())
        elif byte_level:
            sizes[i] = len(piece)  # a character stands for a byte
        elif len(piece) == 6 and piece.startswith("<0x"):
            sizes[i] = 1  # SentencePiece's bytes
        else:
            sizes[i] = len(piece.replace("▁", " ").encode())
    return sizes


def _score_batch(
    model: Mamba2LM,
    documents: Documents,
    indices: NDArray[np.int64],
    bytes_of: NDArray[np.int64],
    segment_len: int,
    total: Score,
) -> None:
    device = model.lm_head.weight.device
    spans = [(int(documents.bounds[i]), int(documents.bounds[i + 1])) for i in indices]
    state: Mamba2State | None = None
    for start in range(0, max(stop - begin for begin, stop in spans) - 1, segment_len):
        # the last token of a document predicts nothing, so it is a label only
        width = min(segment_len, max(stop - begin for begin, stop in spans) - 1 - start)
        # zeros fill a row after its last token, where nothing of it is read any more
        input_ids = np.zeros((len(spans), width), dtype=np.int64)
        labels = np.full((len(spans), width), IGNORED, dtype=np.int64)
        for row, (begin, stop) in enumerate(spans):
            at = begin + start
            n = min(width, stop - 1 - at)
            if n <= 0:
                continue
            input_ids[row, :n] = documents.tokens[at : at + n]
            learned = documents.learned[at + 1 : at + 1 + n]
            labels[row, :n] = np.where(learned, documents.tokens[at + 1 : at + 1 + n], IGNORED)
        out = model(
            torch.from_numpy(input_ids).to(device),
            state=state,
            return_state=True,
        )
        state = out.state
        _add(total, out.logits, labels, bytes_of, first_position=start + 1)


def _add(
    total: Score,
    logits: Tensor,
    labels: NDArray[np.int64],
    bytes_of: NDArray[np.int64],
    first_position: int,
) -> None:
    targets = torch.from_numpy(labels).to(logits.device)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    # fp64: a sum over millions of tokens
    nats = losses.view(targets.shape).double().cpu().numpy()
    counted = labels != IGNORED
    total.loss += float(nats[counted].sum())
    total.n_tokens += int(counted.sum())
    total.n_bytes += int(bytes_of[labels[counted]].sum())
    total.n_correct += int((logits.argmax(-1) == targets).sum())
    positions = np.broadcast_to(first_position + np.arange(labels.shape[1]), labels.shape)
    bins = np.frexp(positions[counted])[1] - 1  # floor of log2, exact
    np.add.at(total.loss_by_position, bins, nats[counted])
    np.add.at(total.tokens_by_position, bins, 1)
