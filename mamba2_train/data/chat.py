"""Conversations become tokens through the tokenizer's chat template.

Rendering is transformers'. Which tokens a `{% generation %}` block covers is decided here, by the
characters that each token stands for: `apply_chat_template(return_assistant_tokens_mask=True)`
asks for the token of a block's first character, and where there is none, as for a leading space
under tokenizers that trim their offsets (GPT-NeoX's, so state-spaces/mamba2-*), nothing is marked.
"""

import re
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateSyntaxError
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

from mamba2_train.assets import EMBEDDED, FOLDER
from mamba2_train.data.files import BadRow
from mamba2_train.data.formats import Chat
from mamba2_train.data.messages import Message
from mamba2_train.data.tokenizer import check_template
from mamba2_train.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Rendered(NamedTuple):
    prompt: str  # what the text begins with and is not learned
    text: str
    spans: list[tuple[int, int]]  # of characters, between generation marks


def set_template(tokenizer: Any, file: str | None) -> None:
    """Give `tokenizer` the chat template in `file`, in place: it is saved with the tokenizer, so
    that the model is used as it was trained. `embedded` is the one that ships with the package."""
    if file is None:
        return
    if file == EMBEDDED:
        file = str(FOLDER / "chat.jinja")
    try:
        tokenizer.chat_template = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"data.chat_template: {file} cannot be read ({reason}): give a Jinja file"
        ) from error


def encode_chats(
    chats: list[Chat], tokenizer: Any, loss_on: str | None
) -> list[tuple[list[int], NDArray[np.bool_]] | BadRow]:
    """Ids of each conversation and which of them are learned, or why there are none.

    A prompt is never learned unless `loss_on` is all; under assistant, neither is what stands
    outside the template's generation marks.
    """
    if not chats:
        return []
    masked = loss_on == "assistant"
    rendered: list[_Rendered | BadRow] = []
    for chat in chats:
        try:
            rendered.append(_rendered(chat, tokenizer, loss_on))
        except BadRow as error:
            rendered.append(error)
    good = [r for r in rendered if isinstance(r, _Rendered)]
    whole = _tokenize([r.text for r in good], tokenizer, offsets=masked)
    prompts = iter(_tokenize([r.prompt for r in good if r.prompt], tokenizer)["input_ids"])
    encoded = iter(
        [
            _learned(
                r,
                whole["input_ids"][i],
                whole["offset_mapping"][i] if masked else None,
                next(prompts) if r.prompt else [],
            )
            for i, r in enumerate(good)
        ]
    )
    return [r if isinstance(r, BadRow) else next(encoded) for r in rendered]


def _rendered(chat: Chat, tokenizer: Any, loss_on: str | None) -> _Rendered:
    masked = loss_on == "assistant"
    options = {
        "chat_template": _template(tokenizer, chat.tools, masked),
        "tools": chat.tools,
        **tokenizer.special_tokens_map,
    }
    whole = [*chat.prompt, *chat.completion]
    text, spans = _render(whole, **options, return_assistant_tokens_mask=masked)
    if not chat.prompt or loss_on == "all":
        return _Rendered("", text, spans)
    prompt, _ = _render(chat.prompt, **options, add_generation_prompt=True)
    if not text.startswith(prompt):
        at = next(i for i, c in enumerate(prompt) if text[i : i + 1] != c)
        raise BadRow(
            f"the chat template writes the prompt in another way once the completion follows "
            f"(after {prompt[max(0, at - 20) : at]!r}: {prompt[at : at + 20]!r} alone, "
            f"{text[at : at + 20]!r} with it); mend the template, or train on messages instead"
        )
    return _Rendered(prompt, text, spans)


def _render(messages: list[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of `messages`, and the spans of its characters between generation marks."""
    try:
        rendered: Any = render_jinja_template(conversations=[messages], **options)
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not Jinja (line {error.lineno}: {error.message}): mend it, or "
            "set data.chat_template to another file"
        ) from error
    # whatever a template raises on messages that it was not written for
    except Exception as error:
        raise BadRow(
            f"the chat template refuses it ({' '.join(str(error).split())}); change the messages "
            "or the template"
        ) from error
    texts, spans = rendered
    return texts[0], spans[0] if spans else []


def _template(tokenizer: Any, tools: list[dict[str, Any]] | None, masked: bool) -> str:
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise UserError(
            "the data are conversations and the tokenizer has no chat template for them: set "
            "data.chat_template to a Jinja file"
        ) from error
    check_template(template, tokenizer)
    if masked and not GENERATION.search(template):
        raise UserError(
            "data.loss_on=assistant, but the chat template does not mark what the assistant says: "
            "put {% generation %} and {% endgeneration %} around it (in a file named by "
            "data.chat_template), or set data.loss_on to completion or all"
        )
    return template


def _tokenize(texts: list[str], tokenizer: Any, offsets: bool = False) -> Any:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    return tokenizer(
        texts,
        add_special_tokens=False,  # a template writes its own
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _learned(
    rendered: _Rendered,
    ids: list[int],
    offsets: list[tuple[int, int]] | None,
    prompt: list[int],
) -> tuple[list[int], NDArray[np.bool_]] | BadRow:
    if ids[: len(prompt)] != prompt:
        end = len(rendered.prompt)
        return BadRow(
            f"its completion begins with {rendered.text[end : end + 20]!r}, which becomes one "
            f"token with the prompt's end, {rendered.prompt[-20:]!r}; strip it, or end the "
            "template's generation prompt with a special token"
        )
    learned = np.ones(len(ids), dtype=bool)
    if offsets is not None:
        learned[:] = False
        for start, end in rendered.spans:
            if start < end:
                first = bisect_right(offsets, start, key=lambda token: token[1])
                behind = bisect_left(offsets, end, key=_first_character)
                learned[first:behind] = True
    learned[: len(prompt)] = False
    return ids, learned


def _first_character(offset: tuple[int, int]) -> int:
    start, end = offset
    # a space that was trimmed away leaves a token of no characters, just behind its own
    return start if start < end else start - 1
