"""Contextual sparsity that can be trusted: a sparse twin of a model drafts, the model itself corrects, inside stock
`generate`.
"""

import importlib


__version__ = "0.1.0"

# Loaded on first use, so that `import hf_sirius` costs no more than this file.
_EXPORTS = {
    "Calibration": "calibration",
    "GenerationStats": "stats",
    "SiriusConfig": "config",
    "Trace": "tracing",
    "calibrate": "calibration",
    "make_sparse": "assistant",
    "reasoner_path": "reasoner",
    "reasoner_problems": "reasoner",
    "trace": "tracing",
    "tune": "tuning",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_sirius' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_EXPORTS])
