"""Imported before torch: threads that wait do not spin, as under `make` and in the tool."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
