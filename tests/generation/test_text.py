"""Text that grows with its tokens, against the text of all of them; prompts in batches; chats."""

import pytest
import torch

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.generation import Conversation, GrowingText, complete, generate, read
from mamba2_train.generation.chat import rendered
from mamba2_train.generation.text import encoded

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return load_pretrained(FOLDER / "tiny_base").eval()


@pytest.fixture
def tokenizer():
    return load_tokenizer(FOLDER / "tiny_base")


@pytest.mark.parametrize(
    "text", ["Plain words, and more.", "naïve café 日本語 🙂🙃 end", "  two  spaces\n\nlines\t"]
)
def test_pieces_join_to_the_text(tokenizer, text):
    prompt, ids = tokenizer.encode("A prompt:"), tokenizer.encode(text)
    growing = GrowingText(tokenizer, prompt)
    pieces = [growing.push(token) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + growing.finish() == text == growing.text


def test_half_a_character_waits_and_is_shown_when_nothing_follows(tokenizer):
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    growing = GrowingText(tokenizer, [])
    assert [growing.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert growing.finish() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_text_do_not_wait_for_ever(tokenizer):
    (token,) = tokenizer.encode("🙂")[:1]
    growing = GrowingText(tokenizer, [])
    shown = "".join(growing.push(token) for _ in range(20))
    assert len(shown) >= 16


def test_the_cost_of_a_token_does_not_grow(tokenizer):
    lengths = []

    class Counting:
        def decode(self, ids, **options):
            lengths.append(len(ids))
            return tokenizer.decode(ids, **options)

    growing = GrowingText(Counting(), tokenizer.encode("word " * 50))
    for token in tokenizer.encode("and on " * 200):
        growing.push(token)
    assert max(lengths) <= 16


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["stop"], "Go on, "),
        (["Go on, stop", "on, s"], "Go "),
        (["\n\n"], "Go on, stop here.\nQ: no"),
        (["Q:"], "Go on, stop here.\n"),
        (["nowhere", "ere.\nZ"], "Go on, stop here.\nQ: no\n\nmore"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_never_shown(tokenizer, stop, expected):
    growing = GrowingText(tokenizer, [], stop)
    shown = ""
    for token in tokenizer.encode("Go on, stop here.\nQ: no\n\nmore"):
        shown += growing.push(token)
        assert expected.startswith(shown)
    assert shown + growing.finish() == expected == growing.text
    assert growing.stopped == ("nowhere" not in stop)


def test_completions_do_not_depend_on_the_batches(model, tokenizer):
    prompts = [tokenizer.encode(text) for text in ("Love is", "The", "In those days there was a")]
    how = {"max_new_tokens": 12, "temperature": 0.9, "seed": 5}
    together = list(complete(model, tokenizer, prompts, **how))
    assert together == list(complete(model, tokenizer, prompts, batch_size=2, **how))
    for i, prompt in enumerate(prompts):
        out = generate(
            model,
            torch.tensor([prompt]),
            eos_token_id=tokenizer.eos_token_id,
            **(how | {"seed": 5 + i}),
        )[0, len(prompt) :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        assert together[i].text == text
        assert together[i].n_tokens == len(out)


def test_each_row_ends_by_itself(model, tokenizer):
    prompts = [tokenizer.encode(text) for text in ("Love is", "The LORD")]
    free = list(complete(model, tokenizer, prompts, max_new_tokens=20))
    word = free[0].text[5:9]
    stopped = list(complete(model, tokenizer, prompts, max_new_tokens=20, stop=[word]))
    assert stopped[0].text == free[0].text.split(word)[0]
    assert stopped[0].ended_by == "stop"
    assert stopped[0].n_tokens < 20
    assert word not in stopped[1].text
    assert free[1].text.startswith(stopped[1].text)


def test_a_special_token_as_a_stop_string(model, tokenizer):
    prompt = tokenizer.encode("Love is")
    free = generate(model, torch.tensor([prompt]), max_new_tokens=10)[0, len(prompt) :]
    word = tokenizer.convert_ids_to_tokens(int(free[3]))
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    (done,) = complete(model, tokenizer, [prompt], max_new_tokens=10, stop=[word])
    assert done.ended_by == "eos"
    assert done.n_tokens <= 4


def test_text_that_follows_a_prefix_is_streamed_as_it_is_returned(model, tokenizer):
    prompt = tokenizer.encode("It is a truth")
    shown = []
    after = read(model, torch.tensor([prompt]))
    (streamed,) = complete(
        model, tokenizer, [[]], after=after, max_new_tokens=9, on_text=shown.append
    )
    (whole,) = complete(model, tokenizer, [prompt], max_new_tokens=9)
    assert "".join(shown) == streamed.text == whole.text


def test_a_conversation_reads_only_what_is_new_and_answers_as_if_it_read_all(
    model, tokenizer, monkeypatch
):
    tokenizer.chat_template = TEMPLATE
    talk = Conversation(model, tokenizer, system="Be brief.")
    how = {"max_new_tokens": 10, "stop": ["\n"]}
    first = talk.answer("What is love?", **how)
    lengths = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **k: (lengths.append(ids.shape[1]), forward(ids, **k))[1]
    )
    second = talk.answer("And what is hope?", **how)
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is love?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And what is hope?"},
    ]
    whole = rendered(said, tokenizer)
    assert sum(lengths) < len(whole) - 10
    (expected,) = complete(model, tokenizer, [whole], **how)
    assert second == expected


def test_a_template_that_rewrites_the_past_is_read_anew(model, tokenizer):
    """As those do that leave out the reasoning of earlier answers."""
    tokenizer.chat_template = (
        "{{ messages | length }} messages, the last {{ messages[-1].content }}"
    )
    talk = Conversation(model, tokenizer)
    talk.answer("one", max_new_tokens=4)
    second = talk.answer("two", max_new_tokens=4)
    whole = tokenizer.encode("3 messages, the last two")
    assert [second] == list(complete(model, tokenizer, [whole], max_new_tokens=4))


def test_faults_of_prompts(model, tokenizer):
    with pytest.raises(UserError, match="prompt is empty"):
        encoded("", tokenizer, 4096)
    with pytest.raises(UserError, match="prompt has 3 tokens and max_prompt_tokens is 2"):
        encoded("a b c", tokenizer, 4096, most=2)
    with pytest.raises(UserError, match="model's are 0 to 4"):
        encoded("hello", tokenizer, 5)
    with pytest.raises(UserError, match="no chat template"):
        rendered([{"role": "user", "content": "a"}], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="refuses the messages: roles must alternate"):
        rendered([{"role": "user", "content": "a"}], tokenizer)
