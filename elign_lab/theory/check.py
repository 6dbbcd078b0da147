"""Both sides of a statement, its error, and its margin: what every function of elign_lab.theory returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

HOLDS_WITHIN = 3.0
FAILS_BEYOND = 5.0


@dataclass(frozen=True)
class Check:
    """Two sides of an equality ("=") or of an inequality left <= right ("<=").

    standard_error: of left - right, by Monte Carlo; where both sides are deterministic, the tolerance of the
    quadrature, of the optimiser or of the arithmetic.
    """

    left: float
    right: float
    standard_error: float
    relation: Literal["=", "<="] = "="

    def __post_init__(self) -> None:
        if not self.standard_error > 0:
            raise ValueError(f"the standard error must be positive, got {self.standard_error}")

    @property
    def margin(self) -> float:
        """(left - right) / standard_error. For an inequality a negative margin is slack."""
        return (self.left - self.right) / self.standard_error

    @property
    def violation(self) -> float:
        """By how many standard errors the statement is violated: |margin|, or for an inequality margin or 0."""
        return abs(self.margin) if self.relation == "=" else max(self.margin, 0.0)

    @property
    def holds(self) -> bool:
        """Within 3 standard errors (NaN does not hold)."""
        return self.violation <= HOLDS_WITHIN

    @property
    def fails(self) -> bool:
        """Violated by more than 5 standard errors."""
        return self.violation > FAILS_BEYOND

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "fails" if self.fails else "undecided"
        return (
            f"{verdict}: {self.left:.4g} {self.relation} {self.right:.4g}, standard error {self.standard_error:.1g}, "
            f"margin {self.margin:+.1f}"
        )


@dataclass(frozen=True)
class Statement:
    """A statement of the theory with the code that checks it.

    check and broken take no arguments (their defaults are the tested case); `broken` computes the same comparison with
    the mistake that `mistake` names, and must fail. notebook and cell: file and cell tag where a reader meets it.
    """

    name: str
    text: str
    source: str
    check: Callable[[], Check]
    broken: Callable[[], Check]
    mistake: str
    notebook: str
    cell: str

    def report(self) -> str:
        """The statement, its check and its broken variant as text, rounded."""
        lines = [self.text]
        for label, check in ((self.name, self.check()), (f"broken: {self.mistake}", self.broken())):
            verdict = "holds" if check.holds else "fails" if check.fails else "undecided"
            left, right = (round(side, 2) + 0.0 for side in (check.left, check.right))  # + 0.0: no "-0.00"
            lines.append(f"  {verdict}  {left:.2f} {check.relation} {right:.2f}  ({label})")
        return "\n".join(lines)


def mean_check(samples: np.ndarray, expected: float) -> Check:
    """Compare the mean of independent samples (n,) with its expected value; the error is that of the mean."""
    samples = np.asarray(samples, dtype=float)
    if samples.ndim != 1 or len(samples) < 2:
        raise ValueError(f"expected at least two samples in one dimension, got shape {samples.shape}")
    return Check(float(samples.mean()), expected, float(samples.std(ddof=1)) / len(samples) ** 0.5)
