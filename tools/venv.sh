#!/bin/sh
# Make the virtual environment $1 with a Python that really runs: a name on PATH may be a shim with nothing behind it.
# PYTHON=/path/to/python goes before all others.
set -u
venv=$1

works() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, '"$2"'))' >/dev/null 2>&1; }

# Debian puts the module that makes environments in a package of its own, and then `-m venv` leaves half of one.
make_venv() {
    for limit in 15 99; do # first the versions that are tested: 3.11 to 3.14
        for python in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 \
            /opt/homebrew/bin/python3 /usr/local/bin/python3 /usr/bin/python3; do
            works "$python" "$limit" || continue
            found=$python
            rm -rf "$venv"
            "$python" -m venv "$venv" >/dev/null 2>&1 && return 0
        done
    done
    rm -rf "$venv"
    return 1
}

found=
make_venv && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing python3-venv"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; } >/dev/null 2>&1 || true
    make_venv && exit 0
fi
if [ -z "$found" ]; then
    echo "Python 3.11 or later is needed and none was found: install it, or name one with make PYTHON=/path/to/python" >&2
else
    echo "$found cannot make a virtual environment: on Debian or Ubuntu, run 'apt-get install python3-venv' as root" >&2
fi
exit 1
