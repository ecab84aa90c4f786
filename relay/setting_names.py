"""Names of settings that resemble a name which is not one: for error messages."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import NamedTuple, get_args

from pydantic import BaseModel


class SettingName(NamedTuple):
    """A setting by the tables it is in, such as ``("limits", "sockets_max")``, or ``("topics", "push")``."""

    path: tuple[str, ...]
    in_list: bool
    """Whether its table is one of a list, which the settings file writes as ``[[topics]]``."""

    def __str__(self) -> str:
        """As a message names it: ``limits.sockets_max``, or ``push in [[topics]]``."""
        *tables, name = self.path
        return f"{name} in [[{'.'.join(tables)}]]" if self.in_list else ".".join(self.path)


def setting_names(model: type[BaseModel], tables: tuple[str, ...] = (), in_list: bool = False) -> Iterator[SettingName]:
    """Yield all settings of a model, and of the tables in it."""
    for name, field in model.model_fields.items():
        path = (*tables, name)
        yield SettingName(path, in_list)
        kinds = (field.annotation, *get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from setting_names(kind, path, kind is not field.annotation and type(None) not in kinds)


def did_you_mean(location: Sequence[int | str], model: type[BaseModel]) -> str | None:
    """Say which setting, or which few, may be meant by an unknown one.

    Args:   location: the keys that lead to it; numbers, which are places in a list, are ignored.
            model: the settings that exist.
    Returns: ``did you mean port?``, or None if no setting resembles it.
    """
    *tables, last = (part.replace("-", "_").lower() for part in location if isinstance(part, str))
    names = list(setting_names(model))
    beside = {name.path[-1]: name for name in names if name.path[:-1] == tuple(tables)}
    anywhere = {"_".join(name.path): name for name in names}
    joined = "_".join((*tables, last))
    if close := get_close_matches(last, beside, n=1, cutoff=0.75):
        return _question([beside[close[0]]])
    if joined not in anywhere and (same := [name for name in names if name.path[-1] == last]):
        return _question(same)
    close = get_close_matches(joined, anywhere, n=1, cutoff=0.8)
    return _question([anywhere[name] for name in close])


def meant_in_list(location: Sequence[int | str], model: type[BaseModel]) -> str | None:
    """Say which setting of a list of tables may be meant by one at the top: ``presence`` is both."""
    names = (name for name in setting_names(model) if name.in_list)
    return _question([name for name in names if list(location) == [name.path[-1]]])


def _question(names: Iterable[SettingName]) -> str | None:
    found = [str(name) for name in names]
    return f"did you mean {' or '.join(found)}?" if 0 < len(found) <= _MOST else None


_MOST = 3
"""With more settings of one name, such as ``key``, naming them is no help."""
