"""Rows in Arrow equal a list of dataclasses, however they are stored and selected."""

import pickle
import random
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest

from spin.runtime.tables import Lazy, Rows, read_parquet, schema_of, write_arrow, write_parquet


@dataclass(frozen=True)
class Line:
    id: str
    number: int
    text_ids: tuple[int, ...]


def lines(count: int) -> list[Line]:
    rng = random.Random(0)
    return [Line(f"é{n}", -n, tuple(rng.randrange(2**20) for _ in range(rng.randrange(5)))) for n in range(count)]


@pytest.fixture(scope="module", params=["memory", "file", "parquet"])
def rows(request, tmp_path_factory):
    folder, expected = tmp_path_factory.mktemp("rows"), lines(20_000)
    if request.param == "memory":
        return Rows.of(Line, expected)
    if request.param == "parquet":
        write_parquet(Rows.of(Line, expected).table, folder / "rows.parquet")
        return read_parquet(Line, folder / "rows.parquet")
    write_arrow(map(asdict, expected), schema_of(Line), folder / "rows.arrow")
    return Rows.open(Line, folder / "rows.arrow")


def test_reads_as_a_list(rows):
    expected = lines(20_000)
    assert len(rows.batches) > 1 and rows == expected and list(rows) == expected
    for index in (0, 1023, 1024, 8191, 8192, 19_999, -1, -20_000):
        assert rows[index] == expected[index]
    with pytest.raises(IndexError):
        rows[20_000]
    assert rows[5:9000:7] == expected[5:9000:7] and rows[:0] == [] and not rows[3:3]
    assert rows.column("number") == [line.number for line in expected]
    assert rows.lengths("text_ids").tolist() == [len(line.text_ids) for line in expected]


def test_chosen_rows(rows):
    expected, order = lines(20_000), np.random.default_rng(0).permutation(20_000)[:3000]
    chosen = rows.at(order)
    assert chosen == [expected[i] for i in order] and chosen.at(np.array([2, 2, 0]))[1] == expected[order[2]]
    assert chosen[2999] == expected[order[2999]] and chosen[10:20] == [expected[i] for i in order[10:20]]
    assert chosen.lengths("text_ids").tolist() == [len(expected[i].text_ids) for i in order]
    assert chosen.column("id") == [expected[i].id for i in order]
    assert (chosen + rows.at(np.array([7]))) == [*(expected[i] for i in order), expected[7]]
    assert (chosen[:2] + Rows.of(Line, expected[:1])) == [expected[order[0]], expected[order[1]], expected[0]]
    assert chosen.table.to_pylist()[5]["number"] == expected[order[5]].number
    assert pickle.loads(pickle.dumps(chosen)) == chosen


def test_digest_of_content(rows):
    expected = lines(20_000)
    assert rows.digest == Rows.of(Line, expected).digest
    assert rows.at(np.arange(100)).digest == Rows.of(Line, expected[:100]).digest
    # The digest covers ids and token ids, but not the number.
    sample = expected[:3]
    digests = {Rows.of(Line, sample).digest}
    assert Rows.of(Line, [replace(sample[0], number=9), *sample[1:]]).digest in digests
    for changed in (
        [sample[1], sample[0], sample[2]],
        [replace(sample[0], id="other"), *sample[1:]],
        [replace(sample[0], text_ids=(1,)), replace(sample[1], text_ids=(2, 3)), sample[2]],
        [replace(sample[0], text_ids=(1, 2)), replace(sample[1], text_ids=(3,)), sample[2]],
        sample[:2],
    ):
        digests.add(Rows.of(Line, changed).digest)
    assert len(digests) == 6


def test_no_rows():
    empty = Rows.of(Line, [])
    assert len(empty) == 0 and list(empty) == [] and empty.column("id") == [] and empty.table.num_rows == 0
    assert empty + empty == [] and empty.lengths("text_ids").tolist() == []


def test_lazy():
    computed = []
    squares = Lazy(10, lambda n: computed.append(n) or n * n)
    assert len(squares) == 10 and squares[3] == 9 and squares[-1] == 81 and computed == [3, 9]
    assert list(squares) == [n * n for n in range(10)]
    with pytest.raises(IndexError):
        squares[10]
