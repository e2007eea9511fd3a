"""Chat templates, against transformers' apply_chat_template called directly, and against what is
read off a template by eye where that is known to mark the wrong tokens."""

import copy
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from mamba2_train.data.chat import set_template
from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import build_documents
from mamba2_train.data.encoding import encode, encode_pairs
from mamba2_train.data.formats import detect
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content + '<|im_end|>\n' }}{%- endgeneration %}"
    "{%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
UNMARKED = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
# without special tokens: an answer begins with a space, and ends with the tokenizer's eos
PLAIN = re.search(r"```jinja\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
# the space before an answer is not marked, but the token that it becomes one with is
SPACED = PLAIN.replace("'Answer:'", "'Answer: '").replace("' ' + m", "m")
# as Mistral's and Llama 3.1's do: tools in front, calls in JSON, answers of tools
TOOLS = (
    "{% if tools %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.tool_calls is defined %}{% for call in m.tool_calls %}"
    "{{ '[CALL]' + call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ '[' + m.role + ']' + m.content }}{% endif %}{% endfor %}"
)

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "And at night?"},
    {"role": "assistant", "content": "Black, with stars."},
]


@pytest.fixture
def chatty(tokenizer):
    """The embedded tokenizer with a template, ChatML unless told otherwise."""

    def make(template=CHATML):
        mine = copy.deepcopy(tokenizer)
        mine.chat_template = template
        return mine

    return make


def encoded(tokenizer, values, **settings):
    rows = [Row(values, "rows.jsonl", 3)]
    (example,) = encode(rows, tokenizer, detect(rows, DataConfig(source="x", **settings)))
    return example


def learned_text(tokenizer, example):
    """Learned stretches, decoded."""
    changes = np.flatnonzero(np.diff(example.learned.astype(int), prepend=0, append=0))
    return [
        tokenizer.decode(example.tokens[a:b])
        for a, b in zip(changes[::2], changes[1::2], strict=True)
    ]


@pytest.mark.parametrize("bos", [False, True])
def test_a_conversation_is_what_transformers_makes_of_it(chatty, bos):
    tokenizer = chatty()
    if bos:  # put in front of texts, but a template writes its own
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        assert tokenizer.encode("x")[0] == 0
    theirs = tokenizer.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True)
    ours = encoded(tokenizer, {"messages": CONVERSATION})
    assert ours.tokens.tolist() == theirs["input_ids"]  # and no eos behind it
    assert ours.learned.all()
    ours = encoded(tokenizer, {"messages": CONVERSATION}, loss_on="assistant")
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.learned.tolist() == [bool(m) for m in theirs["assistant_masks"]]
    assert learned_text(tokenizer, ours) == [
        "It is blue.<|im_end|>\n",
        "Black, with stars.<|im_end|>\n",
    ]


@pytest.mark.parametrize("template", [CHATML, PLAIN, SPACED])
@pytest.mark.parametrize("seed", range(10))
def test_any_conversation_is_marked_as_transformers_marks_it(chatty, template, seed):
    rng = random.Random(seed)
    words = ["to", "day", " ", "\n", "Friendship", "?", "1984", "  "]
    conversation = [
        {
            "role": "assistant" if i % 2 else "user",
            "content": "The" + "".join(rng.choices(words, k=rng.randrange(30))) + ".",
        }
        for i in range(rng.randrange(2, 7))
    ]
    tokenizer = chatty(template)
    theirs = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True)
    ours = encoded(tokenizer, {"messages": conversation}, loss_on="assistant")
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.learned.tolist() == [bool(m) for m in theirs["assistant_masks"]]


