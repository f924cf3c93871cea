"""SPIN, self-play fine-tuning of language models (Chen et al., ICML 2024, arXiv 2401.01335).

`spin.play(...)` plays a game and returns a `Result`. It raises `UserError` for errors that a user can fix.
"""

from typing import TYPE_CHECKING, Any

from spin.runtime.errors import UserError

if TYPE_CHECKING:
    from spin.api import Result, play

__all__ = ["Result", "UserError", "play"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `play` and `Result` at first use, because the command line imports only parts of the package."""
    if name in ("play", "Result"):
        from spin import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
