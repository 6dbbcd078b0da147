"""The theory of the Elign paper as code: both sides of each statement, their error, and a broken variant.

Modules: tilt (theorem 1), error_bound (theorem 2, lemma 1), points (theorem 1 with the package's FED-GRPO), conformers
(a torsion of a real molecule), shaping (PBRS), force (theorem 5), alchemical (F.1), symmetry, score (section 2);
figures draws what the notebooks show.
"""

from elign_lab.theory.check import Check, Statement
from elign_lab.theory.registry import STATEMENTS, statement

__all__ = ["STATEMENTS", "Check", "Statement", "statement"]
