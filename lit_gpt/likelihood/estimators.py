"""The estimators of an MDM's likelihood by name; a new one is a file beside this one and a line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lit_gpt.likelihood.chain_rule import ChainRule
from lit_gpt.likelihood.exact import ExactBound
from lit_gpt.likelihood.monte_carlo import MonteCarlo
from lit_gpt.likelihood.plan import Estimator

_CLASSES: tuple[type[Estimator], ...] = (
    MonteCarlo,
    ChainRule,
    ExactBound,
)
ESTIMATORS = {estimator.name: estimator for estimator in _CLASSES}


def make_estimator(name: str, values: Mapping[str, Any]) -> Estimator:
    """The estimator of a name, with those of some settings that are its parameters.

    Args:
        name: one of `ESTIMATORS`.
        values: settings by name; what no estimator knows is passed over, what is missing has the estimator's default.

    Raises:
        ValueError: an unknown name, or parameters out of range, also those of estimators that were not asked for.
    """
    problems, made = [], {}
    if name not in ESTIMATORS:
        problems.append(f"estimator {name!r} is unknown: choose from {', '.join(ESTIMATORS)}")
    for estimator in ESTIMATORS.values():
        known = {field.name for field in dataclasses.fields(estimator)}
        try:
            made[estimator.name] = estimator(**{key: value for key, value in values.items() if key in known})
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("likelihood: " + "; ".join(problems))
    return made[name]
