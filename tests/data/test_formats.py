"""What rows mean, against rows written out by hand: texts and messages in the words of the
formats' own documentation."""

import re

import numpy as np
import pytest

from mamba2_train.data.config import DataConfig
from mamba2_train.data.formats import Chat, Ids, Pair, detect, read
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError


def understood(values, **settings):
    rows = [Row(values, "rows.jsonl", 7)]
    return read(rows[0], detect(rows, DataConfig(source="rows.jsonl", **settings)))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SKY = [user("What color is the sky?"), assistant("It is blue.")]


@pytest.mark.parametrize(
    ("columns", "format", "loss_on"),
    [
        ({"text": "t", "messages": SKY}, "messages", "all"),
        ({"prompt": "p", "prompt_id": "0", "messages": SKY}, "messages", "all"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "conversations", "all"),
        ({"instruction": "i", "input": "", "output": "o", "text": "t"}, "alpaca", "completion"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference", "completion"),
        ({"chosen": SKY, "rejected": SKY, "messages": SKY}, "preference", "completion"),
        ({"prompt": SKY[:1], "completion": SKY[1:]}, "prompt_completion", "completion"),
        ({"text": "t", "input_ids": [1, 2]}, "tokens", "all"),
        ({"input_ids": [1], "completion_mask": [1]}, "tokens", "completion"),
        ({"input_ids": [1], "assistant_masks": [1]}, "tokens", "assistant"),
        ({"text": "t"}, "text", "all"),
    ],
)
def test_the_format_and_what_is_learned_are_seen_from_the_columns(columns, format, loss_on):
    config = detect([Row(columns, "x", 1)], DataConfig(source="x"))
    assert (config.format, config.loss_on) == (format, loss_on)
    assert detect([Row(columns, "x", 1)], config) == config


@pytest.mark.parametrize(
    ("columns", "settings", "format"),
    [
        ({"messages": SKY, "text": "t"}, {"format": "text"}, "text"),
        ({"messages": SKY, "text": "t"}, {"text_column": "text"}, "text"),
        ({"dialogue": SKY, "text": "t"}, {"messages_column": "dialogue"}, "messages"),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            {"completion_column": "chosen"},
            "prompt_completion",
        ),
        ({"chosen": SKY, "rejected": SKY}, {"messages_column": "chosen"}, "messages"),
        ({"instruction": "i", "output": "o"}, {"text_column": "output"}, "text"),
    ],
)
def test_what_the_user_names_goes_first(columns, settings, format):
    assert detect([Row(columns, "x", 1)], DataConfig(source="x", **settings)).format == format


def test_alpaca_is_the_text_that_its_authors_published():
    # the first row of tatsu-lab/alpaca with its column `text`, cut short
    values = {
        "instruction": "Give three tips for staying healthy.",
        "input": "",
        "output": "1.Eat a balanced diet",
    }
    published = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nGive three tips for staying healthy.\n\n"
        "### Response:\n1.Eat a balanced diet"
    )
    prompt, answer = understood(values)
    assert prompt.text + answer.text == published
    assert answer == ("1.Eat a balanced diet", True)
    assert not prompt.learned
    assert understood(values, loss_on="all")[0].learned

    values = {"instruction": "Classify {this}.", "input": "Tea, {oak}", "output": "Drink, tree"}
    published = (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nClassify {this}.\n\n### Input:\nTea, {oak}\n\n### Response:\n"
    )
    assert understood(values)[0].text == published


