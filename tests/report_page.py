"""Reading a report's page without a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r'<script type="application/gzip" id="([\w-]+)">([A-Za-z0-9+/=]+)</script>')


def blocks(page: Path) -> dict[str, Any]:
    """The page's data by block, without plotly's code."""
    found = dict(_BLOCK.findall(page.read_text(encoding="utf-8")))
    assert len(gzip.decompress(base64.b64decode(found.pop("library")))) > 1e6
    return {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in found.items()}
