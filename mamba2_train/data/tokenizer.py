"""Load a tokenizer and refuse one that does not fit the model; save it beside the weights."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mamba2_train.data.sentencepiece import load_sentencepiece
from mamba2_train.errors import UserError

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SENTENCEPIECE_FILES = "*.model*"  # tokenizer.model, tokenizer.model.v3, spiece.model
# of a tokenizer_config.json, what holds for a SentencePiece model beside it
SENTENCEPIECE_OPTIONS = (
    *("bos_token", "eos_token", "unk_token", "pad_token"),
    *("add_bos_token", "add_eos_token", "chat_template"),
)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, vocab_size: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's folder or of a hub id.

    Args:
        source: a folder or a hub id, with tokenizer.json or, where that is missing, a
            SentencePiece model such as Mistral's tokenizer.model.v3.
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


def check_template(template: str, tokenizer: Any) -> None:
    """Refuse a chat template that writes a special token which `tokenizer` lacks: it would write
    nothing in its place, and the model would learn conversations that do not end.
    """
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        guarded = re.search(rf"\b{name}\s+is\s+(not\s+)?defined", template)
        if getattr(tokenizer, name) is None and not guarded and re.search(rf"\b{name}\b", template):
            raise UserError(
                f"the chat template writes {name}, and the tokenizer has none: set "
                f'"{name}" in its {CONFIG_FILE}, or use another template'
            )


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    try:
        if (folder / TOKENIZER_FILE).is_file():
            if not (folder / CONFIG_FILE).is_file():
                return PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_FILE))
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        # transformers would convert these, too, and split most texts differently; of several
        # versions the newest
        if models := sorted(folder.glob(SENTENCEPIECE_FILES)):
            return load_sentencepiece(models[-1], **_options(folder))
    except UserError:
        raise
    # the tokenizers library raises bare Exceptions
    except Exception as error:
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({_reason(error)}): copy its files again"
        ) from error
    raise UserError(
        f"{folder} holds no {TOKENIZER_FILE} and no SentencePiece model: copy the tokenizer's "
        "files there, or set model.tokenizer to a folder or hub id that has them"
    )


def _options(folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if (config := folder / CONFIG_FILE).is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        options = {k: values[k] for k in SENTENCEPIECE_OPTIONS if values.get(k) is not None}
        options = {k: v["content"] if isinstance(v, dict) else v for k, v in options.items()}
    if (template := folder / TEMPLATE_FILE).is_file():
        options["chat_template"] = template.read_text(encoding="utf-8")
    return options


def _from_hub(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    files = [TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, SENTENCEPIECE_FILES]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)
        )
        if not (folder / TOKENIZER_FILE).is_file() and any(folder.glob(SENTENCEPIECE_FILES)):
            return _from_folder(folder)
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} is no folder here, and the hub gave no tokenizer ({_reason(error)}): check "
            "the name, the network and HF_TOKEN, or set model.tokenizer to a folder"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