def test_conversations_of_sharegpt_become_messages():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Weather in Paris?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    assert understood({"conversations": turns}) == Chat(
        [],
        [
            {"role": "system", "content": "Be brief."},
            user("Weather in Paris?"),
            {**assistant(""), "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "rain"},
            assistant("It rains."),
        ],
        None,
    )
    # some name the column so and write role and content
    assert understood({"conversations": SKY}) == Chat([], SKY, None)


def test_tool_calls_and_tools_are_read_in_every_spelling():
    function = {"name": "weather", "arguments": {"city": "Paris"}}
    schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    expected = Chat(
        [],
        [
            user("Weather?"),
            {
                **assistant(""),
                "tool_calls": [{"type": "function", "id": "call_1", "function": function}],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
        ],
        [schema],
    )
    as_text = {"name": "weather", "arguments": '{"city": "Paris"}'}
    openai = [
        user("Weather?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": as_text}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]
    assert understood({"messages": openai, "tools": [schema]}) == expected
    # Parquet has one type for all messages, so each has every key
    keys = {"tool_calls": None, "tool_call_id": None, "name": None}
    typed = [keys | message for message in openai]
    padded = {"type": "function", "function": {**schema["function"], "strict": None}}
    assert understood({"messages": typed, "tools": [padded]}) == expected
    text = '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'
    assert understood({"messages": openai, "tools": text}) == expected
    for nothing in (None, [], "", "null"):
        assert understood({"messages": openai, "tools": nothing}).tools is None
    # before tools there were functions
    old = [user("Weather?"), {"role": "assistant", "function_call": as_text}]
    (call,) = understood({"messages": old}).completion[1]["tool_calls"]
    assert call == {"type": "function", "function": function}


def test_prompts_and_completions_may_be_messages():
    assert understood({"prompt": SKY[:1], "completion": SKY[1:]}) == Chat(SKY[:1], SKY[1:], None)


BLUE, GREEN = assistant("It is blue."), assistant("It is green.")
QUESTION = user("What color is the sky?")


@pytest.mark.parametrize(
    ("values", "prompt", "chosen", "rejected"),
    [
        # the examples of TRL's documentation of dataset formats
        (
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
            "The sky is",
            " blue.",
            " green.",
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            "The sky is",
            " blue.",
            " green.",
        ),
        (
            {"prompt": [QUESTION], "chosen": [BLUE], "rejected": [GREEN]},
            [QUESTION],
            [BLUE],
            [GREEN],
        ),
        ({"chosen": [QUESTION, BLUE], "rejected": [QUESTION, GREEN]}, [QUESTION], [BLUE], [GREEN]),
        # a prompt that the conversations repeat
        (
            {"prompt": "Sky?", "chosen": [QUESTION, BLUE], "rejected": [QUESTION, GREEN]},
            [QUESTION],
            [BLUE],
            [GREEN],
        ),
        # one answer continues the other
        ({"chosen": "It is so", "rejected": "It is"}, "It i", "s so", "s"),
        ({"chosen": "yes", "rejected": "no"}, "", "yes", "no"),
    ],
)
def test_preference_pairs_share_a_prompt(values, prompt, chosen, rejected):
    pair = understood(values)
    assert isinstance(pair, Pair)
    for side, answer in ((pair.chosen, chosen), (pair.rejected, rejected)):
        if isinstance(prompt, str):
            assert side == [(prompt, False), (answer, True)]
        else:
            assert side == Chat(prompt, answer, None)


def test_a_pair_of_equals_prefers_nothing():
    assert not understood({"prompt": "p", "chosen": "same", "rejected": "same"})
    assert not understood({"prompt": "p", "chosen": "one", "rejected": " "})


def learned(values, **settings):
    content = understood(values, **settings)
    assert isinstance(content, Ids)
    return content.tokens.tolist(), content.learned.astype(int).tolist()


def test_masks_of_tokens_are_joined():
    row = {
        "input_ids": [5, 6, 7, 8, 9, 1],
        "attention_mask": [1, 1, 1, 1, 1, 0],
        "labels": [-100, 6, 7, 8, 9, -100],
        "completion_mask": [0, 0, 1, 1, 1, 0],
        "assistant_masks": [1, 1, 0, 1, 1, 0],
    }
    assert learned(row) == ([5, 6, 7, 8, 9], [0, 0, 0, 1, 1])
    del row["assistant_masks"]
    assert learned(row) == ([5, 6, 7, 8, 9], [0, 0, 1, 1, 1])
    assert learned(row, loss_on="all") == ([5, 6, 7, 8, 9], [0, 1, 1, 1, 1])
    del row["completion_mask"]
    assert learned(row) == ([5, 6, 7, 8, 9], [0, 1, 1, 1, 1])
    assert learned({"input_ids": np.array([5, 6])}) == ([5, 6], [1, 1])
    # padding on the left
    assert learned({"input_ids": [1, 5, 6], "attention_mask": [0, 1, 1]}) == ([5, 6], [1, 1])


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({"messages": []}, {}),
        ({"messages": None}, {}),
        ({"messages": [user(""), assistant(" ")]}, {}),
        ({"prompt": SKY[:1], "completion": [assistant("")]}, {}),
        ({"prompt": SKY[:1], "completion": None}, {}),
        ({"prompt": SKY[:1], "completion": []}, {}),
        ({"instruction": "i", "output": None}, {}),
        ({"chosen": None, "rejected": "no"}, {}),
        ({"input_ids": []}, {}),
        ({"input_ids": None}, {}),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, {}),
        ({"input_ids": [1, 2], "labels": [-100, 2], "completion_mask": [1, 0]}, {}),
    ],
)
def test_rows_with_nothing_to_learn_are_false(values, settings):
    content = understood(values, **settings)
    assert not content
    assert content == []


