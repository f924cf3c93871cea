"""Seeds of independent random streams."""

import hashlib


def seed_of(seed: int, *parts: object, bits: int = 56) -> int:
    """A seed for the random stream that `parts` name: the first `bits` bits of a SHA-256 of "seed:part:part"."""
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[: bits // 8], "big")
