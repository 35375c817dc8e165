"""Jobs in threads: all of them done, few at a time, and errors as if they had been done in turn."""

import threading
import time

import pytest

from qalora.errors import InputError, OutputError
from qalora.formats.workers import IN_FLIGHT, Workers


def _fail(error: BaseException, seconds: float = 0) -> None:
    time.sleep(seconds)
    raise error


def test_all_is_done_at_the_end_and_few_jobs_at_a_time() -> None:
    lock, running, most, done = threading.Lock(), 0, 0, []

    def job(number: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
            done.append(number)

    with Workers() as workers:
        for number in range(20):
            workers.do(job, number)
            assert number + 1 - len(done) <= IN_FLIGHT
    assert sorted(done) == list(range(20))
    assert most == IN_FLIGHT


def test_a_job_that_fails_is_seen_by_the_next_ones_or_at_the_end() -> None:
    with pytest.raises(OutputError, match="full"), Workers() as workers:
        workers.do(_fail, OutputError("full"))
    with pytest.raises(OutputError, match="full"), Workers() as workers:
        for _ in range(IN_FLIGHT + 1):
            workers.do(_fail, OutputError("full"))
        pytest.fail("nobody was told")


def test_the_first_job_that_fails_is_the_one_that_is_seen() -> None:
    with pytest.raises(InputError, match="first"), Workers() as workers:
        workers.do(_fail, InputError("first"), 0.02)
        workers.do(_fail, InputError("second"))
    with pytest.raises(InputError, match="first"), Workers() as workers:
        workers.do(_fail, InputError("first"), 0.02)
        raise InputError("of the caller, who came later")


def test_an_interrupt_leaves_no_thread_behind() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Workers() as workers:
        workers.do(time.sleep, 0.01)
        workers.do(done.append, 1)
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qalora-worker")]
