"""Settings files without their secrets, so that they can be shown.

Secret is what the settings do not show of themselves (``repr=False`` in `relay.config`): keys, and the credentials in
addresses. The text keeps its form; a placeholder names what to fill in.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from relay.config import Config

# Left to right: a comment's quotes begin no string, and a string's # begins no comment.
_PIECES = re.compile(
    r'(?P<string>"""(?:[^\\]|\\.)*?"""(?:"{1,2}(?!"))?'
    r"|'''.*?'''(?:'{1,2}(?!'))?"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*')"
    r"|(?P<comment>\#[^\n]*)",
    re.DOTALL,
)
# What may be a secret in a comment: what a secret setting is set to, credentials, a quoted word, a line of a key.
_IN_COMMENT = re.compile(
    r"(?P<setting>\b(?:\w*key|keys|\w*url|target|secrets?)\b[\"']?\s*=).*"
    r"|(?<=://)[^\s\"']*@"
    r"|(?<=[\"'])[^\s\"']{8,}(?=[\"'])"
    r"|[A-Za-z0-9+/=_-]{32,}"
)
_FILE = "file:"


def mask_secrets(text: str) -> str:
    """Replace the secrets in a valid TOML file of settings by placeholders such as ``<rest.api_key>``.

    In a comment, what follows the name of a secret setting is left out.
    """
    masks = dict(_masks(Config, tomllib.loads(text)))

    def mask(found: re.Match[str]) -> str:
        if found["string"]:
            value = tomllib.loads(f"value = {found['string']}")["value"]
            masked = masks.get(value, value)
            return found["string"] if masked == value else json.dumps(masked, ensure_ascii=False)
        return _IN_COMMENT.sub(lambda secret: f"{secret['setting']} …" if secret["setting"] else "…", found["comment"])

    return _PIECES.sub(mask, text)


def _masks(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each secret in a table of settings, and what to show in its place."""
    for name, field in model.model_fields.items():
        found = values.get(name)
        table = next((each for each in (field.annotation, *get_args(field.annotation)) if _is_table(each)), None)
        for each in found if isinstance(found, list) else [found]:
            if isinstance(each, dict) and table is not None:
                yield from _masks(table, each, f"{prefix}{name}.")
            elif isinstance(each, str) and not field.repr:
                yield each, _mask(f"{prefix}{name}", each)


def masked_settings(model: BaseModel, at: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    """Each setting, by its place such as ``("topics", 0, "match")``, and its value without secrets, as JSON has it."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        place = (*at, name)
        if isinstance(value, BaseModel):
            yield from masked_settings(value, place)
        elif isinstance(value, tuple) and value and all(isinstance(each, BaseModel) for each in value):
            for number, each in enumerate(value):
                yield from masked_settings(each, (*place, number))
        else:
            shown = to_jsonable_python(value)
            key = ".".join(part for part in place if isinstance(part, str))
            yield place, shown if field.repr or not isinstance(shown, str) else _mask(key, shown)


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _mask(name: str, value: str) -> str:
    """Mask a key as a whole, an address where it holds credentials; the name of a file stays."""
    placeholder = f"<{name}>"
    if not value or (name.startswith(("auth.keys", "auth.secret", "webhooks.secrets")) and value.startswith(_FILE)):
        return value
    if not name.endswith(("url", "target")):
        return placeholder
    if "://" not in value:
        return value
    scheme, _, rest = value.partition("://")
    _, at, rest = rest.rpartition("@")  # a password may hold anything
    place, mark, query = rest.partition("?")
    options = [part.partition("=") for part in query.split("&")]
    shown = "&".join(
        f"{option}{equals}{placeholder if _is_secret(name, option) else given}" for option, equals, given in options
    )
    return f"{scheme}://{placeholder + at if at else ''}{place}{mark}{shown if mark else ''}"


def _is_secret(name: str, option: str) -> bool:
    """Whether an option in the query of an address is: of Redis's, users and passwords are."""
    return name != "redis_url" or "user" in option or "pass" in option
