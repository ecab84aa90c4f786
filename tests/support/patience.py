"""How long a test waits for what does come when all is well; nothing waits this long then."""

import os

PATIENCE = float(os.environ.get("TESTS_PATIENCE", "1"))
"""By which every such time is multiplied: a slow machine is no failure. The scripts in ``tests/js`` do the same."""
