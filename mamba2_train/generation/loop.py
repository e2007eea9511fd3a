"""Tokens from a model: the prompt in one scan, then one token at a time from the state.

The state has the same size whatever came before, so memory does not grow with the text.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba2_train.generation.prefix import Prefix, read
from mamba2_train.generation.sampling import Sampling, Uniform, row_seeds
from mamba2_train.generation.step import Decoder
from mamba2_train.model import Mamba2LM


@torch.no_grad()
def generate(
    model: Mamba2LM,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    after: Prefix | None = None,
    on_token: Callable[[Tensor], Sequence[bool] | None] | None = None,
) -> Tensor:
    """Continue each row of `input_ids` (b, t).

    A row gets the tokens that it gets alone, whatever the others are and however it is padded.

    Args:
        attention_mask: (b, t), 0 marks padding, on either side.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; greedy by default.
        eos_token_id: a row that has produced it (or one of them) is filled with `pad_token_id`, or
            with the first of them.
        seed: one per row; a number gives the first row that seed, the next one seed + 1, and so
            on; None draws them from torch's generator.
        after: what comes before the rows, as `read` or `load_prefix` gave it; one row of it goes
            before all. It stays as it is, to be continued any number of times. With it,
            `input_ids` may be left out.
        on_token: called with each (b,) of new tokens, for streaming; it may return which rows are
            to end.

    Returns:
        (b, t + max_new_tokens) int64; fewer columns if every row has ended. Each row's new tokens
        are its last columns, whichever side was padded.

    Raises:
        ValueError: sampling settings out of range, a row without a token, or a token that the
            model does not have.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if input_ids is not None:
        prefix = read(model, input_ids, attention_mask, after=after)
    elif after is not None:
        prefix = after.copied()
        input_ids = prefix.n_tokens.new_zeros(len(prefix), 0)
    else:
        raise ValueError("there is nothing to continue: give input_ids, or a prefix as `after`")
    logits, seen, device = prefix.logits, prefix.seen, input_ids.device
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    ends = torch.tensor(eos, dtype=torch.int64, device=device)
    fill = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
    uniform = Uniform(row_seeds(seed, len(prefix))) if temperature else None
    ended = torch.zeros(len(prefix), dtype=torch.bool, device=device)
    decode: Decoder | None = None
    tokens: list[Tensor] = []
    while True:
        token = sampling.choose(logits, seen, uniform(device) if uniform else None)
        token = token.masked_fill(ended, fill)
        tokens.append(token)
        ended = ended | torch.isin(token, ends)
        if on_token is not None and (stopped := on_token(token)) is not None:
            ended = ended | torch.tensor(stopped, device=device)
        if len(tokens) == max_new_tokens or ended.all():
            return torch.cat([input_ids, torch.stack(tokens, 1)], 1)
        seen.scatter_(1, token[:, None], True)
        decode = decode or Decoder(model, prefix.state)
        logits = decode(token)
