"""Normalizing-flow anomaly detection, reproduced. Names are loaded on first use, so that `import flowrepro` is quick."""

__version__ = "0.1.0"

_HOMES = {
    "data": ["Dataset", "DataError", "Transform", "load", "read"],
    "backbones": ["Backbone", "WeightsError"],
    "features": ["FeatureBank"],
    "flows": ["Flow", "conv_flow", "dense_flow"],
    "bases": ["StandardNormal", "DiagonalNormal", "ClassMixture", "HierarchicalMixture"],
    "altub": ["AltUB"],
    "hgad": [],
    "detectors": ["Detector", "FastFlow", "CFlow", "HGAD"],
    "scores": ["Score"],
    "metrics": ["evaluate", "fpr_threshold"],
    "training": ["Schedule"],
    "diagnostics": [],
    "export": [],
    "runs": ["Run", "configure"],
    "matrix": [],
    "tables": [],
    "reports": [],
    "bench": [],
    "comparisons": [],
    "figures": [],
    "reproduce": [],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    from importlib import import_module

    if name in _HOMES:
        return import_module(f"flowrepro.{name}")
    if name in _HOME_OF:
        return getattr(import_module(f"flowrepro.{_HOME_OF[name]}"), name)
    raise AttributeError(f"flowrepro has no {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_HOMES])
