"""Text to text: prompts in batches, text that grows with its tokens, stop strings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mamba2_train.data.tokenizer import pad_id
from mamba2_train.errors import UserError
from mamba2_train.generation.loop import generate
from mamba2_train.generation.prefix import CONTEXT, Prefix
from mamba2_train.model import Mamba2LM

CHARACTER = 4  # most tokens that one character is made of, UTF-8 being bytes


@dataclass(frozen=True)
class Completion:
    """What was added to a prompt, its number of tokens, and why it ended: the model's end of text,
    a stop string (which is cut off), or `max_new_tokens`."""

    text: str
    n_tokens: int
    ended_by: Literal["eos", "stop", "length"]


class GrowingText:
    """The text of a row's new tokens, up to the first stop string.

    A token may end in the middle of a character, and the text in the middle of a stop string: what
    is not certain yet waits. Each token costs the same, however long the text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""
        self.stopped = False
        # `ids[:n_known]` are spelt already; they stay as what the next ones are spelt after
        self._ids = list(prompt_ids[-CONTEXT:])
        self._n_known = len(self._ids)
        self._n_shown = 0

    def push(self, token: int) -> str:
        """What is certain to follow the text that was returned before."""
        if self.stopped:
            return ""
        self._ids.append(token)
        self._spell(final=len(self._ids) - self._n_known >= CHARACTER)
        return self._shown(len(self.text) - self._n_uncertain())

    def finish(self) -> str:
        """What has waited, when no token follows."""
        if not self.stopped:
            self._spell(final=True)
        return self._shown(len(self.text))

    def _spell(self, final: bool) -> None:
        known, text = self._decode(self._ids[: self._n_known]), self._decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return
        self._ids, self._n_known = self._ids[self._n_known :], len(self._ids) - self._n_known
        self.text += text[len(known) :]
        found = [(self.text.find(s, self._n_shown), len(s)) for s in self.stop]
        if found := [(at + size, at) for at, size in found if at >= 0]:
            # the one that is complete first, however the text is cut into tokens
            self.text, self.stopped = self.text[: min(found)[1]], True

    def _n_uncertain(self) -> int:
        """Last characters that a stop string may begin with."""
        if self.stopped:
            return 0
        tail = self.text[self._n_shown :]
        sizes = (n for s in self.stop for n in range(1, len(s)) if tail.endswith(s[:n]))
        return max(sizes, default=0)

    def _shown(self, end: int) -> str:
        new, self._n_shown = self.text[self._n_shown : end], max(end, self._n_shown)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def complete(
    model: Mamba2LM,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    after: Prefix | None = None,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[Completion]:
    """The completions of `prompts`, in order, `batch_size` prompts at a time.

    Args:
        prompts: token ids; a single empty one goes on from `after` as it is.
        after: what comes before every prompt, a prefix of one row.
        stop: strings that end a text; they are not part of it. A special token ends it too.
        seed: of the first prompt; the next has seed + 1. Whatever the batches, so is the text.
        on_text: called with each new piece of a single prompt's text, for streaming.
        options: as in `generate`: max_new_tokens, and how tokens are chosen.
    """
    ends = [tokenizer.eos_token_id, *_special(tokenizer, stop)]
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        context = [] if after is None else after.last[0]
        texts = [GrowingText(tokenizer, [*context, *prompt], stop) for prompt in some]
        rows = [_Row(text, ends, on_text) for text in texts]
        input_ids, mask = _padded(some, pad_id(tokenizer), model)
        generate(
            model,
            input_ids,
            mask,
            eos_token_id=ends,
            pad_token_id=pad_id(tokenizer),
            after=after,
            seed=None if seed is None else seed + start,
            on_token=partial(_push, rows),
            **options,
        )
        for row in rows:
            yield row.finish()


class _Row:
    def __init__(
        self, text: GrowingText, ends: list[int], on_text: Callable[[str], None] | None
    ) -> None:
        self.text, self.ends, self.on_text = text, ends, on_text
        self.n_tokens = 0
        self.ended_by: Literal["eos", "stop", "length"] | None = None

    def push(self, token: int) -> bool:
        """Whether the row has ended."""
        if self.ended_by is None:
            self.n_tokens += 1
            self._show(self.text.push(token))
            if token in self.ends:
                self.ended_by = "eos"
            elif self.text.stopped:
                self.ended_by = "stop"
        return self.ended_by is not None

    def finish(self) -> Completion:
        self._show(self.text.finish())
        ended_by = "stop" if self.text.stopped else self.ended_by or "length"
        return Completion(self.text.text, self.n_tokens, ended_by)

    def _show(self, new: str) -> None:
        if new and self.on_text is not None:
            self.on_text(new)


def _push(rows: list[_Row], tokens: Tensor) -> list[bool]:
    return [row.push(token) for row, token in zip(rows, tokens.tolist(), strict=True)]


def encoded(
    text: str, tokenizer: Any, vocab_size: int, *, begins: bool = True, most: int | None = None
) -> list[int]:
    """The ids of a prompt.

    Args:
        begins: the text begins a document, with whatever the tokenizer puts in front, such as bos.
        most: refuse more tokens than this.

    Raises:
        UserError: no token, too many, or one that the model does not have.
    """
    return checked(tokenizer.encode(text, add_special_tokens=begins), vocab_size, most)


def checked(ids: list[int], vocab_size: int, most: int | None) -> list[int]:
    if not ids:
        raise UserError("the prompt is empty: give it some text")
    if most is not None and len(ids) > most:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and max_prompt_tokens is {most:,}: shorten it, or "
            "raise the limit"
        )
    if max(ids) >= vocab_size:
        raise UserError(
            f"the prompt has the token {max(ids)} and the model's are 0 to {vocab_size - 1}: the "
            "tokenizer is not the one that the model was trained with"
        )
    return ids


def _padded(
    prompts: Sequence[Sequence[int]], pad: int, model: Mamba2LM
) -> tuple[Tensor | None, Tensor | None]:
    device = model.lm_head.weight.device
    width = max(map(len, prompts))
    if width == 0:
        return None, None
    input_ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return input_ids.to(device), mask.to(device)


def _special(tokenizer: Any, stop: Sequence[str]) -> list[int]:
    """Stop strings that are special tokens, which the text never shows."""
    added = tokenizer.get_added_vocab()
    return [added[s] for s in stop if s in added]
