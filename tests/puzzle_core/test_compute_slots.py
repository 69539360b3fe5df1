"""Compute slots: at most so many threads have one, and the oldest work goes first."""

import threading

from puzzle_core.compute_slots import ComputeSlot

LONG_SECONDS = 30


def test_at_most_so_many_threads_compute_and_each_has_its_turn():
    computing, seen, both = [], [], threading.Barrier(2, timeout=LONG_SECONDS)

    def work(number):
        with ComputeSlot("a device", most=2):
            computing.append(number)
            seen.append(len(computing))
            both.wait()  # two at a time reach this, and no third
            computing.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_SECONDS)
    assert len(seen) == 6
    assert max(seen) == 2


def test_the_lowest_order_goes_first_and_other_devices_are_free():
    first, order, queued = ComputeSlot("one device", most=1), [], []

    def work(number):
        slot = ComputeSlot("one device", most=1)
        queued.append(number)
        slot.take(number, 0)
        order.append(number)
        slot.give_up()

    first.take(0)
    first.take(0)  # it is held already
    with ComputeSlot("another device", most=1):
        threads = [threading.Thread(target=work, args=(number,)) for number in (3, 1, 2)]
        for thread in threads:
            thread.start()
        from puzzle_core import compute_slots

        while len(compute_slots._waiting["one device"]) < 3:
            threading.Event().wait(0.01)
    first.give_up()
    for thread in threads:
        thread.join(LONG_SECONDS)
    assert order == [1, 2, 3]
    assert first.held_s > 0


def test_a_slot_whose_thread_is_gone_is_free():
    lost = ComputeSlot("a third device", most=1)
    lost.take(0)
    del lost
    taken = threading.Event()

    def work():
        with ComputeSlot("a third device", most=1):
            taken.set()

    threading.Thread(target=work, daemon=True).start()
    assert taken.wait(LONG_SECONDS)
