"""Seeds of the random streams of a run."""

import hashlib


def seed_of(seed: int, *parts: object, bits: int = 56) -> int:
    """Derive the seed of one random stream from the run's `seed` and `parts`, which name the stream.

    Returns the first `bits` bits (32 or 56), big-endian, of sha256("seed:part:..."). Streams of different names are
    independent, and none of them depends on the order in which they are drawn.
    """
    assert bits in (32, 56)
    digest = hashlib.sha256(":".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[: bits // 8], "big")
