"""Load a tokenizer and refuse one that does not fit the model; save it beside the weights."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mamba2_train.errors import UserError

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, vocab_size: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's folder or of a hub id.

    Args:
        source: a folder with tokenizer.json, or a hub id.
        revision: branch, tag or commit of a hub id.
        vocab_size: rows of the model's embedding; the model may have more than the tokenizer has
            tokens, not fewer.

    Raises:
        UserError: there is no tokenizer, it has no eos token, or more tokens than the model.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        tokenizer = _from_folder(folder)
    else:
        tokenizer = _from_hub(str(source), revision)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {source} has no eos token, so a document could not end: set "
            f'"eos_token" in its {CONFIG_FILE}'
        )
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    if vocab_size is not None and n_tokens > vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {n_tokens} tokens and the model only {vocab_size}: set "
            "model.tokenizer to the tokenizer that the model was trained with"
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write the tokenizer's files into `folder`, beside the weights."""
    tokenizer.save_pretrained(str(folder))


def pad_id(tokenizer: Any) -> int:
    """Padding is marked by seq_idx and never read, so eos will do where there is no pad token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / TOKENIZER_FILE).is_file():
        if next(folder.glob("tokenizer*.model*"), None):
            # transformers' conversion ranks merges by id and splits most texts differently
            raise UserError(
                f"{folder} has a SentencePiece model but no {TOKENIZER_FILE}: set model.tokenizer "
                "to a folder or hub id that has one"
            )
        raise UserError(
            f"{folder} holds no {TOKENIZER_FILE}: copy the tokenizer's files there, or set "
            "model.tokenizer to a folder or hub id that has them"
        )
    try:
        if not (folder / CONFIG_FILE).is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_FILE))
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    # the tokenizers library raises bare Exceptions
    except Exception as error:
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({_reason(error)}): copy its files again"
        ) from error


def _from_hub(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:
        raise UserError(
            f"{name} is no folder here, and the hub gave no tokenizer ({_reason(error)}): check "
            "the name, the network and HF_TOKEN, or set model.tokenizer to a folder"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
