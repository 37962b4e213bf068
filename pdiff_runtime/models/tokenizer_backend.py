"""The tokenizers library, whose objects carry state and whose failures are of many types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import tokenizers


@contextlib.contextmanager
def library_errors(title: str) -> Iterator[None]:
    """Turn whatever the library raises into a ValueError.

    It raises bare ``Exception``, and its panics are ``BaseException``.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{title}: {error}") from error


def private_backends(
    backend: tokenizers.Tokenizer, special: Iterable[str]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Two copies that no caller changes: one finds special tokens, the other takes them as text.

    Neither pads or truncates: Hugging Face tokenizers leave in their backend, and in the file that
    they save, how the last batch was padded and cut.

    Args:
        backend: Copied, and left as it is.
        special: Added tokens that are special whether or not the backend says so.

    Raises:
        ValueError: The library cannot copy it.
    """
    with library_errors("tokenizer"):
        description = backend.to_str()
        finding, plain = (tokenizers.Tokenizer.from_str(description) for _ in range(2))
        added = backend.get_added_tokens_decoder().values()
        missed = sorted({t.content for t in added if not t.special} & set(special))
        for copy in (finding, plain):
            copy.no_padding()
            copy.no_truncation()
            copy.add_special_tokens(missed)
        finding.encode_special_tokens = False
        plain.encode_special_tokens = True
    return finding, plain
