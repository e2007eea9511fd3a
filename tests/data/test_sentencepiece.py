"""SentencePiece models read without SentencePiece; the library itself is the truth."""

import importlib.util
import io
import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from mamba2_train.assets import FOLDER
from mamba2_train.data.sentencepiece import load_sentencepiece
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError

QUOTES = [json.loads(line)["quote"] for line in (FOLDER / "quotes.jsonl").open(encoding="utf-8")]
CONTROL, SYMBOLS = ["[INST]", "[/INST]", "<|x|>"], ["[DOC_1]", "[DOC_19]", "§§", "no", "now"]
SMALL = {"normalization_rule_name": "identity", "vocab_size": 420, "character_coverage": 0.999}


def train(folder, texts=QUOTES, **settings):
    """A model file and the library's own processor."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        minloglevel=2,
        **({"model_type": "bpe"} | SMALL | settings),
    )
    file = Path(folder) / "tokenizer.model"
    file.write_bytes(written.getvalue())
    return file, sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def edited(file, change):
    model = import_protobuf().ModelProto.FromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString())
    return file


def texts(truth, count, seed=0):
    """Quotes, pieces put together at random, control and user-defined symbols, any character."""
    rng = random.Random(seed)
    pieces = [truth.id_to_piece(i).replace("▁", " ") for i in range(truth.get_piece_size())]
    draws = [
        lambda: rng.choice(QUOTES),
        lambda: rng.choice(pieces),
        lambda: rng.choice([*CONTROL, *SYMBOLS, "<s>", "</s>", "<unk>", "<0x0A>", "[DOC_", "▁"]),
        lambda: (
            rng.choice([" ", "  ", "   ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b"]) * 3
        ),
        lambda: rng.choice(" aeinorst") * rng.randrange(1, 20),
        lambda: chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: rng.choice(["👩‍👩‍👧", "🇩🇪", "e\u0301", "\u1112\u1161\u11ab", "ﬁ", "№", "中文字"]),
    ]
    made = ["", *SYMBOLS, *CONTROL, "▁", "\0", " ", "  ", "\n", *pieces]
    made += [symbol + piece for symbol in SYMBOLS[:1] for piece in pieces]
    made += [" " * n + "x" * n for n in range(40)]
    while len(made) < count:
        made.append("".join(rng.choice(draws)() for _ in range(rng.randrange(1, 9))))
    return made


def assert_equal_ids(tokenizer, truth, made):
    ids = tokenizer(made, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, got, expected in zip(made, ids, truth.encode(made), strict=True):
        assert got == expected, text
    return sum(map(len, ids))


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("remove_extra_whitespaces", [True, False])
@pytest.mark.parametrize("symbols", [[], SYMBOLS])
def test_every_text_has_the_ids_of_sentencepiece(
    tmp_path, byte_fallback, add_dummy_prefix, remove_extra_whitespaces, symbols
):
    file, truth = train(
        tmp_path,
        byte_fallback=byte_fallback,
        vocab_size=620 if byte_fallback else 420,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        split_by_whitespace=add_dummy_prefix,  # else with pieces of several words
        control_symbols=CONTROL,
        user_defined_symbols=symbols,
    )
    tokenizer = load_sentencepiece(file)
    made = texts(truth, 2500)
    assert assert_equal_ids(tokenizer, truth, made) > 20_000
    if byte_fallback:  # nothing is lost, so the text comes back, as it does there
        made = [text for text in made if "▁" not in text]
        ids = truth.encode(made)
        assert tokenizer.batch_decode(ids) == truth.decode(ids)
        assert remove_extra_whitespaces or truth.decode(ids) == made


@pytest.mark.parametrize("seed", range(4))
def test_every_short_text_over_a_small_alphabet(tmp_path, seed):
    """Pieces that overlap themselves and each other, in each text there is of up to nine
    letters."""
    rng = random.Random(seed)
    corpus = ["".join(rng.choice("aab ") for _ in range(30)) for _ in range(400)]
    file, truth = train(tmp_path, corpus, vocab_size=60, remove_extra_whitespaces=False)
    made = ["".join(t) for n in range(1, 10) for t in itertools.product("ab ", repeat=n)]
    assert_equal_ids(load_sentencepiece(file), truth, made)


# ------------------------------------------------------------------ Mistral's own


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A folder with Mistral's v3 model, from their package (which is not imported)."""
    package = importlib.util.find_spec("mistral_common")
    assert package is not None, "pip install --no-deps mistral-common, as `make test` does"
    data = Path(next(iter(package.submodule_search_locations))) / "data"
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model.v3")
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model.v3"))
    return folder, load_tokenizer(folder, vocab_size=32768), truth


