"""Where what was compiled once is kept for the next run."""

import os
from pathlib import Path


def user_cache() -> Path:
    """This user's folder for moejax: in XDG_CACHE_HOME where that is set to an absolute path, else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moejax"
