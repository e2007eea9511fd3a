"""Conversations through the tokenizer's chat template.

A turn reads only what it adds: the state stands where the last message of the user ended, and what
the template puts after it, the answer and the next message, is read from there.
"""

from typing import Any

import torch

from mamba2_train.errors import UserError
from mamba2_train.generation.prefix import Prefix, read
from mamba2_train.generation.text import Completion, checked, complete
from mamba2_train.model import Mamba2LM

Message = dict[str, Any]


def rendered(messages: list[Message], tokenizer: Any) -> list[int]:
    """The ids of a conversation, up to where the assistant is to speak."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, so there is no telling how this model was taught "
            "to talk: put a chat_template.jinja beside the weights, or set chat=false"
        )
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template refuses the messages: {reason}") from error
    return list(ids)


class Conversation:
    """Messages, and the state after the last one of the user.

    Args:
        system: the first message, if any.
        most: refuse a conversation of more tokens.
    """

    def __init__(
        self, model: Mamba2LM, tokenizer: Any, system: str | None = None, most: int | None = None
    ) -> None:
        self.model, self.tokenizer, self.most = model, tokenizer, most
        self.messages: list[Message] = with_system([], system)
        self.prefix: Prefix | None = None
        self.ids: list[int] = []  # that `prefix` has read

    def answer(self, message: str, **options: Any) -> Completion:
        """Say `message` and get the answer; options as in `complete`."""
        asked = [*self.messages, {"role": "user", "content": message}]
        ids = checked(rendered(asked, self.tokenizer), self.model.config.vocab_size, self.most)
        if ids[: len(self.ids)] != self.ids:  # the template rewrites what was said
            self.prefix, self.ids = None, []
        new = torch.tensor([ids[len(self.ids) :]], device=self.model.lm_head.weight.device)
        self.prefix, self.ids = read(self.model, new, after=self.prefix), ids
        (answer,) = complete(self.model, self.tokenizer, [[]], after=self.prefix, **options)
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]
