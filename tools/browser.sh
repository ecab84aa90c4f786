#!/bin/sh
# Bring Node, a browser and the packages of tests/js, which the tests of the published phoenix client need.
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
        echo "installing$(printf ' %s' $apt)"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends $apt; } </dev/null >/dev/null 2>&1 ||
            echo "apt-get could not install $apt"
    elif [ "$(uname)" = Darwin ] && have brew; then
        have_node || brew install node </dev/null || echo "brew could not install node"
        have_browser || brew install --cask google-chrome </dev/null || echo "brew could not install google-chrome"
    fi
fi

stamp=tests/js/node_modules/.lock
if have_node && ! cmp -s tests/js/package-lock.json $stamp; then
    # `ci` installs what the lock names and nothing else; the packages need no install script.
    if npm ci --prefix tests/js --ignore-scripts --no-audit --no-fund --loglevel=error </dev/null; then
        cp tests/js/package-lock.json $stamp
    else
        echo "npm could not install the packages of tests/js"
    fi
fi
exit 0
