"""The secret that all processes of a relay share, the keys made of it, and messages that only they can read.

Owns these; must not know what the messages say. Reading the secret and making keys needs no extra, sealing needs
`auth`.
"""

import hmac
import os
from hashlib import sha256
from pathlib import Path

from relay.config_sections import SECRET_MIN_BYTES, check_secret
from relay.errors import ConfigError

_FILE = "file:"
_FILE_MAX_BYTES = 65_536
_NONCE_BYTES = 12


WORKERS_SECRET = "_RELAY_WORKERS_SECRET"
"""The variable by which ``relay serve`` gives the relay in an application's workers a secret."""


def secret_of(setting: str) -> bytes:
    """The secret of all processes: of the setting, or made for these workers; else empty. Raises ConfigError."""
    text = setting or os.environ.get(WORKERS_SECRET, "")
    return load_secret(text) if text else b""


def load_secret(text: str) -> bytes:
    """Read the setting ``auth.secret``: text, or ``file:`` with a path. Raises ConfigError, which repeats no secret."""
    data = text.strip().encode()
    if text.startswith(_FILE):
        path = text.removeprefix(_FILE)
        try:
            with Path(path).open("rb") as file:
                data = file.read(_FILE_MAX_BYTES).strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"auth.secret: {path}: cannot be read: {reason}") from None
    try:
        _ = check_secret(data.decode(errors="replace"))
    except ValueError as error:
        raise ConfigError(f"auth.secret: {error}") from None
    if len(data) < SECRET_MIN_BYTES:
        text = f"auth.secret: expected {SECRET_MIN_BYTES} bytes at least, got {len(data)}"
        raise ConfigError(f"{text}; `openssl rand -hex 32` makes some")
    return data


def derive(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose."""
    return hmac.digest(secret, f"relay {purpose}".encode(), sha256)


class Sealer:
    """Seals messages, and opens those of others with the same key. AES-256-GCM, with a random nonce for each.

    Args: key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # of the extra `auth`

        self._cipher = AESGCM(key)

    def seal(self, data: bytes, receiver: str) -> bytes:
        """Make of a message what ``receiver`` alone takes."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, receiver.encode())

    def open(self, sealed: bytes, receiver: str) -> bytes | None:
        """Read a message; None where it was sealed with another key, or for another receiver, or was changed."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], receiver.encode())
        except (InvalidTag, ValueError):  # ValueError: a nonce of a few bytes
            return None
