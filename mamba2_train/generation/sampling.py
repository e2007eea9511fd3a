"""The next token of each row from its logits.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p; each is a function
of logits (b, vocab_size) that puts -inf where a token is out of the question. What is left is drawn
by its cumulative distribution, with one uniform number per row and token:

    token = the first one whose cumulative probability exceeds u

The numbers come from a generator of the row's own, so a row's text depends neither on its batch nor
on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LARGEST_BELOW_1 = 1 - 2.0**-52  # times any sum, in float64, stays below that sum


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
    top_k: sample among the k likeliest tokens only.
    top_p: sample among the fewest tokens whose probability reaches top_p (nucleus).
    min_p: leave out what is less likely than min_p times the likeliest token.
    repetition_penalty: a token that stands in the prompt or the text has its logit divided by this
        where it is positive, multiplied where it is negative (Keskar et al. 2019).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; give at least 1, or None for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give more than 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; give 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; give more than 0, 1 for none"
            )

    def choose(self, logits: Tensor, seen: Tensor, u: Tensor | None) -> Tensor:
        """(b,) tokens.

        Args:
            logits: (b, vocab_size).
            seen: (b, vocab_size) bool, the tokens of the prompt and the text so far.
            u: (b,) float64 in [0, 1); not needed by temperature 0.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            logits = penalized(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(-1)
        assert u is not None
        return drawn(self.filtered(logits), u)

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits to draw from: over the temperature, -inf for what is left out."""
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = min_p(logits, self.min_p)
        return logits


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_k(logits: Tensor, k: int) -> Tensor:
    lowest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    ordered, index = logits.sort(-1)
    dropped = ordered.softmax(-1).cumsum(-1) <= 1 - p
    dropped[:, -1] = False  # the likeliest token always stays
    return logits.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    probabilities = logits.softmax(-1)
    lowest = p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < lowest, -torch.inf)


def drawn(logits: Tensor, u: Tensor) -> Tensor:
    """(b,) tokens of the distribution softmax(logits), which `u` (b,) in [0, 1) picks."""
    # float64: a float32 sum over 50k tokens loses those less likely than 1e-7
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # times the last, which is 1 only up to rounding; to the right, past what has probability 0
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]


class Uniform:
    """A stream of numbers in [0, 1) for each row, from a seed of its own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, device: torch.device) -> Tensor:
        """(b,) float64, the next of each stream."""
        numbers = [min(g.random(), LARGEST_BELOW_1) for g in self.generators]
        return torch.tensor(numbers, dtype=torch.float64, device=device)


def row_seeds(seed: int | Sequence[int] | None, n_rows: int) -> list[int]:
    """A seed per row: those given; or `seed`, `seed + 1`, ...; or drawn by torch's generator."""
    if seed is None:
        return torch.randint(2**62, (n_rows,)).tolist()
    if isinstance(seed, int):
        return [seed + row for row in range(n_rows)]
    if len(seed) != n_rows:
        raise ValueError(f"{len(seed)} seeds for {n_rows} rows; give one per row, or one number")
    return list(seed)