def test_spaces_and_characters_of_several_tokens_are_marked_too(chatty):
    """GPT-NeoX's tokenizer leaves spaces out of its offsets, which transformers does not expect:
    it would mark nothing here."""
    conversation = [*CONVERSATION[1:4], {"role": "assistant", "content": "  Noir, étoilé 漢字"}]
    for end in ("<|endoftext|>", "\n "):
        template = PLAIN.replace("eos_token", repr(end))
        tokenizer = chatty(template)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(
            trim_offsets=True, add_prefix_space=False
        )
        example = encoded(tokenizer, {"messages": conversation}, loss_on="assistant")
        first, last = learned_text(tokenizer, example)
        assert first == f" It is blue.{end}".rstrip(" ")  # its last space is in the next token
        assert last == f"   Noir, étoilé 漢字{end}"
    example = encoded(tokenizer, {"messages": conversation}, loss_on="assistant")
    marked = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True)
    assert not any(marked["assistant_masks"])  # the day it does, theirs will do


def test_the_last_character_of_an_answer_may_be_several_tokens(chatty):
    tokenizer = chatty(PLAIN.replace(" + eos_token", ""))
    conversation = [
        {"role": "user", "content": "漢"},
        {"role": "assistant", "content": "字"},
        {"role": "user", "content": "漢"},
    ]
    example = encoded(tokenizer, {"messages": conversation}, loss_on="assistant")
    assert learned_text(tokenizer, example) == [" 字"]


def test_an_empty_answer_marks_nothing(chatty):
    tokenizer = chatty(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    contents = [("user", "T"), ("assistant", ""), ("user", "he "), ("assistant", "x")]
    conversation = [{"role": role, "content": text} for role, text in contents]
    example = encoded(tokenizer, {"messages": conversation}, loss_on="assistant")
    assert tokenizer.convert_ids_to_tokens(example.tokens)[0] == "The"
    assert not example.learned[0]
    assert example.learned[-1]


@pytest.mark.parametrize("n_prompt", [1, 2, 4])
def test_of_a_prompt_in_messages_the_completion_is_learned(chatty, n_prompt):
    tokenizer = chatty()
    if n_prompt == 1:
        prompt, completion = CONVERSATION[1:2], CONVERSATION[2:3]
    else:
        prompt, completion = CONVERSATION[:n_prompt], CONVERSATION[n_prompt:]
    # TRL's rule: what apply_chat_template adds to the prompt that asks for an answer
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*prompt, *completion])["input_ids"]
    assert whole[: len(before)] == before
    example = encoded(tokenizer, {"prompt": prompt, "completion": completion})
    assert example.tokens.tolist() == whole
    assert example.learned.tolist() == [i >= len(before) for i in range(len(whole))]
    every = encoded(tokenizer, {"prompt": prompt, "completion": completion}, loss_on="all")
    assert every.tokens.tolist() == whole
    assert every.learned.all()


def test_masks_of_completion_and_assistant_are_joined(chatty):
    tokenizer = chatty()
    values = {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]}
    example = encoded(tokenizer, values, loss_on="assistant")
    assert learned_text(tokenizer, example) == [
        "It is blue.<|im_end|>\n",
        "Black, with stars.<|im_end|>\n",
    ]
    values = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}
    example = encoded(tokenizer, values, loss_on="assistant")
    assert learned_text(tokenizer, example) == ["Black, with stars.<|im_end|>\n"]


def test_tools_reach_the_template(chatty):
    tokenizer = chatty(TOOLS)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"a": 1}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    conversation = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    theirs = tokenizer.apply_chat_template(
        conversation, tools=tools, return_assistant_tokens_mask=True
    )
    values = {"messages": conversation, "tools": tools}
    ours = encoded(tokenizer, values, loss_on="assistant")
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.learned.tolist() == [bool(m) for m in theirs["assistant_masks"]]
    assert learned_text(tokenizer, ours) == [
        '[CALL]weather{"city": "Paris"}<|endoftext|>',
        "It rains.<|endoftext|>",
    ]
    assert "[TOOLS]" not in tokenizer.decode(encoded(tokenizer, {"messages": conversation}).tokens)


