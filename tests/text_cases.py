"""A model folder that reads text, and files of documents for it."""

import json
import string
from pathlib import Path

from tiny import write_checkpoint
from tiny_configs import CONFIGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

RAW = CONFIGS["mixtral_plain"]
LETTERS = string.ascii_letters + string.digits + " .,\n'é"
DOCUMENTS = (
    "It was a bright cold day in April.",
    "Nine.",
    "The sea, once it casts its spell, holds one in its net of wonder forever. " * 2,
    "Fini, l'été.\nAnd the clocks were striking thirteen.",
)


def write_readable(folder: Path) -> Path:
    """A tiny Mixtral with a tokenizer of letters: <s> is 1, </s> is 2."""
    write_checkpoint(folder, RAW)
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def ids_of(document: str) -> list[int]:
    """What the model sees of a document."""
    return [1, *(3 + LETTERS.index(letter) for letter in document), 2]


def write_texts(folder: Path) -> list[Path]:
    """The documents, the first two as text and the others as JSONL."""
    texts, rows = folder / "plain.valid.txt", folder / "rows.valid.jsonl"
    texts.write_text("\n<|endoftext|>\n".join((*DOCUMENTS[:2], "")), encoding="utf-8")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[2:]), encoding="utf-8")
    return [texts, rows]