def mistral_texts(truth, count, seed):
    made = texts(truth, count + 2 * truth.get_piece_size(), seed)[2 * truth.get_piece_size() :]
    rng = random.Random(seed)
    for i in range(0, len(made), 5):
        made[i] = f"[REFERENCE_DOC_{rng.randrange(25)}]" * rng.randrange(1, 3) + made[i]
    return made + [" " * n + "def f(x):" for n in range(100)]


def test_mistral_v3(mistral):
    _, tokenizer, truth = mistral
    assert assert_equal_ids(tokenizer, truth, mistral_texts(truth, 1500, seed=1)) > 30_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_mistral_v3_at_length(mistral, seed):
    """Every piece alone and behind a user-defined symbol, this package's source, many texts."""
    _, tokenizer, truth = mistral
    pieces = [truth.id_to_piece(i).replace("▁", " ") for i in range(truth.get_piece_size())]
    made = [p for text in pieces for p in (text, f"[REFERENCE_DOC_1]{text}", f"x{text} ")]
    made += [file.read_text() for file in Path(__file__).parents[2].glob("*/**/*.py")]
    made += mistral_texts(truth, 30_000, seed)
    assert assert_equal_ids(tokenizer, truth, made) > 500_000


def test_mistral_v3_control_tokens(mistral):
    _, tokenizer, truth = mistral
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    named = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "</s>")
    assert tokenizer.convert_tokens_to_ids(named) == [truth.piece_to_id(name) for name in named]
    # their template writes a space behind them, mistral-common the prefix: the same ids
    chat = "[INST] Who said that?[/INST] She did.</s>[INST] No![/INST]"
    expected = [3, *truth.encode("Who said that?"), 4, *truth.encode("She did."), 2]
    expected += [3, *truth.encode("No!"), 4]
    assert tokenizer.encode(chat, add_special_tokens=False) == expected
    assert tokenizer.encode(chat) == [truth.bos_id(), *expected]
    assert tokenizer.decode(expected, skip_special_tokens=True) == "Who said that? She did. No!"


def test_saved_it_is_the_same_in_stock_transformers(mistral, tmp_path):
    _, tokenizer, truth = mistral
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    stock, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert not list(tmp_path.glob("*.model*"))  # tokenizer.json alone carries it
    made = mistral_texts(truth, 300, seed=2)
    for again in (stock, ours):
        assert_equal_ids(again, truth, made)
        assert again.special_tokens_map == tokenizer.special_tokens_map
        chat = "[INST] Hello[/INST] Hi</s>"
        assert again.encode(chat) == tokenizer.encode(chat) == again.encode(chat)
        assert again.get_vocab() == tokenizer.get_vocab()


def test_offsets_point_into_the_text(mistral):
    _, tokenizer, _ = mistral
    text = "Größe [INST] of[/INST] two  words"
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    tokens = tokenizer.convert_ids_to_tokens(found["input_ids"])
    spans = [text[start:stop] for start, stop in found["offset_mapping"]]
    assert "".join(spans) == text
    # the prefix of the first token stands for nothing in the text
    assert [tokens[0][1:], *tokens[1:]] == [span.replace(" ", "▁") for span in spans]


def test_sentencepiece_itself_is_not_needed(mistral):
    """In a process where it cannot be imported, as in an installation without `dev`."""
    folder, _, truth = mistral
    code = (
        "import importlib.machinery as m, sys\n"
        "real = m.PathFinder.find_spec\n"
        "hidden = lambda name, *rest: None if name.split('.')[0] == 'sentencepiece' "
        "else real(name, *rest)\n"
        "m.PathFinder.find_spec = staticmethod(hidden)\n"
        "from mamba2_train.data.tokenizer import load_tokenizer\n"
        "print(load_tokenizer(sys.argv[1])('Love is blind.')['input_ids'])\n"
        "assert 'sentencepiece' not in sys.modules\n"
    )
    run = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, *truth.encode("Love is blind.")]


# ------------------------------------------------------------------ folders and refusals


