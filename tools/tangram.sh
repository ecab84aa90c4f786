#!/bin/sh
# Make an environment with tangram and the relay, in build/tangram: its own page and plugins are tested on the relay.
# Never fails: without it the tests of tangram fail, and say what is missing.
set -u
cd "$(dirname "$0")/.."
venv=build/tangram
lock=tests/tangram/requirements.lock
made=$venv/.made

[ -e "$made" ] && [ "$(cat "$made")" = "$PWD" ] && [ ! "$lock" -nt "$made" ] && [ ! pyproject.toml -nt "$made" ] && exit 0
echo "installing tangram in $venv: 175 MB, a minute"
tools/venv.sh "$venv" || exit 0
# Wheels alone: they hold the page as it was built, and a build would need Rust and Node.
if "$venv/bin/python" -m pip install --quiet --require-hashes --only-binary tangram_core,tangram_jet1090 -r "$lock" &&
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .; then
    printf '%s\n' "$PWD" > "$made"
else
    echo "tangram could not be installed for $("$venv/bin/python" --version) on $(uname -sm): the tests of tangram will fail"
    echo "it has wheels for Python 3.11 to 3.14: name one with make PYTHON=/path/to/python, or see what pip says above"
fi
exit 0
