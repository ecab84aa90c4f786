"""Keys and tokens for tests."""

import base64
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

SECRET = "a secret of thirty-two bytes, for tests"
OTHER_SECRET = "another secret of more than thirty-two bytes"


def pem_pair(private: Any) -> tuple[str, str]:
    """Private and public key as PEM."""
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return secret.decode(), public.decode()


RSA_PRIVATE, RSA_PUBLIC = pem_pair(rsa.generate_private_key(65537, 2048))
EC_PRIVATE, EC_PUBLIC = pem_pair(ec.generate_private_key(ec.SECP256R1()))
P384_PRIVATE, P384_PUBLIC = pem_pair(ec.generate_private_key(ec.SECP384R1()))


def token(
    sub: str | None = "alice",
    topics: Any = None,
    *,
    key: str = SECRET,
    algorithm: str = "HS256",
    ttl_s: float | None = 3600,  # made when tests are collected, some are used minutes later
    kid: str | None = None,
    **claims: Any,
) -> str:
    """A token as any maker of tokens makes it."""
    claims |= {"sub": sub} if sub is not None else {}
    claims |= {"topics": topics} if topics is not None else {}
    claims |= {"exp": time.time() + ttl_s} if ttl_s is not None else {}
    return jwt.encode(claims, key, algorithm, {"kid": kid} if kid else None)


def b64(data: bytes) -> str:
    """Base64url without padding, as tokens have it."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unsigned(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    """A token by hand."""
    return ".".join((b64(json.dumps(header).encode()), b64(json.dumps(claims).encode()), b64(signature)))


def jwk(public_pem: str, kid: str | None, **fields: Any) -> dict[str, Any]:
    """A public key as a key set holds it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public = load_pem_public_key(public_pem.encode())
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(public, rsa.RSAPublicKey) else jwt.algorithms.ECAlgorithm
    found: dict[str, Any] = json.loads(algorithm.to_jwk(public))  # type: ignore[arg-type]  # one of the two
    found.pop("key_ops", None)
    return found | ({"kid": kid} if kid else {}) | fields
