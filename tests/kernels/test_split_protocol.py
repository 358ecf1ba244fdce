"""Split-K's protocol sums every part in every interleaving, on a memory that reorders as much as a GPU's may.

The model is of ``is_last`` and ``sum_of_parts`` in gpu/wgrad.py. Every program has a part of one tile, every thread of
it a fragment of that part: it stores its fragment, waits for the others (``tl.debug_barrier``), one thread adds to the
counter (``atomic_add``, acq_rel, gpu), the answer goes to all, and the threads of the program that was last read every
part, each a fragment that another thread wrote. test_aot_wgrad.py finds the same steps in the compiled code.

- A store waits in its thread; a barrier brings it to the multiprocessor, where other threads of the program see it; it
  reaches memory at any time after. A release, by the thread that adds, sends what the multiprocessor and it hold.
- Old values of all parts lie in each multiprocessor's L1, and are what a load finds until an acquire drops them.
- The counter lives in memory. A launch finds it at zero.
"""

from dataclasses import dataclass, replace

import pytest

NOWHERE, IN_THREAD, IN_MULTIPROCESSOR, IN_MEMORY = range(4)
STORE, BARRIER, ADD, ANSWER, READ = range(5)


@dataclass(frozen=True)
class Protocol:
    """What the kernel does; every field is one thing that may be forgotten."""

    barrier: bool = True
    release: bool = True
    acquire: bool = True
    counter: int = 0  # what a launch finds


@dataclass(frozen=True)
class Program:
    """Where each thread is and where its fragment is; whether old values are in L1; what the counter answered."""

    places: tuple[int, ...]
    fragments: tuple[int, ...]
    stale: bool = True
    last: bool = False


@dataclass(frozen=True)
class State:
    counter: int
    programs: tuple[Program, ...]
    sums: tuple[
        bool, ...
    ] = ()  # of every finished thread of a last program: whether all that it read was new


def moved(items, place, value):
    return (*items[:place], value, *items[place + 1 :])


def steps(state, protocol):
    """Every state that may come next."""
    splits = len(state.programs)
    for p, program in enumerate(state.programs):
        threads = len(program.places)

        def after(change, p=p, **more):
            return replace(state, programs=moved(state.programs, p, change), **more)

        for t, where in enumerate(program.fragments):
            if where in (IN_THREAD, IN_MULTIPROCESSOR):
                yield after(replace(program, fragments=moved(program.fragments, t, IN_MEMORY)))
        for joint in (BARRIER, ANSWER):
            if all(place == joint for place in program.places) and (joint == ANSWER or protocol.barrier):
                # all threads are here: what they stored is seen by each other
                seen = tuple(max(where, IN_MULTIPROCESSOR) for where in program.fragments)
                yield after(replace(program, places=(joint + 1,) * threads, fragments=seen))
        for t, place in enumerate(program.places):
            onward = moved(program.places, t, place + 1)
            if place == STORE:
                yield after(replace(program, places=onward, fragments=moved(program.fragments, t, IN_THREAD)))
            elif (place == BARRIER and not protocol.barrier) or (place == ADD and t > 0):
                yield after(replace(program, places=onward))
            elif place == ADD:
                fragments = program.fragments
                if protocol.release:
                    fragments = tuple(
                        IN_MEMORY if where == IN_MULTIPROCESSOR or (where == IN_THREAD and f == t) else where
                        for f, where in enumerate(fragments)
                    )
                changed = replace(
                    program,
                    places=onward,
                    fragments=fragments,
                    last=state.counter == splits - 1,
                    stale=program.stale and not protocol.acquire,
                )
                yield after(changed, counter=state.counter + 1)
            elif READ <= place < READ + splits and program.last:
                # part by part, of each a fragment that a neighbour wrote
                part, fragment = place - READ, (t + 1) % threads
                where = state.programs[part].fragments[fragment]
                own = part == p and where >= IN_MULTIPROCESSOR
                new = own or (where == IN_MEMORY and not program.stale)
                yield after(replace(program, places=onward), sums=(*state.sums, new))


def outcomes(programs, threads, protocol):
    """The sums of every way that a launch can end, and the number of states that it can pass through."""
    first = State(protocol.counter, (Program((STORE,) * threads, (NOWHERE,) * threads),) * programs)
    seen, todo, ends = {first}, [first], set()
    while todo:
        state = todo.pop()
        following = list(steps(state, protocol))
        if not following:
            ends.add(state.sums)
        for new in following:
            # the order in which threads finish their sums makes no difference
            new = replace(new, sums=tuple(sorted(new.sums)))
            if new not in seen:
                seen.add(new)
                todo.append(new)
    return ends, len(seen)


SIZES = [(2, 2), (2, 3), (3, 2)]


@pytest.mark.parametrize(("programs", "threads"), SIZES)
def test_one_program_sums_all_parts_in_every_interleaving(programs, threads):
    ends, count = outcomes(programs, threads, Protocol())
    assert ends == {(True,) * (programs * threads)}
    assert count > 300


@pytest.mark.parametrize(("programs", "threads"), SIZES[:1])
@pytest.mark.parametrize("missing", ["release", "acquire", "barrier"])
def test_without_one_of_its_orders_a_sum_can_miss_a_part(programs, threads, missing):
    ends, _ = outcomes(programs, threads, replace(Protocol(), **{missing: False}))
    assert any(not all(sums) for sums in ends)


@pytest.mark.parametrize(("programs", "threads"), SIZES[:1])
def test_a_counter_that_was_not_reset_is_seen(programs, threads):
    # after a whole launch nobody is last again; after one that broke off somebody is too early
    ends, _ = outcomes(programs, threads, Protocol(counter=programs))
    assert ends == {()}
    ends, _ = outcomes(programs, threads, Protocol(counter=1))
    assert any(not all(sums) for sums in ends)
