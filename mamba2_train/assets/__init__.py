"""What ships with the package: a tiny base model with its tokenizer, and quotes to tune it on."""

from pathlib import Path

FOLDER = Path(__file__).parent
EMBEDDED = "embedded"


def resolve(source: str) -> str:
    """`embedded` as the folder of the tiny base; any other source as it is."""
    return str(FOLDER / "tiny_base") if source == EMBEDDED else source
