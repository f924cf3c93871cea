"""Seeds of random streams."""

import subprocess

import pytest

from spin.runtime.random import seed_of


@pytest.mark.parametrize("bits", [32, 56])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [((0, 3), "0:3"), ((7, "an-id", -1), "7:an-id:-1"), ((1, "Grüße"), "1:Grüße"), ((5,), "5")],
)
def test_seed_is_first_bits_of_sha256(arguments, text, bits):
    digest = subprocess.run(["sha256sum"], input=text.encode(), capture_output=True, check=True).stdout
    assert seed_of(*arguments, bits=bits) == int(digest[: bits // 4], 16)


def test_seed_depends_on_every_part():
    seeds = {seed_of(seed, epoch, name) for seed in range(9) for epoch in range(9) for name in ("a", "b")}
    assert len(seeds) == 9 * 9 * 2


def test_seed_values():
    """Seeds have fixed values; a change of these would change every result."""
    assert seed_of(0, "an-id") == 7320467724471388
    assert seed_of(0, 1, bits=32) == 4011020074