BAD_ROWS = [
    ({"messages": "hello"}, "column 'messages' holds 'hello' (str); make it a list of messages"),
    ({"messages": ["hello"]}, "column 'messages' holds ['hello'] (list); make it a list of messag"),
    (
        {"messages": [user("x"), {"role": "asistant", "content": "y"}]},
        "message 2 of 'messages' has the unknown role 'asistant'. Did you mean 'assistant'? Known:",
    ),
    ({"messages": [{"content": "x"}]}, "message 1 of 'messages' has no role; give it one of: sys"),
    ({"messages": [{"role": 3, "content": "x"}]}, "has the unknown role 3"),
    (
        {"conversations": [{"from": "robot", "value": "x"}]},
        "message 1 of 'conversations' has the unknown role 'robot'",
    ),
    ({"messages": [{"role": "user"}]}, "message 1 of 'messages' has no content; give it a string"),
    ({"messages": [{"role": "user", "content": 4}]}, "has the content 4 (int); make it a string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "has the content [{'type': 'image_url'}] (list); make it a string",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "message 1 of 'messages' has the tool call {'function': {}} (dict); give it a name",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}],
                }
            ]
        },
        "message 1 of 'messages', call of 'f' holds '{oops' (str); make it JSON",
    ),
    ({"messages": SKY, "tools": 5}, "column 'tools' holds 5 (int); make it a list of JSON schemas"),
    ({"messages": SKY, "tools": "{"}, "column 'tools' holds '{' (str); make it JSON"),
    (
        {"prompt": SKY[:1], "completion": "blue"},
        "column 'prompt' holds messages and 'completion' 'blue' (str); make both strings or both",
    ),
    (
        {"prompt": "sky?", "completion": SKY[1:]},
        "column 'completion' holds [{'role': 'assistant', 'content': 'It is blue.'}] (list); make",
    ),
    (
        {"prompt": SKY[:1], "completion": SKY},
        "column 'completion' begins with a message of the user; begin it with the assistant's",
    ),
    ({"instruction": "i", "output": 7}, "column 'output' holds 7 (int); make it a string"),
    ({"chosen": 1, "rejected": 2}, "column 'chosen' holds 1 (int); make it a string"),
    (
        {"input_ids": [1, 2, 3], "labels": [1, 2]},
        "column 'labels' has 2 values and input_ids 3; give one for each",
    ),
    (
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
        "column 'labels' has 2 at position 0, where input_ids has 1; give the same ids, not shift",
    ),
    ({"input_ids": [1.5]}, "column 'input_ids' holds [1.5] (list); make it a list of integers"),
    ({"input_ids": [[1], [2, 3]]}, "column 'input_ids' holds [[1], [2, 3]] (list); make it a li"),
    ({"input_ids": "1 2"}, "column 'input_ids' holds '1 2' (str); make it a list of integers"),
]


@pytest.mark.parametrize(("values", "message"), BAD_ROWS)
def test_a_bad_row_is_told_with_its_place_or_skipped(values, message):
    with pytest.raises(UserError) as caught:
        understood(values)
    assert str(caught.value).startswith("rows.jsonl, line 7: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    skipped = understood(values, on_bad_row="skip")
    assert not skipped
    assert skipped.message == str(caught.value)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (
            {"instruction": "i", "answer": "a"},
            {"format": "alpaca"},
            "rows.jsonl has no column 'output'. data.format=alpaca needs it; the columns are: "
            "instruction, answer",
        ),
        (
            {"chats": SKY},
            {"messages_column": "chat"},
            "rows.jsonl has no column 'chat'. Did you mean 'chats'? Set data.messages_column to "
            "one of: chats",
        ),
        (
            {"text": "t"},
            {"format": "messages"},
            "rows.jsonl has no column 'messages'. Set data.messages_column to one of: text",
        ),
        (
            {"messages": SKY},
            {"loss_on": "completion"},
            "data.loss_on=completion needs prompts, and rows of format messages have none: set "
            "data.loss_on to assistant or all",
        ),
        (
            {"text": "t"},
            {"loss_on": "assistant"},
            "data.loss_on=assistant needs messages, and rows of format text are strings: set "
            "data.loss_on to completion or all",
        ),
        (
            {"prompt": "p", "completion": "c"},
            {"loss_on": "assistant", "on_bad_row": "skip"},
            "data.loss_on=assistant needs messages, and columns 'prompt' and 'completion' are "
            "strings: set data.loss_on to completion or all",
        ),
        (
            {"input_ids": [1, 2]},
            {"loss_on": "assistant"},
            "rows.jsonl has no column 'assistant_masks'. data.format=tokens needs it; the columns "
            "are: input_ids",
        ),
    ],
)
def test_settings_that_do_not_fit_the_rows_are_told(values, settings, message):
    with pytest.raises(UserError) as caught:
        understood(values, **settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "a", "messages_column": "b"}, "messages_column is 'b' beside another"),
        ({"format": "alpaca", "text_column": "a"}, "format=alpaca has no text_column: remove it"),
        ({"format": "text", "messages_column": "a"}, "set format to messages or conversations"),
    ],
)
def test_columns_of_another_format_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(source="x", **settings)
