#!/bin/sh
# Write the lock files from pyproject.toml and tests/js/package.json: every version with its hashes, and no address to
# download from.  LOCK_ARGS=--upgrade takes the newest versions; without it only what pyproject.toml asks for changes.
set -eu
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
.venv/bin/python -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet uv

# --no-config: a developer's own index or settings must not change the result.
lock() {
    "$tmp/venv/bin/uv" --no-config pip compile --quiet --system-certs --universal --python-version 3.11 \
        --generate-hashes --no-header --no-emit-index-url --no-emit-find-links pyproject.toml "$@"
}
lock --all-extras --group dev --output-file requirements-dev.lock ${LOCK_ARGS:-}
# The short one says the same versions: it is the part of the long one that the extra `standard` needs.
cp requirements-dev.lock "$tmp/all"
lock --extra standard --group build --constraint "$tmp/all" --no-annotate --output-file requirements.lock ${LOCK_ARGS:-}

# The oldest versions of what pyproject.toml names, for `make floors`.
lock --resolution lowest-direct --extra standard --extra postgres --group floors --no-annotate --upgrade \
    --output-file requirements-floors.lock

# tangram with the relay, for tools/tangram.sh: the same versions as far as both need a package.
lock tests/tangram/requirements.in --extra standard --group build --constraint "$tmp/all" --no-annotate \
    --output-file tests/tangram/requirements.lock ${LOCK_ARGS:-}

if command -v npm >/dev/null; then
    npm update --prefix tests/js --package-lock-only --ignore-scripts --loglevel=error
    node -e '
        const fs = require("fs"), path = "tests/js/package-lock.json", lock = JSON.parse(fs.readFileSync(path));
        for (const entry of Object.values(lock.packages)) { delete entry.funding; delete entry.resolved }
        fs.writeFileSync(path, JSON.stringify(lock, null, 2) + "\n")'
fi

if grep -nE '://|file:|@ ' requirements.lock requirements-dev.lock requirements-floors.lock tests/tangram/requirements.lock \
    tests/js/package-lock.json; then
    echo "a lock file holds an address or a path" >&2
    exit 1
fi
