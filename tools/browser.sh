#!/bin/sh
# Bring Node, a browser and the npm packages that tests need: the published phoenix clients, and an example's.
# Where something is missing and may be installed, it is: by apt-get as root, by brew on macOS.
# Never fails: a test that lacks something skips, and its one line says what.
set -u
cd "$(dirname "$0")/.."

have() { command -v "$1" >/dev/null 2>&1; }
have_node() { have npm && node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' >/dev/null 2>&1; }
have_browser() {
    [ -n "${CHROMIUM:-}" ] || have chromium || have chromium-browser || have google-chrome ||
        [ -e "/Applications/Google Chrome.app" ] || [ -e /Applications/Chromium.app ]
}

apt=
have_node || apt="nodejs npm"
have_browser || apt="$apt chromium fonts-liberation" # without a font a browser draws boxes, also in the screenshot
if [ -n "$apt" ]; then
    if [ "$(id -u)" = 0 ] && have apt-get; then
        echo "installing$(printf ' %s' $apt) with apt-get (up to 600 MB)"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends $apt; } </dev/null >/dev/null 2>&1 ||
            echo "apt-get could not install $apt"
    elif [ "$(uname)" = Darwin ] && have brew; then
        have_node || brew install node </dev/null || echo "brew could not install node"
        have_browser || brew install --cask google-chrome </dev/null || echo "brew could not install google-chrome"
    fi
fi

# `ci` installs what the lock names and nothing else; the packages need no install script.
packages() {
    have_node && ! cmp -s "$1/package-lock.json" "$1/node_modules/.lock" || return 0
    echo "installing the npm packages of $1"
    if npm ci --prefix "$1" --ignore-scripts --no-audit --no-fund --loglevel=error </dev/null; then
        cp "$1/package-lock.json" "$1/node_modules/.lock"
    else
        echo "npm could not install the packages of $1"
    fi
}
packages tests/js
packages examples/node-plugin
exit 0
