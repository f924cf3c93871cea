"""Seeds of the random streams of a run."""

import hashlib


def seed_of(seed: int, *parts: object, bits: int = 56) -> int:
    """Return the seed of the random stream named by `parts`, derived from the run's `seed`.

    It is the first `bits` bits (32 or 56), big-endian, of sha256("seed:part:..."). Streams with different names are
    independent and do not depend on the order of use.
    """
    assert bits in (32, 56)
    digest = hashlib.sha256(":".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[: bits // 8], "big")
