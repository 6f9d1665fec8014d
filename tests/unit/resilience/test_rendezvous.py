"""Supervisors of several nodes meet: threads of one process, over real connections."""

import json
import socket
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from laver_megatron.resilience import rendezvous, rendezvous_host
from laver_megatron.resilience.endings import KILLED, PEER_LOST
from laver_megatron.resilience.questions import answer_questions, ask
from laver_megatron.resilience.rendezvous import Guest, Over
from laver_megatron.resilience.rendezvous_host import Host
from laver_megatron.runtime.exit_status import FAILED, HUNG, INTERRUPTED, WRONG_USE


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(rendezvous, "_ASK_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous_host, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous_host, "_FRESH_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous_host, "FAREWELL_SECONDS", 2.0)
    monkeypatch.setattr(rendezvous_host, "_STRANGER_SECONDS", 1.0)


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def request():
    return SimpleNamespace(signal=0, at_once=False, sleep=time.sleep)


def meet(*supervisors, said="") -> list:
    """What each gets: a plan, or why the run is over."""
    results: list = [None] * len(supervisors)

    def one(place: int) -> None:
        try:
            results[place] = supervisors[place].meet(said or f"end {place}", request())
        except Over as over:
            results[place] = over
            if not over.is_known:
                supervisors[place].leave(str(over), over.status)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(supervisors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def nodes(port, count, *, seconds=20.0, fits=None):
    guests = [Guest(node, count, ("localhost", port), seconds) for node in range(1, count)]
    return [Host(count, port, seconds, fits or (lambda number: number == count)), *guests]


def test_all_get_the_same_plan_of_every_start(port):
    three = nodes(port, 3)
    for attempt in range(3):
        plans = meet(*three)
        assert [(plan.attempt, tuple(plan.nodes)) for plan in plans] == [(attempt, (0, 1, 2))] * 3
        assert plans[1].said == plans[0].said


def test_the_node_that_failed_first_is_blamed(port, monkeypatch):
    """By all, whoever keeps the record."""
    host, guest = nodes(port, 2)
    meet(host, guest)
    distances = {host: PEER_LOST, guest: KILLED}
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: threading.current_thread().name)
    plans: list = [None, None]

    def one(place, supervisor):
        plans[place] = supervisor.meet(f"end {place}", request(), distances[supervisor])

    threads = [threading.Thread(target=one, args=it, name=f"host{it[0]}") for it in enumerate((host, guest))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [plan.blamed for plan in plans] == ["host1", "host1"]
    assert plans[0].said["host1"] == "end 1"


def test_without_elastic_a_lost_node_ends_the_run_everywhere(port):
    host, one, _ = nodes(port, 3, seconds=0.5)
    over, told = meet(host, one)
    assert (over.status, told.status) == (FAILED, FAILED)
    assert "node 2 is lost or cut off" in str(over) and str(over) in str(told)


def test_as_many_nodes_go_on_as_fit_and_a_lost_one_comes_back(port):
    four = nodes(port, 4, seconds=1.0, fits=lambda number: number in (1, 2, 4))
    plans = meet(*four)
    assert plans[3].nodes == (0, 1, 2, 3)
    spare = threading.Thread(target=meet, args=(four[2],), daemon=True)
    spare.start()
    plans = meet(*four[:2])  # node 3 is lost, and node 2 alone is one too many
    assert [(plan.attempt, plan.nodes) for plan in plans] == [(1, (0, 1)), (1, (0, 1))]
    began = time.monotonic()
    assert meet(four[0], four[1], four[3])[0].nodes == (0, 1, 2, 3)
    assert time.monotonic() - began < 20


def test_node_0_is_needed(port):
    (over,) = meet(nodes(port, 2, seconds=0.3)[1])
    assert over.status == FAILED and "node 0 (localhost, MASTER_ADDR) is lost or cut off" in str(over)


def test_a_mistake_on_one_node_ends_the_others(port):
    host, guest = nodes(port, 2)
    meet(host, guest)
    guest.leave("rank 1 ended with exit status 2: the run is over", WRONG_USE)
    (over,) = meet(host)
    assert over.status == WRONG_USE and "has ended the run: rank 1 ended with exit status 2" in str(over)


def test_a_mistake_on_node_0_ends_the_others(port):
    host, guest = nodes(port, 2)
    meet(host, guest)
    told: list = []
    waiting = threading.Thread(target=lambda: told.extend(meet(guest)))
    waiting.start()
    host.leave("rank 0 ended with exit status 75", HUNG)
    waiting.join(10)
    assert told[0].status == HUNG and str(told[0]) == "node 0 has ended the run: rank 0 ended with exit status 75"


def test_what_node_0_said_before_it_ended_is_remembered(port, capsys):
    """Ranks may take longer to end than node 0 waits for their supervisor."""
    host, guest = nodes(port, 2)
    meet(host, guest)
    with guest.watching(request()):
        host.leave("rank 0 ended with exit status 2", WRONG_USE)
    guest._address = ("localhost", 1)  # where nobody is
    (over,) = meet(guest)
    assert over.status == WRONG_USE and "rank 0 ended with exit status 2" in str(over)


@pytest.mark.parametrize("ended", [0, 1])
def test_ranks_do_not_outlive_those_of_another_node_for_long(port, ended, capsys):
    both = nodes(port, 2)
    meet(*both)
    left, asked = both[1 - ended], request()
    waiting = threading.Thread(target=meet, args=(both[ended],))
    with left.watching(asked):
        time.sleep(0.3)
        assert not asked.at_once
        waiting.start()
        deadline = time.monotonic() + 10
        while not asked.at_once and time.monotonic() < deadline:
            time.sleep(0.02)
        assert asked.at_once
    assert not asked.at_once, "the next start is not stopped"
    assert "ending the ranks of this node" in capsys.readouterr().err
    meet(left)
    waiting.join(10)


def test_a_stop_is_heeded_while_waiting(port):
    asked = request()
    asked.signal = 15
    with pytest.raises(Over) as over:
        nodes(port, 2)[1].meet("", asked)
    assert over.value.status == INTERRUPTED


def test_a_port_that_is_taken_is_named(port):
    with socket.create_server(("", port)):
        (over,) = meet(nodes(port, 2)[0])
    assert over.status == WRONG_USE and f"port {port}, one below MASTER_PORT" in str(over)


@pytest.mark.parametrize(
    "line", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\xff\n", b"[]\n", b'{"error": "bad request"}\n', b'{"over": "x"}\n']
)
def test_another_program_where_node_0_should_listen(port, line):
    """It is named with what it says; whoever says nothing, or half a line, may be cut off."""
    with socket.create_server(("", port)) as stranger:
        threading.Thread(target=answer_with, args=(stranger, [line[:-1], line]), daemon=True).start()
        (over,) = meet(nodes(port, 2)[1])
    assert over.status == WRONG_USE and over.is_known
    assert f"localhost port {port}, one below MASTER_PORT" in str(over) and "choose another MASTER_PORT" in str(over)
    assert "SSH" not in str(line) or "which answers 'SSH-2.0-OpenSSH_9.6'" in str(over)


def answer_with(server, answers):
    for answer in answers:
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 14)
            connection.sendall(answer)


