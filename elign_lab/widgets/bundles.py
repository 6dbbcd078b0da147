"""What a widget leaves in an output beside itself, for pages that run no widgets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

PLOTLY = "application/vnd.plotly.v1+json"


def plotly_json(figure: go.Figure) -> dict[str, Any]:
    """A figure in the form that JupyterLab's plotly extension draws."""
    return json.loads(figure.to_json())


def bundle_with(bundle: Any, more: Mapping[str, Any]) -> Any:
    """The mimebundle of a widget (a front end that has widgets shows the widget only) with other forms of it."""
    (bundle[0] if isinstance(bundle, tuple) else bundle).update(more)
    return bundle
