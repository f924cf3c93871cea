"""What is printed as a single line in place of a traceback."""

import errno
import re


class UserError(ValueError):
    """Something that a user can put right: the message says what is wrong and what to do, in one line."""


def user_message(error: BaseException) -> str | None:
    """The line for a fault that is not the program's own, None for all others.

    A full disk reaches us as an OSError or, out of Rust code, as a text; a full memory as whatever the allocator raises;
    both, at times, as the cause of a library's own error.
    """
    text = str(error)
    if isinstance(error, UserError):
        return text
    if error.__cause__ is not None and (cause := user_message(error.__cause__)) is not None:
        return cause
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", text)):
        number = int(found[1])
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            "no space left to write to (disk full, or a limit on files): free some or give another store.path, "
            "then run the same command again: it goes on from what is finished."
        )
    if number in (errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR) and isinstance(error, OSError):
        return (
            f"{error.filename}: {(error.strerror or '').lower()}; give another store.path, cache.path or hydra.run.dir."
        )
    if re.search(r"gloo/|NCCL|Dist(Network|Store|Backend)Error|ProcessGroup", f"{type(error).__name__}: {text}"):
        return "another process of this game has ended or can't be reached: what is done is kept, run the same command to go on."
    if number == errno.ENOSYS:
        return "the disk has no file locks (flock): give a store.path, cache.path and hydra.run.dir on one that has."
    if isinstance(error, MemoryError) or re.search(r"can't allocate memory|out of memory", text):
        return (
            "memory is short: set engine.gradient_checkpointing=true, which keeps finished stages, or lower "
            "engine.tokens_per_batch, engine.head_chunk or generation.batch_size, with which all stages are computed again."
        )
    return None


def brief(text: object, limit: int = 200) -> str:
    """`text` (or an error's) on one line of printable characters, cut where it is longer than `limit`."""
    line = " ".join(str(text).split())
    if isinstance(text, KeyError) or (isinstance(text, BaseException) and not line):
        line = f"{type(text).__name__} {line}".strip()  # the bare key says nothing
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"
