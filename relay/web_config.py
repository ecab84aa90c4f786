"""Settings of what is answered over plain HTTP: the tables ``[rest]``, ``[metrics]`` and ``[[proxy]]``.

A part of `relay.config`, in a room of its own for its length. Owns these settings with their defaults; must not know
who uses them.
"""

from fnmatch import fnmatchcase

from pydantic import Field, field_validator

from relay.auth_config import Table, check_url


class RestConfig(Table):
    """The REST interface."""

    path: str = Field("/api", description='where it is mounted; "" turns it off')
    api_key: str = Field(
        "",
        repr=False,
        description="asked for from all clients; without one, this machine alone is answered, "
        "and nobody where others are let in",
    )

    @field_validator("path")
    @classmethod
    def _clean_path(cls, path: str) -> str:
        if path and (not path.startswith("/") or not path.rstrip("/")):
            raise ValueError('expected a path like "/api", or "" for none')
        return path.rstrip("/")


class ProxyConfig(Table):
    """A prefix that another process serves."""

    prefix: str = Field(min_length=2, pattern="^/", description="path that is forwarded, with all below it")
    target: str = Field(pattern="^https?://", repr=False, description="where to, for example http://127.0.0.1:8001")
    strip_prefix: bool = Field(True, description="leave the prefix out of the forwarded path")
    requests_max: int = Field(
        500, ge=0, description="requests under way at a time, streams included; further ones get 503; 0: no bound"
    )
    head_timeout_s: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds for the head of an answer, then 504; how long a body takes is free; 0: no bound",
    )

    @field_validator("target")
    @classmethod
    def _names_a_host(cls, target: str) -> str:
        return check_url(target)


class MetricsConfig(Table):
    """What ``/metrics`` tells."""

    topics: tuple[str, ...] = Field(
        (),
        description="patterns of topics whose events are counted by pattern; a topic counts for the first it matches",
    )
    folder: str = Field(
        "", description="where workers leave their figures for each other; `relay serve` makes one by itself"
    )

    key: str = Field(
        "",
        repr=False,
        description="bearer key for /metrics; without one, rest.api_key; this machine needs none",
    )
    public: bool = Field(
        False, description="let /metrics answer everybody without a key, also where other machines are let in"
    )

    def label(self, topic: str) -> str:
        """The pattern that a topic's events are counted under; empty for none."""
        return next((pattern for pattern in self.topics if fnmatchcase(topic, pattern)), "")