def test_rows_of_several_kinds_keep_their_order(chatty):
    tokenizer = chatty()
    rows = [
        Row({"prompt": "to", "completion": "day"}, "rows.jsonl", 1),
        Row({"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:3]}, "rows.jsonl", 2),
        Row({"prompt": "x", "completion": ""}, "rows.jsonl", 3),
        Row({"prompt": "to", "completion": "night"}, "rows.jsonl", 4),
    ]
    config = detect(rows, DataConfig(source="x"))
    together = encode(rows, tokenizer, config)
    for row, example in zip(rows, together, strict=True):
        (alone,) = encode([row], tokenizer, config)
        assert example.tokens.tolist() == alone.tokens.tolist()
        assert example.learned.tolist() == alone.learned.tolist()
    assert [len(example.tokens) > 0 for example in together] == [True, True, False, True]


def test_a_template_from_a_file_is_saved_with_the_tokenizer(chatty, tmp_path):
    tokenizer = chatty(None)
    (tmp_path / "chat.jinja").write_text(PLAIN)
    set_template(tokenizer, str(tmp_path / "chat.jinja"))
    example = encoded(tokenizer, {"messages": CONVERSATION[1:3]})
    assert tokenizer.decode(example.tokens) == (
        "Question: What color is the sky?\nAnswer: It is blue.<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == PLAIN
    set_template(tokenizer, None)
    assert tokenizer.chat_template == PLAIN
    with pytest.raises(UserError, match=r"nowhere.jinja cannot be read \(No such file"):
        set_template(tokenizer, str(tmp_path / "nowhere.jinja"))


ROW = {"messages": CONVERSATION}
PAIR = {"prompt": CONVERSATION[1:2], "completion": CONVERSATION[2:3]}
REFUSES = "{{ raise_exception('Roles must alternate,\nuser first') }}"
# reasoning models' templates take the thoughts out of earlier turns
FORGETS = (
    "{% for m in messages %}{{ m.role + (' ' if loop.last else ': ') + m.content }}{% endfor %}"
)
# no line break, so that an answer may grow onto the prompt
GLUED = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "values", "settings", "message"),
    [
        (
            None,
            ROW,
            {"on_bad_row": "skip"},
            "the data are conversations and the tokenizer has no chat template for them: set "
            "data.chat_template to a Jinja file",
        ),
        (
            UNMARKED,
            ROW,
            {"loss_on": "assistant", "on_bad_row": "skip"},
            "data.loss_on=assistant, but the chat template does not mark what the assistant says: "
            "put {% generation %} and {% endgeneration %} around it (in a file named by "
            "data.chat_template), or set data.loss_on to completion or all",
        ),
        (
            "{% for m in messages %}\n{{ oops }",
            ROW,
            {"on_bad_row": "skip"},
            "the chat template is not Jinja (line 2: unexpected '}'): mend it, or set "
            "data.chat_template to another file",
        ),
        (
            REFUSES,
            ROW,
            {},
            "rows.jsonl, line 3: the chat template refuses it (Roles must alternate, user first); "
            "change the messages or the template",
        ),
        (
            FORGETS,
            PAIR,
            {},
            "rows.jsonl, line 3: the chat template writes the prompt in another way once the "
            "completion follows (after 'user': ' What color is the s' alone, ': What color is the "
            "' with it); mend the template, or train on messages instead",
        ),
        (
            GLUED,
            {
                "prompt": [{"role": "user", "content": "to"}],
                "completion": [{"role": "assistant", "content": "day"}],
            },
            {},
            "rows.jsonl, line 3: its completion begins with 'day', which becomes one token with "
            "the prompt's end, 'to'; strip it, or end the template's generation prompt with a "
            "special token",
        ),
    ],
)
def test_what_a_template_cannot_do_is_told(chatty, template, values, settings, message):
    with pytest.raises(UserError) as caught:
        encoded(chatty(template), values, **settings)
    assert str(caught.value) == message


def test_what_a_template_refuses_is_skipped_and_counted_when_asked(chatty, caplog):
    refuses_system = "{% if messages[0].role == 'system' %}{{ raise_exception('No.') }}{% endif %}"
    tokenizer = chatty(refuses_system + CHATML)
    conversations = [CONVERSATION[1:], CONVERSATION, CONVERSATION[1:3], [{"role": "bot"}], []]
    rows = [Row({"messages": c}, "rows.jsonl", i) for i, c in enumerate(conversations, 1)]
    config = detect(rows, DataConfig(source="x", on_bad_row="skip"))
    with caplog.at_level("WARNING", "mamba2_train"):
        documents = build_documents(rows, tokenizer, config)
    assert len(documents) == documents.counts["documents"] == 2
    assert (documents.counts["skipped"], documents.counts["dropped"]) == (2, 1)
    assert caplog.messages == [
        "skipped 2 of 5 rows; the first: rows.jsonl, line 2: the chat template refuses it (No.); "
        "change the messages or the template",
        "dropped 1 of 5 rows: nothing to learn in them",
    ]


def test_pairs_of_conversations_share_the_tokens_of_their_prompt(chatty):
    tokenizer = chatty()
    other = {"role": "assistant", "content": "It is green."}
    rows = [
        Row(values, "rows.jsonl", i)
        for i, values in enumerate(
            [
                {"chosen": CONVERSATION[:3], "rejected": [*CONVERSATION[:2], other]},
                {"prompt": "p", "chosen": "same", "rejected": "same"},
                {"prompt": "What color?", "chosen": " Blue.", "rejected": " Green."},
                {"chosen": [{"role": "bot"}], "rejected": []},
            ],
            1,
        )
    ]
    config = detect(rows, DataConfig(source="x", on_bad_row="skip"))
    chat, equal, strings, bad = encode_pairs(rows, tokenizer, config)
    prompt = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)
    assert chat.prompt.tolist() == prompt["input_ids"]
    for ids, answer in ((chat.chosen, CONVERSATION[2]), (chat.rejected, other)):
        whole = tokenizer.apply_chat_template([*CONVERSATION[:2], answer])["input_ids"]
        assert [*chat.prompt, *ids] == whole
    eos = tokenizer.eos_token_id
    assert strings.prompt.tolist() == tokenizer.encode("What color?")
    assert strings.chosen.tolist() == [*tokenizer.encode(" Blue."), eos]
    assert strings.rejected.tolist() == [*tokenizer.encode(" Green."), eos]
    for nothing in (equal, bad):
        assert [len(part) for part in nothing[:3]] == [0, 0, 0]
    assert equal.fault is None
    assert bad.fault.startswith("rows.jsonl, line 4: message 1 of 'chosen' has the unknown role")
    with pytest.raises(UserError, match=r"^rows.jsonl, line 4: message 1"):
        encode_pairs(rows, tokenizer, config.model_copy(update={"on_bad_row": "error"}))


@pytest.mark.parametrize(
    ("values", "cure"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "completion_column=chosen"),
        ({"chosen": "a c", "rejected": "a r"}, "text_column=chosen"),
        (
            {
                "prompt": CONVERSATION[:2],
                "chosen": CONVERSATION[2:3],
                "rejected": CONVERSATION[4:],
            },
            "completion_column=chosen",
        ),
        (
            {
                "prompt": "p",
                "chosen": CONVERSATION[1:3],
                "rejected": [*CONVERSATION[1:2], CONVERSATION[4]],
            },
            "messages_column=chosen",
        ),
    ],
)
def test_pairs_need_their_objective_and_the_cure_for_fine_tuning_works(chatty, values, cure):
    tokenizer = chatty()
    with pytest.raises(UserError) as caught:
        encoded(tokenizer, values)
    assert str(caught.value) == (
        "rows.jsonl holds preference pairs, and this run learns one answer to each prompt: set "
        f"objective=dpo to learn which is preferred, or, to train on `chosen` alone, data.{cure}"
    )
    setting, column = cure.split("=")
    assert encoded(tokenizer, values, **{setting: column}).learned.any()
