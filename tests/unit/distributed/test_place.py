"""One process's place under each launcher, and what ranks say to each other through a store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from packtrain.distributed import parent
from packtrain.distributed import place as places
from packtrain.distributed.collectives import sum_
from packtrain.distributed.place import (
    Place,
    describe,
    first_report,
    is_echo,
    launched,
    open_place,
    report_first,
    under_torchrun,
)
from packtrain.errors import EXIT_USER, Fault, Stopped, UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (places.STORE, parent.ATTEMPT, parent.PARENT, parent.LAUNCH)
    for name in (*places.TORCHRUN, *told, "GROUP_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def two_places() -> tuple[Place, Place]:
    """Ranks 0 and 1 of one machine, as two threads may use them."""
    first = Place(rank=0, world_size=2, local_rank=0, local_world_size=2, machine=0, device=CPU, store=dist.HashStore())
    return first, replace(first, rank=1, local_rank=1)


def test_alone_is_rank_0_of_1_with_working_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")  # anyone's: no launcher stands behind it
    assert not launched()
    with open_place("cpu") as place:
        assert (place.rank, place.world_size, place.local_world_size, place.machine) == (0, 1, 1, 0)
        assert place.leads_machine
        assert place.agree("answer", lambda: [1, 2]) == [1, 2]
        with pytest.raises(Fault, match="join"):
            place.group  # noqa: B018
        place.join()
        assert sum_(torch.ones(2), place).tolist() == [1.0, 1.0]
        dist.all_reduce(tensor := torch.ones(1), group=place.group)
        assert tensor.item() == 1.0
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", [ValueError("x"), Stopped("x"), SystemExit(75)])
def test_the_group_is_gone_after_an_error(error: BaseException) -> None:
    def run() -> None:
        with open_place("cpu") as place:
            place.join()
            raise error

    with pytest.raises(type(error)):
        run()
    assert not dist.is_initialized()
    with open_place("cpu") as place:  # and another can be formed
        place.join()


def test_torchrun_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert under_torchrun()
    with open_place("cpu") as place:
        place.join()
        assert sum_(torch.ones(1), place).item() == 1.0


def test_a_second_try_does_not_see_what_the_first_left(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv(places.STORE, f"127.0.0.1:{server.port}")
    seen = []
    for attempt in ("0", "1"):
        monkeypatch.setenv(parent.ATTEMPT, attempt)
        with open_place("cpu") as place:
            seen.append(place.store.check(["told/address"]))
            place.tell("address", "of a rank that will be dead")
    assert seen == [False, False]


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="needs GPU 0, but torch sees 0 GPUs"), open_place("cuda"):
        pass
    with open_place("auto") as place:
        assert place.device == CPU


def test_wait_for_outlasts_slow_work_and_a_time_limit_ends_it() -> None:
    first, second = two_places()
    slow = threading.Timer(0.3, first.tell, ("tokenized", {"rows": 7}))
    slow.start()
    assert second.wait_for("tokenized") == {"rows": 7}
    with pytest.raises(Fault, match="rank 1 waited 0 s for 'nothing'"):
        second.wait_for("nothing", timeout=0.05)


def test_who_waits_for_a_failed_rank_learns_of_it() -> None:
    first, second = two_places()
    assert first.report(ValueError("bad row"))
    with pytest.raises(Fault, match="rank 0 failed: ValueError: bad row"):
        second.wait_for("tokenized")


def test_one_decides_and_all_obey() -> None:
    first, second = two_places()
    assert first.agree("folder", lambda: ("new", 1)) == ["new", 1]
    assert second.agree("folder", lambda: pytest.fail("rank 1 decided")) == ["new", 1]


def test_each_machine_decides_for_itself() -> None:
    first, second = two_places()
    third = replace(first, rank=2, machine=1)
    fourth = replace(second, rank=3, machine=1)
    assert first.agree("path", lambda: "/a", each_machine=True) == "/a"
    assert third.agree("path", lambda: "/b", each_machine=True) == "/b"
    assert second.agree("path", lambda: "", each_machine=True) == "/a"
    assert fourth.agree("path", lambda: "", each_machine=True) == "/b"


def test_a_refusal_is_everyones_with_all_problems() -> None:
    first, second = two_places()

    def refuse() -> None:
        raise UserError(["no tokenizer", "no weights"])

    for place in (first, second):
        with pytest.raises(UserError) as caught:
            place.agree("inputs", refuse)
        assert caught.value.problems == ["no tokenizer", "no weights"]


def test_the_first_cause_stands() -> None:
    store = dist.HashStore()
    assert first_report(store) is None
    assert report_first(store, 3, "bad row", EXIT_USER)
    assert not report_first(store, 1, "another")
    assert report_first(store, 3, "bad row", EXIT_USER)  # told twice by the same rank
    cause = first_report(store)
    assert cause is not None
    assert cause[:3] == (3, "bad row", EXIT_USER)


def test_an_echo_gives_the_culprit_time_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two_places()
    echo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:47497")
    threading.Timer(0.2, second.report, (UserError("row 7 is broken"),)).start()
    assert first.first_cause(echo) == "row 7 is broken"
    assert not first.report(echo)
    assert second.report(UserError("row 7 is broken"))
    monkeypatch.setattr(places, "ECHO_SECONDS", 0.1)
    alone = replace(first, store=dist.HashStore())
    assert alone.report(echo)  # nobody else has an explanation


def test_what_is_an_echo() -> None:
    assert is_echo(RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"))
    assert is_echo(ConnectionResetError("x"))
    assert not is_echo(RuntimeError("shape mismatch"))
    assert not is_echo(ValueError("gloo"))
    assert describe(ValueError("bad")) == "ValueError: bad"
    assert describe(UserError(["a", "b"])) == "a\nb"


def test_a_worker_whose_launcher_is_gone_ends() -> None:
    code = "from packtrain.distributed import parent; parent.follow(); print('still here')"
    env = {**os.environ, parent.PARENT: str(os.getppid())}  # not the process that starts it
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout) == (1, ""), out.stderr
