"""Runs `mesh.redrive` with the broker of this mesh. Run by `scripts/redrive`."""

from __future__ import annotations

import os
import sys

from mesh import redrive
from scripts.local.layout import Layout, mesh_environment

if __name__ == "__main__":
    mesh = Layout.from_environment(os.environ)
    secret = mesh.secrets / "broker"
    if not secret.exists():
        sys.exit("This mesh was never started; scripts/up does that.")
    os.environ.update(mesh_environment(mesh, {}, secret.read_text().strip()))
    sys.exit(redrive.main())
