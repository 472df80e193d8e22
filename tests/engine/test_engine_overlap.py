"""What is read ahead and written behind: nothing twice, nothing lost, errors where somebody sees them."""

from __future__ import annotations

import threading

import pytest

from qbuild.overlap import Ahead, Behind

DEVICES = ["cpu", "cuda"]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_expected_is_read_once_and_what_is_not_when_it_is_asked_for(device: str) -> None:
    reads: list[str] = []

    def read(name: str) -> str:
        reads.append(name)
        return name.upper()

    with Ahead(read, device) as ahead:
        ahead.expect(["a", "b"])
        assert [ahead("c"), ahead("b"), ahead("a")] == ["C", "B", "A"]
    assert sorted(reads) == ["a", "b", "c"]


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_reading_comes_where_the_thing_is_asked_for(device: str) -> None:
    with Ahead(lambda n: 1 // n, device) as ahead:
        ahead.expect([0, 1])
        assert ahead(1) == 1
        with pytest.raises(ZeroDivisionError):
            ahead(0)


def test_reading_stops_where_nobody_asks_any_more() -> None:
    reads, go = [], threading.Event()

    def read(number: int) -> None:
        reads.append(number)
        go.wait(10)

    def give_up() -> None:
        with Ahead(read, "cuda") as ahead:
            ahead.expect(range(5))
            threading.Timer(0.05, go.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        give_up()
    assert reads in ([], [0])


def fail() -> None:
    raise OSError("disk full")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("behind_it", [True, False], ids=["of writing", "of its caller"])
def test_an_error_ends_what_comes_after_it_and_keeps_what_was_made_before(device: str, behind_it: bool) -> None:
    done: list[int] = []

    def work() -> None:
        with Behind(device) as behind:
            behind.do(lambda: done.append(1))
            behind.do(fail) if behind_it else fail()
            behind.do(lambda: done.append(2))

    with pytest.raises(OSError, match="disk full"):
        work()
    assert done == [1]


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_last_writing_is_not_lost(device: str) -> None:
    with pytest.raises(OSError, match="disk full"), Behind(device) as behind:
        behind.do(fail)


def test_one_thing_is_written_beside_its_caller_and_no_more() -> None:
    go, started = threading.Event(), []

    def slow() -> None:
        started.append(1)
        assert go.wait(10)

    with Behind("cuda") as behind:
        behind.do(slow)  # returns before it is done
        threading.Timer(0.05, go.set).start()
        behind.do(lambda: started.append(2))
        assert go.is_set()  # the second waited for the first
    assert started == [1, 2]
