"""Tiny tokenizers and corpora for tests of what training reads."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from moejax.data.corpus import Corpus
from moejax.data.encoder import DocumentEncoder, Encoded

# A token for every byte from 1, <|endoftext|> being 0, and the two marks of CHATML.
MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def byte_folder(folder: Path, template: str | None = None, bos: str = "<|endoftext|>") -> Path:
    """A tokenizer of single bytes, as a model's folder has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{token: index for index, token in enumerate(alphabet, 1)}}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<|endoftext|>", *MARKS)])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_encoder(folder: Path, template: str | None = None) -> DocumentEncoder:
    return DocumentEncoder.from_folder(byte_folder(folder, template))


def corpus_of(documents: Sequence[Sequence[int]], learned: Sequence[Sequence[bool]] | None = None) -> Corpus:
    """A corpus of these ids; each document counts a byte for each token."""
    masks = [None] * len(documents) if learned is None else [np.array(mask, bool) for mask in learned]
    encoded = [Encoded(np.array(ids, np.int32), mask, len(ids)) for ids, mask in zip(documents, masks, strict=True)]
    return Corpus.of(encoded, vocab_size=1 << 20)
