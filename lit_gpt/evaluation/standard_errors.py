"""How sure an evaluation's likelihoods are: the estimator's standard errors, each distinct request once, of all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class StandardErrors:
    """The estimator's standard error of each request, nats; NaN where one draw cannot tell, 0 where nothing is random."""

    def __init__(self) -> None:
        self.by_request: dict[str, float] = {}

    def update(self, errors: Mapping[str, float]) -> None:
        """Take in errors by the requests' keys."""
        self.by_request.update(errors)

    def summary(self) -> dict[str, Any]:
        """Mean and largest, nats, None where nothing was estimated or none can be told; and how many requests there are."""
        known = [error for error in self.by_request.values() if not math.isnan(error)]
        estimated = any(known)
        return {
            "mean": sum(known) / len(known) if estimated else None,
            "largest": max(known) if estimated else None,
            "requests": len(self.by_request),
        }

    def line(self) -> str:
        """The summary in words; without an error where nothing was estimated."""
        summary = self.summary()
        requests = f"{summary['requests']} requests"
        if summary["mean"] is not None:
            return (
                f"the estimator's standard error is {summary['mean']:.4f} nats on average and at most "
                f"{summary['largest']:.4f} over {requests}"
            )
        if any(map(math.isnan, self.by_request.values())):
            return f"one draw cannot tell the estimator's standard error, {requests}"
        return requests
