"""Signatures of webhooks, and the secrets that they are made with.

Source: Standard Webhooks, specification 1.0.0, *Signature scheme* (https://github.com/standard-webhooks/standard-webhooks).
"""

import base64
import binascii
import hmac
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from relay.config_sections import check_secret

SECRET_MIN_BYTES = 32
"""As long as the hash, which RFC 2104 asks for."""

PREFIX, FILE = "whsec_", "file:"

_FILE_MAX_BYTES = 65_536


def read_secret(text: str) -> bytes:
    """The key that a secret stands for: base64 behind ``whsec_``, else its own bytes; or that in ``file:/path``.

    Raises: ValueError, which does not repeat the secret.
    """
    if text.startswith(FILE):
        path = text.removeprefix(FILE)
        try:
            with Path(path).open("rb") as file:
                text = file.read(_FILE_MAX_BYTES).decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: expected a secret as text in UTF-8") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    _ = check_secret(text)
    if text.startswith(PREFIX):
        try:
            key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"expected base64 behind {PREFIX}") from None
    else:
        key = text.encode()
    if len(key) < SECRET_MIN_BYTES:
        raise ValueError(
            f"expected a secret of {SECRET_MIN_BYTES} bytes at least, got {len(key)}; make one with "
            "`openssl rand -base64 32`, and write whsec_ before it"
        )
    return key


def signature(keys: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: a signature by each key, so that a receiver may know any of them."""
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    made = (base64.b64encode(hmac.digest(key, signed, sha256)).decode() for key in keys)
    return " ".join(f"v1,{each}" for each in made)
