"""Contextual sparsity that can be trusted: a sparse twin of a model drafts, the model itself corrects, inside stock
`generate`.
"""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Loaded on first use, so that `import hf_sirius` costs no more than this file.
_EXPORTS = {
    "Calibration": "settings.calibration",
    "GenerationStats": "decode.stats",
    "SiriusConfig": "settings.config",
    "SparseTwin": "decode.sparse_twin",
    "Trace": "study.tracing",
    "calibrate": "sparsity.calibrate",
    "make_sparse": "decode.attach",
    "reasoner_path": "reasoner",
    "reasoner_problems": "reasoner",
    "smollm2_path": "smollm2",
    "trace": "study.tracing",
    "tune": "study.tuning",
}

if TYPE_CHECKING:  # for editors and type checkers
    from .decode.attach import make_sparse as make_sparse
    from .decode.sparse_twin import SparseTwin as SparseTwin
    from .decode.stats import GenerationStats as GenerationStats
    from .reasoner import reasoner_path as reasoner_path
    from .reasoner import reasoner_problems as reasoner_problems
    from .settings.calibration import Calibration as Calibration
    from .settings.config import SiriusConfig as SiriusConfig
    from .smollm2 import smollm2_path as smollm2_path
    from .sparsity.calibrate import calibrate as calibrate
    from .study.tracing import Trace as Trace
    from .study.tracing import trace as trace
    from .study.tuning import tune as tune

__all__ = ["__version__", *_EXPORTS]


def _load(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_sirius' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # to which it would make any name a good one
    __getattr__ = _load


def __dir__():
    return sorted([*globals(), *_EXPORTS])
