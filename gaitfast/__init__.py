"""gaitfast: pretrains gait-recognition backbones by diffusion, fast.

The package holds the method (data, models, diffusion, engine, retrieval, report); the fused operations
live in `gaitfast.kernels`, whose sources are the top-level folder `kernels/`.
"""

import os
from pathlib import Path

__version__ = "0.1.0"

# In a checkout that was not installed, `gaitfast.kernels` is the folder kernels/ beside this package. An installed
# copy already has it inside (setup.py, package_dir), so the extra path is added in a checkout only.
_root = Path(__file__).resolve().parent.parent
if not (_root / "gaitfast" / "kernels").exists() and (_root / "kernels" / "__init__.py").exists():
    __path__.append(str(_root))

# How long an OpenMP thread of PyTorch spins before it sleeps; read when torch is first imported. The default (3 ms) is
# as fast on idle cores, but when anything else wants one of them every parallel region waits for a descheduled thread:
# measured on two cores beside one busy process, a training step took three to ten times as long as with 0.1 ms.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"
