"""Variables that look like the relay's settings but are not: those of services, which Kubernetes and Docker set.

Owns their forms; must not know the settings.
"""

import logging
import os
import re
from collections.abc import Mapping

_logger = logging.getLogger("relay")

ENV_PREFIX = "RELAY_"
"""What the variables of settings begin with."""

# Kubernetes tells every container of each service in its namespace, and Docker of each linked container, by variables
# that begin with its name. Those of one named `relay`, or `relay-…`, look like settings: name, value, and whether these
# two alone prove a service, or stand beside what does.
# Sources: kubernetes.io/docs/concepts/services-networking/service/#environment-variables and
# docs.docker.com/engine/network/links/#environment-variables.
_IP = r"[\d.]+|[\da-f:.]*:[\da-f:.]*"
_LINK_URL = r"(tcp|udp|sctp)://\S+:\d+"
_LINK_PORT = r"(.+)_PORT_\d+_(TCP|UDP|SCTP)"
_LINKS = tuple(
    (re.compile(name), re.compile(value, re.IGNORECASE), is_proof)
    for name, value, is_proof in (
        (r"(.+)_SERVICE_HOST", _IP, True),
        (r"(.+)_PORT", _LINK_URL, True),
        (rf"{_LINK_PORT}(_START|_END)?", _LINK_URL, True),
        (rf"{_LINK_PORT}_PROTO", "tcp|udp|sctp", True),
        (rf"{_LINK_PORT}_ADDR", _IP, True),
        (rf"{_LINK_PORT}_PORT(_START|_END)?", r"\d+", True),
        (r"(.+)_SERVICE_PORT(_.+)?", r"\d+", False),
        (r"(.+)_NAME", r"/.+", False),
        (r"(.+)_ENV_.+", r"(?s).*", False),
    )
)


def service_links(environ: Mapping[str, str]) -> list[str]:
    """Names of the ``RELAY_…`` variables that Kubernetes or Docker has set for a service named ``relay``, ``relay-…``.

    They are recognized by form: by the value (``RELAY_PORT=tcp://10.0.0.1:80``), or, where that says little
    (``RELAY_SERVICE_PORT=80``), by a variable of the same service beside them.
    """
    found = [
        (name, match[1], is_proof)
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX)
        for names, values, is_proof in _LINKS
        if (match := names.fullmatch(name)) and values.fullmatch(value)
    ]
    services = {service for _, service, is_proof in found if is_proof}
    return sorted({name for name, service, is_proof in found if is_proof or service in services})


def log_service_links() -> None:
    """Log, once, which variables are ignored as `service_links`."""
    if ignored := service_links(os.environ):
        _logger.info("variables of a Kubernetes service or container link ignored: %s", ", ".join(ignored))
