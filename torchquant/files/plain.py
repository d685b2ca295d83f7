"""Values as JSON holds them."""

from __future__ import annotations

import math
from typing import Any


def as_plain(value: Any) -> Any:
    """Dicts and lists as JSON has them: numbers that are not finite are None, keys are text."""
    if isinstance(value, dict):
        return {str(key): as_plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
