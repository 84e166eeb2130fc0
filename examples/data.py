"""Training and validation text as tokens in a fixed order, split by file.

The text is the caller's, or by default the library of the running Python: sources with their
docstrings, pydoc's topics, and the .txt and .rst files beside them. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from orthonorm.examples.config import Config, UsageError
from torch import Tensor

TEXT_SUFFIXES = (".py", ".txt", ".rst")
# Folders left out: tests, installed packages, tables of code points, build products.
SKIPPED_FOLDERS = frozenset(
    (
        "test", "tests", "idle_test", "Icons", "turtledemo", "encodings", "lib-dynload",
        "site-packages", "dist-packages", "_bundled", "__pycache__",
    )
)  # fmt: skip
VALIDATION_SHARE = 16  # one file in 16 is validation text


@dataclass(frozen=True)
class Corpus:
    """Tokens of the training and validation text (1-D, uint8 or int32), and their source."""

    train: Tensor
    val: Tensor
    source: str


def load_corpus(config: Config) -> Corpus:
    """Read, split and encode the text that `config` names; raise UsageError if it is unusable."""
    files, source = _read_files(config.data, config.corpus_bytes)
    train, val = _split(files)
    total = sum(len(text) for _, text in files)
    source = f"{source}: {len(files)} files, {total / 1e6:.1f} MB"
    if config.vocab == 256:
        corpus = Corpus(_as_bytes(train), _as_bytes(val), source)
    else:
        corpus = _byte_pairs(train, val, config.vocab, source)
    for name, tokens in (("training", corpus.train), ("validation", corpus.val)):
        if len(tokens) <= config.context:
            raise UsageError(
                f"the {name} text ({source}) must be longer than --context {config.context}, "
                f"got {len(tokens)} tokens"
            )
    return corpus


def _read_files(data: str, limit: int) -> tuple[list[tuple[str, bytes]], str]:
    """Return (name, contents) of the files, up to `limit` bytes (0: all), and a label of the text.

    The order depends on names only.
    """
    root = Path(data) if data else Path(sysconfig.get_paths()["stdlib"])
    if not root.exists():
        raise UsageError(f"--data must name a file or folder that exists, got {data}")
    paths = [root] if root.is_file() else sorted(_walk(root, library=not data))
    names = {path: path.relative_to(root).as_posix() for path in paths}
    if not data:  # by digest, so that a capped corpus is a fair sample of the library
        paths.sort(key=lambda path: _digest(names[path]))
    files: list[tuple[str, bytes]] = []
    unreadable = 0
    left = limit or None
    for path in paths:
        try:
            with path.open("rb") as file:
                text = file.read(-1 if left is None else left)
        except OSError as error:
            unreadable += 1
            if len(paths) == 1:
                raise UsageError(f"--data must be readable, got {data}: {error}") from None
            continue
        if text:
            files.append((names[path], text))
        if left is not None:
            left -= len(text)
            if left <= 0:
                break
    if not files:
        found = "nothing to read" if not unreadable else f"{unreadable} unreadable files"
        raise UsageError(f"the text in {root} must not be empty, got {found}; name one by --data")
    return files, data or f"Python {sys.version_info[0]}.{sys.version_info[1]} library"


def _walk(root: Path, library: bool) -> Iterator[Path]:
    """Yield the files below `root`; of the library only text, without SKIPPED_FOLDERS."""
    skipped = SKIPPED_FOLDERS if library else frozenset()
    for folder, folders, names in os.walk(root):
        folders[:] = [n for n in folders if n not in skipped and not n.startswith((".", "config-"))]
        for name in names:
            path = Path(folder, name)
            if (path.suffix in TEXT_SUFFIXES or not library) and path.is_file():
                yield path


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _split(files: list[tuple[str, bytes]]) -> tuple[list[bytes], list[bytes]]:
    """Return (training texts, validation texts): whole files, chosen by the digest of their name.

    If there is only one file, its last tenth is the validation text.
    """
    if len(files) == 1:
        text = files[0][1]
        cut = len(text) - len(text) // 10
        return [text[:cut]], [text[cut:]]
    chosen = {name for name, _ in files if _digest(name)[-1] % VALIDATION_SHARE == 0}
    if not chosen or len(chosen) == len(files):
        chosen = {min((name for name, _ in files), key=_digest)}
    train = [text for name, text in files if name not in chosen]
    return train, [text for name, text in files if name in chosen]


def _as_bytes(texts: list[bytes]) -> Tensor:
    text = bytearray(b"\n".join(texts))
    return torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _byte_pairs(train: list[bytes], val: list[bytes], vocab: int, source: str) -> Corpus:
    """Encode texts by a byte-level byte-pair encoding of at most `vocab` tokens.

    It is trained on `train`.
    """
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise UsageError(
            f"--vocab {vocab} needs the package tokenizers (pip install tokenizers); "
            "--vocab 256 reads bytes and needs nothing"
        ) from None
    texts = [[text.decode("utf-8", "replace") for text in part] for part in (train, val)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[0], vocab_size=vocab, show_progress=False)

    def encode(part: list[str]) -> Tensor:
        ids = [torch.tensor(piece.ids, dtype=torch.int32) for piece in tokenizer.encode_batch(part)]
        return torch.cat(ids)

    return Corpus(encode(texts[0]), encode(texts[1]), f"{source}, {vocab} byte pairs")


class TrainBatches:
    """Batches of the training text by number; batch i depends on the seed and i only.

    The text is cut into windows of context + 1 tokens; the last token of a window is the first of
    the next. Each pass over the text starts at another offset and takes windows in another order.
    """

    def __init__(self, tokens: Tensor, config: Config) -> None:
        self.tokens, self.context, self.batch = tokens, config.context, config.batch
        self.seed = config.seed
        self.windows = max(1, len(tokens) // self.context - 1)
        self._pass = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, index: int) -> Tensor:
        """Return batch `index`, int64 (batch, context + 1)."""
        first = index * self.batch
        return torch.stack([self._window(first + i) for i in range(self.batch)]).long()

    def _window(self, number: int) -> Tensor:
        which_pass, position = divmod(number, self.windows)
        if which_pass != self._pass:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + which_pass)
            spare = min(self.context, len(self.tokens) - self.windows * self.context)
            offset = int(torch.randint(spare, (1,), generator=generator))
            order = torch.randperm(self.windows, generator=generator)
            self._starts, self._pass = offset + order * self.context, which_pass
        start = int(self._starts[position])
        return self.tokens[start : start + self.context + 1]


def validation_windows(tokens: Tensor, config: Config) -> Tensor:
    """Return the validation windows, int64 (windows, context + 1), evenly spread over the text."""
    count = min(config.eval_windows, max(1, (len(tokens) - 1) // config.context))
    last = len(tokens) - config.context - 1
    starts = [i * last // max(1, count - 1) for i in range(count)]
    return torch.stack([tokens[s : s + config.context + 1] for s in starts]).long()
