"""Import this before torch: waiting threads then sleep instead of spinning, as in the tool."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
