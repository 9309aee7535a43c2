"""Which signals are a first order, the same told twice, and a second one; how long there is."""

from __future__ import annotations

import signal

import pytest

from packtrain.distributed.orders import StopOrders

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


def told(*signals: tuple[float, int], at: float) -> StopOrders:
    """What has been made, at a time, of signals at their times."""
    now = [0.0]
    orders = StopOrders(30, clock=lambda: now[0])
    for time, number in signals:
        now[0] = time
        orders.add(number)
    now[0] = at
    return orders


@pytest.mark.parametrize(
    ("signals", "at_once", "left"),
    [
        ([], False, None),
        ([(1, TERM)], False, 29),
        ([(1, INT), (1.2, INT), (1.6, INT)], False, 29),  # a terminal and a launcher
        ([(1, INT), (1.6, INT)], True, 29),
        ([(1, INT), (1.2, INT), (1.8, TERM)], True, 29),
        ([(1, USR1)], False, 29),
        ([(1, USR1), (2, USR1)], False, 29),  # srun tells it as long as it likes
        ([(0, USR1), (2, TERM)], False, 30),  # Slurm: a notice, then the time limit
        ([(0, USR1), (1, TERM), (2, TERM)], True, 29),
        ([(1, TERM), (1.9, USR1)], False, 29),
    ],
)
def test_orders(signals: list[tuple[float, int]], at_once: bool, left: float | None) -> None:
    orders = told(*signals, at=2)
    assert orders.asked == bool(signals)
    assert (orders.at_once, orders.left()) == (at_once, left)


def test_the_grace_ends() -> None:
    left = told((1, TERM), at=31).left()
    assert left is not None
    assert left <= 0
