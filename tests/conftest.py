"""Settings that every test runs under."""

import os

# Two thread pools that spin while they wait slow each other down many times over on a machine that
# is shared; this must be set before torch loads its own.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
