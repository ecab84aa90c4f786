"""The table ``[[webhooks]]`` of `relay.config.Config`, with its keys, units and defaults.

Must not know who uses it. ``config/relay.toml`` shows it.
"""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from relay.config_sections import OrOff, Positive, Seconds, Table, check_url
from relay.proxy_headers import is_this_machine


class WebhookConfig(Table):
    """A program that decides on joins and pushes, over HTTP."""

    match: str = Field(min_length=1, description="topic pattern as in [[topics]]")
    on: tuple[Literal["join", "push", "leave"], ...] = Field(
        min_length=1, description='what is sent to the program: "join", "push", "leave"'
    )
    url: str = Field(
        repr=False, description="URL that requests are sent to; https://, or http:// for a program on the same machine"
    )
    secrets: tuple[str, ...] = Field(
        min_length=1,
        repr=False,
        description="secrets that requests are signed with, of 32 bytes at least: whsec_<base64>, text, or file:/path; "
        "several for rotation",
    )
    events: tuple[str, ...] = Field(("*",), min_length=1, description="patterns of the pushes that are sent")
    name: str = Field("", description="name in metrics and log lines; by default that of `match`")
    on_failure: Literal["refuse", "allow"] = Field(
        "refuse", description='without an answer: "refuse" the join or push, or "allow" it'
    )
    send_claims: bool = Field(False, description="send the claims of the client's token")
    insecure: bool = Field(False, description="permit http:// to other machines")
    timeout_s: Seconds = Field(3.0, description="seconds for a request, its waiting included")
    requests_max: Positive = Field(64, description="requests in progress at a time; further ones wait")
    queue_max: OrOff = Field(256, description="requests that may wait; further ones are not sent; 0: none")

    @field_validator("secrets", mode="before")
    @classmethod
    def _one_or_several(cls, secrets: Any) -> Any:
        return (secrets,) if secrets and isinstance(secrets, str) else secrets

    @field_validator("url")
    @classmethod
    def _names_a_host(cls, url: str) -> str:
        if not url.startswith(("https://", "http://")):
            raise ValueError("expected https://host[:port]/path")
        return check_url(url)

    @model_validator(mode="after")
    def _is_secure(self) -> "WebhookConfig":
        parts = urlsplit(self.url)
        if parts.scheme == "http" and not self.insecure and not is_this_machine(parts.hostname or ""):
            raise ValueError(
                "url: expected https://, since http:// lets others read and forge what is decided; "
                "or set insecure = true"
            )
        if "events" in self.model_fields_set and "push" not in self.on:
            raise ValueError('events is for on = ["push"]')
        return self

    @property
    def label(self) -> str:
        """What it is counted under."""
        return self.name or self.match