def test_an_answer_has_room_for_what_a_thousand_nodes_say(port):
    said = {f"host{number}": "x" * rendezvous._LONGEST_SAYING for number in range(1000)}
    answer_questions(port, lambda question: said)
    assert ask(("localhost", port), {}) == said


LOOK = {"node": 1, "host": "", "said": "", "id": "", "launcher": "", "status": 0, "distance": 0}


@pytest.mark.parametrize(
    "line",
    [b"x", b"[]", b"{}", b'{"node": 0}', b"1" * 100_000, b'{"node": [1], "status": 0}',
     *(json.dumps({**LOOK, **wrong}).encode() for wrong in ({"host": 3}, {"distance": "x"}, {"status": "2"}))],
)  # fmt: skip
def test_what_is_not_from_a_supervisor_changes_nothing(port, line, capfd):
    host, guest = nodes(port, 2)
    meet(host, guest)
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(line + b"\n")
        with suppress(OSError):  # it may have closed the connection before it read all of this
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(100) == b""
    assert ask(("localhost", port), LOOK)
    assert meet(host, guest)[0].attempt == 1
    assert capfd.readouterr().err == ""


def test_a_launcher_of_another_run_is_told_so_and_ends_nothing(port):
    """The same command started twice: its second node meets the first run's node 0."""
    host, guest = nodes(port, 2)
    plan, _ = meet(host, guest)
    stop = request()
    with guest.watching(stop), host.watching(stop):
        (over,) = meet(nodes(port, 2)[1])
        assert not host._others_have_ended() and not stop.at_once
    assert over.status == WRONG_USE and "its node 1 is on" in str(over) and plan.attempt == 0
    assert [plan.attempt for plan in meet(host, guest)] == [1, 1]


def test_a_launcher_that_is_started_again_takes_its_node_over(port):
    """When the one before has been silent for a while."""
    host, guest = nodes(port, 2)
    meet(host, guest)
    assert [plan.attempt for plan in meet(host, nodes(port, 2)[1])] == [1, 1]
