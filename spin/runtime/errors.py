"""Report errors that a user can fix in one line instead of a traceback.

Machine errors (full disk, out of memory, a lost process) can be raised anywhere; `user_message` recognises them. Errors
about a user's file or setting are raised by a known call, which is wrapped in `with explaining("model.path=..."):`.
"""

import contextlib
import errno
import re
from collections.abc import Iterator


class UserError(ValueError):
    """An error that a user can fix. The message is one line: what is wrong and what to do."""


# Messages of gloo, NCCL and torch's key-value store about a peer that closed its connection or does not respond. Matching
# "NCCL" alone would also match messages about memory and versions, and users' paths.
LOST_PEER = {
    "RuntimeError": r"gloo/transport/\S+:\d+\] .*(closed by peer|reset by peer|broken pipe|refused|timed out|timeout)",
    "DistBackendError": r"ncclRemoteError|closed by remote peer|operation timeout|failed or timed out|was aborted",
    "DistNetworkError": r"connection was likely closed|reset by peer|broken pipe|failed to connect|timed out|timeout",
    "DistStoreError": r"wait timeout|timed out",
}
OUT_OF_MEMORY = r"can't allocate memory|cannot allocate memory|out of memory"
PATH_ERRORS = (errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
DISK_ERRORS = (errno.EIO, errno.ESTALE, errno.EXDEV, errno.ENODEV, errno.EBUSY)
TRY_AGAIN = "then run the same command again: it continues from what is finished."


def user_message(error: BaseException) -> str | None:
    """Return the line to print for a `UserError` or a machine error; None for any other error.

    The error's cause is examined too, since libraries wrap errors. Errors from Rust code have the system's error number in
    their text.
    """
    text = str(error)
    if isinstance(error, UserError):
        return text
    if error.__cause__ is not None and (message := user_message(error.__cause__)) is not None:
        return message
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"\(os error (\d+)\)", text)):
        number = int(match[1])
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left to write to (disk full, or a limit on files): free some or set another store.path, {TRY_AGAIN}"
    if isinstance(error, OSError) and error.filename and number in PATH_ERRORS:
        return f"{error.filename}: {str(error.strerror).lower()}; set another store.path, cache.path or hydra.run.dir."
    if number in DISK_ERRORS or (isinstance(error, OSError) and text == "error closing file"):  # the text is Arrow's
        reason = brief(text.partition("] ")[2] or text)
        return f"disk error ({reason}): repair the disk, or set another store.path, cache.path or hydra.run.dir, {TRY_AGAIN}"
    if number in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
        return "the disk has no file locks (flock): set store.path, cache.path and hydra.run.dir to one that has."
    is_runtime_error = isinstance(error, RuntimeError)
    if is_runtime_error and "home directory" in text:
        return (
            "there is no home directory for a path with ~: set HOME, or give full paths, such as cache.path=/tmp/spin."
        )
    if isinstance(error, MemoryError) or (is_runtime_error and re.search(OUT_OF_MEMORY, text, re.IGNORECASE)):
        return (
            "out of memory: set engine.gradient_checkpointing=true, which keeps finished stages, or lower "
            "engine.tokens_per_batch, engine.head_chunk or generation.batch_size, with which all stages are computed again."
        )
    pattern = LOST_PEER.get(type(error).__name__)
    if pattern and re.search(pattern, text, re.IGNORECASE | re.DOTALL):
        return "another process of this game has ended or can't be reached: run the same command to continue."
    return None


@contextlib.contextmanager
def explaining(
    problem: str, advice: str = "", catch: type[BaseException] | tuple[type[BaseException], ...] = Exception
) -> Iterator[None]:
    """Convert an error raised inside, of a type in `catch`, to UserError "<problem> (<the error's message>); <advice>.".

    Errors that `user_message` recognises pass unchanged: a full disk is not a broken file.
    """
    try:
        yield
    except catch as error:
        if user_message(error) is not None:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{problem} ({brief(reason, 300)}){advice and '; '}{advice}.") from error


def brief(text: object, limit: int = 200) -> str:
    """Return `text`, or an error's message, as one line of at most `limit` printable characters."""
    line = " ".join(str(text).split())
    if isinstance(text, KeyError) or (isinstance(text, BaseException) and not line):
        line = f"{type(text).__name__} {line}".strip()  # a bare key or an empty message is not informative
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"
