"""Processes that meet, as threads: over real sockets, without JAX."""

import concurrent.futures
import re
import socket
import time

import pytest

from train.engine import rendezvous


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(rendezvous, "SAY", 0.3)
    monkeypatch.setattr(rendezvous, "GRACE", 0.2)


def gather(port, *members, timeout=1.5, died=None):
    """Has processes (id, count) gather; returns each one's peers, or its error."""

    def one(this, count):
        die = (lambda text: died.append((this, text))) if died is not None else None
        peers = rendezvous.Peers(this, count, timeout, die or pytest.fail)
        try:
            peers.gather("localhost", port)
        except ValueError as error:
            return str(error)
        return peers

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda member: one(*member), members))


@pytest.mark.parametrize(
    "address, expected",
    [("h:1", ("h", 1)), ("[::1]:1234", ("::1", 1234)), ("10.0.0.1:65535", None)],
)
def test_addresses(address, expected):
    assert rendezvous.parse(address) == (expected or ("10.0.0.1", 65535))


@pytest.mark.parametrize(
    "address",
    ["", "foo", "h:abc", "h:0", "h:65536", ":1", "::1:5", "[::1]", "h:-1", "a b:1"],
)
def test_addresses_that_are_none(address):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        rendezvous.parse(address)


def test_one_that_is_late_to_a_meeting(port, quick, capfd):
    all_ = gather(port, (0, 3), (1, 3), (2, 3))
    moments = []

    def meet(peers):
        time.sleep(0.8 * (peers.this == 2))
        peers.meet()
        moments.append(time.monotonic())

    with concurrent.futures.ThreadPoolExecutor() as pool:
        start = time.monotonic()
        list(pool.map(meet, all_))
    assert min(moments) - start >= 0.8
    assert "waiting for 1 of 3 processes (0, 1 are here)" in capfd.readouterr().err
    for peers in all_:
        peers.leave()


@pytest.mark.parametrize(
    "members, message",
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes have --process_id=1"),
        ([(0, 2), (0, 2)], "cannot listen"),
        ([(0, 2), (1, 3)], "process 1 has --num_processes=3, process 0 has"),
        ([(0, 3), (2, 3)], "waited 1.5 s for 1 of 3 processes (0, 2 are here)"),
        ([(1, 2)], "for process 0 at localhost:"),
    ],
)
def test_those_that_do_not_fit(port, quick, members, message):
    errors = gather(port, *members)
    assert all(isinstance(error, str) for error in errors)
    assert any(message in error for error in errors)
    if "cannot" not in message:
        assert all(message in error for error in errors), errors


def test_strangers_are_ignored(port, quick, monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER", 0.5)
    silent = socket.socket()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        result = pool.submit(gather, port, (0, 2), timeout=5)
        time.sleep(0.2)
        silent.connect(("localhost", port))
        for stranger in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"{}\n"):
            with socket.create_connection(("localhost", port)) as connection:
                connection.sendall(stranger)
        (second,) = gather(port, (1, 2), timeout=5)
        (first,) = result.result()
    silent.close()
    for peers in (first, second):
        peers.leave()


@pytest.mark.parametrize(
    "end, expected",
    [
        # killed: it says nothing
        (
            lambda peers: peers._sockets[0].shutdown(socket.SHUT_RDWR),
            "process 2 ended before the run did; .* resumes",
        ),
        (
            lambda peers: peers.report(ValueError("bad \n" * 500)),
            "process 2 ended: bad \nbad",
        ),
    ],
)
def test_one_that_is_gone(port, quick, end, expected):
    died = []
    all_ = gather(port, (0, 3), (1, 3), (2, 3), died=died)
    all_[2]._left = True
    end(all_[2])
    deadline = time.monotonic() + 5
    while len(died) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(this for this, _ in died) == [0, 1]
    assert all(re.match(expected, text) for _, text in died), died


def test_one_that_left_as_it_should(port, quick):
    died = []
    first, second = gather(port, (0, 2), (1, 2), died=died)
    second.leave()
    second._sockets[0].shutdown(socket.SHUT_RDWR)
    time.sleep(1)
    assert not died
    first.leave()
