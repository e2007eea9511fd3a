"""Text from a model: the prompt in one scan, then one token at a time from the state.

The state has the same size whatever came before, so memory does not grow with the text.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_train.model import Mamba2LM


@torch.no_grad()
def generate(
    model: Mamba2LM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each row of `input_ids` (b, t).

    Args:
        attention_mask: (b, t), 0 marks padding, on either side.
        temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the fewest tokens whose probability reaches top_p (nucleus).
        eos_token_id: a row that has produced it is filled with `pad_token_id` (or eos itself).
        seed: of the sampling alone; None draws from torch's generator.
        on_token: called with each (b,) of new tokens, for streaming.

    Returns:
        (b, t + max_new_tokens) int64; fewer columns if every row has ended. Each row's new tokens
        are its last columns, whichever side was padded.

    Raises:
        ValueError: sampling settings out of range, or a row without a token.
    """
    _check(input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=input_ids.device).manual_seed(seed)

    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (attention_mask.bool() * positions).argmax(1, keepdim=True)
    out = model(input_ids, attention_mask=attention_mask, return_state=True, logits_to_keep=last)
    logits, state = out.logits[:, 0], out.state
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens = []
    for _ in range(max_new_tokens):
        token = _choose(logits.float(), temperature, top_k, top_p, generator)
        if eos_token_id is not None:
            token = token.masked_fill(ended, eos_token_id if pad_token_id is None else pad_token_id)
            ended |= token == eos_token_id
        tokens.append(token)
        if on_token is not None:
            on_token(token)
        if ended.all() or len(tokens) == max_new_tokens:
            break
        logits = model.step(token, state)
    return torch.cat([input_ids, torch.stack(tokens, 1)], 1)


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """(b, vocab_size) -> (b,)"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probabilities = F.softmax(logits, -1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        # drop what comes after the mass is reached: the likeliest token always stays
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _check(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; give (batch, at least one token)"
        )
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
                f"{tuple(input_ids.shape)}; they must be equal"
            )
        if not attention_mask.any(1).all():
            raise ValueError("a row of attention_mask has no token at all; give each row one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; give 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; give at least 1, or None for all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; give more than 0, at most 1")
