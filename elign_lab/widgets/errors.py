"""Errors of callbacks: a widget shows them to a reader, and a test of a notebook has to fail on them."""

from __future__ import annotations

import os

VARIABLE = "ELIGN_LAB_RAISE"


def raise_in_tests(error: Exception) -> None:
    """Raise an error that a widget has shown, where the environment variable ELIGN_LAB_RAISE is set and not empty.

    A browser's callback has no caller, so the widgets show what it raises and swallow it. Under nbval it is Python that
    moves the widgets and nobody looks at them: a notebook whose callbacks fail would pass. Refused input is raised too:
    a bug gives a ValueError as well, and a notebook that means to show a refusal catches it.
    """
    if os.environ.get(VARIABLE):
        raise error
