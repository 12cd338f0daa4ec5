"""What the tests on several processes rest on: results, failures, deaths and hangs are told."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import Failure, attempt, run


def summed(number):
    x = torch.tensor([float(dist.get_rank() + number)])
    dist.all_reduce(x)
    return dist.get_rank(), dist.get_world_size(), x.item(), os.getpid()


def fails_on_the_second():
    if dist.get_rank() == 1:
        raise ValueError("no rows")
    return dist.get_rank()


def waits_for_a_failed_one():
    fails_on_the_second()
    dist.barrier()


def dies_on_the_second():
    if dist.get_rank() == 1:
        os._exit(3)
    return "alive"


def hangs_on_the_first():
    if dist.get_rank() == 0:
        time.sleep(60)
    return "done"


def test_processes_are_started_once_for_groups_of_any_size():
    first = run(2, summed, 1)
    assert [result[:3] for result in first] == [(0, 2, 3.0), (1, 2, 3.0)]
    more = run(3, summed, 0)
    assert [result[:3] for result in more] == [(0, 3, 3.0), (1, 3, 3.0), (2, 3, 3.0)]
    assert [result[3] for result in more[:2]] == [result[3] for result in first]


def test_a_failure_is_told_with_its_traceback_and_leaves_nothing_behind():
    results = attempt(2, fails_on_the_second)
    assert results[0] == 0
    assert (results[1].kind, results[1].message) == ("ValueError", "no rows")
    with pytest.raises(AssertionError, match=r"process 1 of 2: ValueError: no rows(.|\n)*line \d+"):
        run(2, fails_on_the_second)
    assert run(2, summed, 0)[1][2] == 1.0


def test_who_waits_for_a_failed_process_is_not_waited_for_long():
    start = time.monotonic()
    assert all(isinstance(result, Failure) for result in attempt(2, waits_for_a_failed_one))
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_told_and_replaced():
    before = run(2, summed, 0)
    died = attempt(2, dies_on_the_second)
    assert died[0] == "alive"
    assert died[1].kind == "died"
    hung = attempt(2, hangs_on_the_first, timeout=3)
    assert hung[0].kind == "timeout"
    assert hung[1] == "done"
    after = run(2, summed, 0)
    assert [result[2] for result in after] == [1.0, 1.0]
    assert {result[3] for result in after}.isdisjoint({result[3] for result in before})