def test_tokenizer_config_beside_the_model_is_heard(tmp_path):
    _, truth = train(tmp_path, control_symbols=CONTROL)
    ids = truth.encode("Love is blind.")
    assert load_tokenizer(tmp_path).encode("Love is blind.") == [1, *ids]
    settings = {
        "add_bos_token": False,
        "add_eos_token": True,
        "eos_token": {"content": "[/INST]", "special": True},
        "pad_token": "<|x|>",
        "chat_template": "{{ messages[0]['content'] }}",
        "tokenizer_class": "LlamaTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    end = truth.piece_to_id("[/INST]")
    assert tokenizer.encode("Love is blind.") == [*ids, end]
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (end, "<|x|>")
    assert tokenizer.chat_template == settings["chat_template"]
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    assert load_tokenizer(tmp_path).chat_template == "{{ bos_token }}"
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    assert error(tmp_path) == (
        f"pad_token is '<pad>', which is no piece of {tmp_path}/tokenizer.model: correct it in the "
        "tokenizer_config.json there"
    )


def test_the_newest_of_several_and_tokenizer_json_first(tmp_path):
    _, old = train(tmp_path)
    shutil.copy(tmp_path / "tokenizer.model", tmp_path / "tokenizer.model.v1")
    _, new = train(tmp_path, vocab_size=300)
    (tmp_path / "tokenizer.model").rename(tmp_path / "tokenizer.model.v3")
    assert len(load_tokenizer(tmp_path)) == new.get_piece_size() == 300 != old.get_piece_size()
    shutil.copy(FOLDER / "tiny_base" / "tokenizer.json", tmp_path)
    shutil.copy(FOLDER / "tiny_base" / "tokenizer_config.json", tmp_path)
    assert len(load_tokenizer(tmp_path)) == 4096


def test_from_the_hub(tmp_path, monkeypatch):
    """A repository of which only the SentencePiece model is a tokenizer, as Mistral's may be."""
    _, truth = train(tmp_path)
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **options: asked.update(options, name=name) or str(tmp_path),
    )
    tokenizer = load_tokenizer("mistralai/some-model", revision="v3")
    assert tokenizer.encode("Love.", add_special_tokens=False) == truth.encode("Love.")
    assert (asked["name"], asked["revision"]) == ("mistralai/some-model", "v3")
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def error(folder, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"model_type": "unigram"}, "a unigram model"),
        ({"model_type": "char"}, "a char model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "the normalization table 'nmt_nfkc'"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_what_cannot_be_matched_is_refused(tmp_path, settings, asked):
    train(tmp_path, **settings)
    assert error(tmp_path) == (
        f"{tmp_path}/tokenizer.model asks for {asked}, which a tokenizer.json cannot do exactly: "
        "set model.tokenizer to a folder with a tokenizer.json, or train the SentencePiece model "
        "as bpe with normalization_rule_name=identity"
    )


def test_unused_pieces_and_tied_scores_are_refused(tmp_path):
    def unused(model):
        model.pieces[300].type = 5

    def tie(model):
        model.pieces[50].score = model.pieces[51].score

    file, _ = train(tmp_path)
    good = file.read_bytes()
    edited(file, unused)
    assert "asks for unused pieces" in error(tmp_path)
    file.write_bytes(good)
    edited(file, tie)
    assert "is that of another piece, too" in error(tmp_path)


def test_runs_of_spaces_may_tie(tmp_path):
    """As Mistral's do: 2 to 14 and 16 spaces, all of one score, below that of every other piece."""

    def add(model):
        for n in (7, 2, 16, *range(8, 15), 4, 3, 5, 6):
            model.pieces.add(piece="▁" * n, score=-1e9)

    file, _ = train(tmp_path, remove_extra_whitespaces=False)
    edited(file, add)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(file))
    made = [f"{a}{' ' * n}{b}" for n in range(150) for a in ("", "x") for b in ("", "the", "\n")]
    assert_equal_ids(load_sentencepiece(file), truth, made)

    def use(model):  # a piece made of a run: now their order matters to others
        model.pieces.add(piece="▁▁☃", score=-1e6)

    edited(file, use)
    assert "is that of another piece, too" in error(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no complete SentencePiece model (0 pieces"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is no SentencePiece model",
        ),
        (b'{"not": "a model"}', "is no SentencePiece model"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, content, reason):
    (tmp_path / "tokenizer.model.v3").write_bytes(content)
    assert f"{tmp_path}/tokenizer.model.v3 {reason}" in error(tmp_path)


def test_a_file_cut_off_is_told(tmp_path):
    file, _ = train(tmp_path)
    file.write_bytes(file.read_bytes()[:-500])
    assert "is no SentencePiece model, or damaged" in error(tmp_path)


def test_more_pieces_than_the_model_has_rows(tmp_path):
    train(tmp_path)
    assert "has 420 tokens and the model only 400" in error(tmp_path, vocab_size=400)
