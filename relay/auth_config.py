"""Settings of who gets in, the table ``[auth]``: a part of `relay.config`, in a room of its own for its length.

Owns these settings with their units and defaults; must not know who uses them.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, field_validator

from relay.rights import Grant, parse_rights

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Table(BaseModel, extra="forbid", frozen=True):
    """Unknown keys are refused, and nothing changes after the start."""


def check_url(url: str) -> str:
    """Give back an http:// or https:// address that names a host. Raises ValueError, which does not repeat it."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large; not repeated, it may be a part of a password
        named = False
    if not named:
        raise ValueError("expected http[s]://host[:port], with a host, and a port of 1 to 65535")
    return url


class KeyConfig(Table):
    """A key that tokens are signed with."""

    key: str = Field(
        min_length=1,
        repr=False,
        description="a secret; or a public key as PEM, base64 of DER, JWK or OpenSSH; or file:/path",
    )
    kid: str = Field("", description='the key\'s name, where tokens say which key signed them; "" fits every token')


class GrantConfig(Table):
    """Rights on topics."""

    match: str = Field(min_length=1, description="pattern of topics as in [[topics]]; {sub} stands for the user")
    rights: tuple[Literal["join", "push", "presence"], ...] = Field(description="what may be done there")

    @property
    def grant(self) -> Grant:
        """The same, to be asked."""
        return Grant(self.match, parse_rights(self.rights))


class AuthConfig(Table):
    """Who gets in, and what they may do. With nothing set here, whoever can connect may do everything."""

    algorithms: tuple[Literal["HS256", "RS256", "ES256"], ...] = Field(
        ("HS256", "RS256", "ES256"), min_length=1, description="signatures of tokens that are accepted"
    )
    keys: tuple[KeyConfig, ...] = Field((), repr=False, description="keys of tokens; several for rotation")
    jwks_url: str = Field("", repr=False, pattern="^(https?://.*)?$", description="where public keys are (JWKS)")
    jwks_cache_s: Seconds = Field(300.0, description="seconds until they are fetched again")
    jwks_retry_s: Seconds = Field(10.0, description="seconds between two fetches at least, whatever key a token names")
    issuer: str = Field("", description='what tokens must say in "iss"; "" for no matter what')
    audience: tuple[str, ...] = Field((), description='one of these must be in a token\'s "aud"; a list')
    leeway_s: float = Field(10.0, ge=0, allow_inf_nan=False, description="seconds by which clocks may differ")
    require_expiry: bool = Field(True, description="refuse tokens that never expire")
    expiry_grace_s: Seconds = Field(5.0, description="seconds to renew an expired token, then its socket is closed")
    rights_claim: str = Field("topics", min_length=1, description="claim of a token that holds its rights")
    anonymous: tuple[GrantConfig, ...] = Field((), description="rights of sockets without a token")
    authenticated: tuple[GrantConfig, ...] = Field((), description="rights of all others, besides their token's own")
    tangram: bool = Field(False, description="accept and make tangram's tokens, each for one topic: POST /token")
    tangram_ttl_s: Seconds = Field(3600.0, description="seconds for which those made here are good")

    @field_validator("keys", mode="before")
    @classmethod
    def _keys_as_tables(cls, keys: Any) -> Any:
        return (
            [{"key": key} if isinstance(key, str) else key for key in keys] if isinstance(keys, list | tuple) else keys
        )

    @field_validator("jwks_url")
    @classmethod
    def _names_a_host(cls, url: str) -> str:
        return check_url(url) if url else url

    @field_validator("audience", mode="before")
    @classmethod
    def _one_or_several(cls, audience: Any) -> Any:
        return (audience,) if audience and isinstance(audience, str) else audience

    @property
    def has_keys(self) -> bool:
        """Whether tokens can be checked."""
        return bool(self.keys or self.jwks_url)
