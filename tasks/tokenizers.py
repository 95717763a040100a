"""Text to token ids."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from tasks.cache import cached, digest
from tasks.sources import ask_hub, locate
from training.errors import UsageError, nearest


class Bytes:
    """UTF-8 bytes; 256 is the mask token of masked language modelling."""

    vocab_size = 256
    mask_token = 256
    identity = "bytes"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, uint8."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return bytes(ids).decode(errors="replace")


class Subwords:
    """A tokenizer of the `tokenizers` library, from its `tokenizer.json`.

    The mask token is the tokenizer's own, or one id past its vocabulary.
    """

    def __init__(self, serialized: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(serialized)
        # Some were saved to cut and pad sentences, which would lose text here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())  # ids may have gaps
        known = (self._tokenizer.token_to_id(name) for name in ("[MASK]", "<mask>"))
        self.mask_token = next((i for i in known if i is not None), self.vocab_size)
        self.identity = digest([serialized])

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text."""
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        kind = smallest_dtype(self.vocab_size + 1)
        return [np.array(one.ids, dtype=kind) for one in encoded]

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def build(kind: str, vocab_size: int, texts: Iterable[str], content: str) -> Bytes | Subwords:
    """A tokenizer by name.

    Args:
        kind: `"bytes"`; `"bpe"`, byte-level byte-pair encoding trained on `texts` and cached; or
            the path of a `tokenizer.json`, of a folder with one, or a hub id.
        vocab_size: of `"bpe"`.
        texts: the training text.
        content: a hash of it.

    Raises:
        UsageError: for a vocabulary smaller than the bytes, or a tokenizer that is not there.
    """
    if kind == "bytes":
        return Bytes()
    if kind == "bpe":
        return Subwords(_trained(vocab_size, texts, content))
    serialized = _existing(kind)
    try:
        return Subwords(serialized)
    except Exception as error:  # the library raises no other kind
        raise UsageError(f"task.tokenizer: '{kind}' is no tokenizer: {error}") from error


def smallest_dtype(size: int) -> type[np.unsignedinteger]:
    """The narrowest unsigned type for ids below `size`."""
    bits = math.ceil(math.log2(max(size, 2)))
    return np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32


def _trained(vocab_size: int, texts: Iterable[str], content: str) -> str:
    if vocab_size < 257:
        raise UsageError(
            f"task.vocab_size: byte-level BPE needs at least 257 tokens, got {vocab_size}"
        )

    def train(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_pieces(texts), trainer)
        tokenizer.save(str(folder / "tokenizer.json"))

    key = digest(["bpe-1", str(vocab_size), content])
    return (cached("tokenizers", key, train) / "tokenizer.json").read_text()


def _existing(path: str) -> str:
    local = locate(path)
    file = local / "tokenizer.json" if local and local.is_dir() else local
    if file and file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    if local is None:
        ask_hub(f"task.tokenizer: no '{path}': no local path", nearest(path, ("bytes", "bpe")))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(local or path).backend_tokenizer.to_str()
    except Exception as error:  # the hub's client raises many kinds
        reason = " ".join(str(error).split())[:200]
        hint = nearest(path, ("bytes", "bpe"))
        raise UsageError(f"task.tokenizer: cannot load '{path}': {reason}{hint}") from error


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    # The trainer holds each text's words at once; long files in pieces keep that small.
    for text in texts:
        for start in range(0, len(text), 100_000):
            yield text[start : start + 100_000]
