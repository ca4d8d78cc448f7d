"""Small sums over the processes of one machine."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crysdistill import pipes, ranks
from crysdistill.layers.normalization import BatchNorm
from crysdistill.pipes import MOST, Pipes, ProcessLostError, connect
from tests.together import joined_call, together


def asking(number: int, seen: Callable[[int, Any], Any]) -> list[Callable]:
    """Return an `ask_all` for each of `number` threads that stand for processes.

    `seen(own, value)` returns what process `own` receives for `value`.
    """
    said: list[Any] = [None] * number
    barrier = threading.Barrier(number, timeout=20)

    def ask(own: int, value: Any) -> list[Any]:
        said[own] = value
        barrier.wait()
        answer = [seen(own, value) for value in said]
        barrier.wait()
        return answer

    return [lambda value, own=own: ask(own, value) for own in range(number)]


@contextmanager
def connected(
    number: int,
    seen: Callable[[int, Any], Any] = lambda _, value: value,
    patience: float = 20,
) -> Iterator[tuple[ThreadPoolExecutor, list[Pipes | None]]]:
    with ThreadPoolExecutor(number) as pool:
        asks = asking(number, seen)
        found = list(pool.map(connect, range(number), asks, [patience] * number))
        try:
            yield pool, found
        finally:
            for end in found:
                if end is not None:
                    end.close()


def sums(pool: ThreadPoolExecutor, ends: list, arrays: list) -> list[np.ndarray]:
    waiting = [
        pool.submit(end.sum, array) for end, array in zip(ends, arrays, strict=True)
    ]
    return [done.result(20) for done in waiting]


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_a_sum_is_that_of_all(number, shape, dtype):
    rng = np.random.default_rng(number)
    parts = [(100 * rng.standard_normal(shape)).astype(dtype) for _ in range(number)]
    with connected(number) as (pool, ends):
        found = sums(pool, ends, parts)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    for each in found:
        assert each.dtype == dtype
        assert each.shape == shape
        assert each.flags.writeable
        assert each.tobytes() == total.tobytes()


def test_a_part_of_a_larger_array():
    table = np.arange(24.0).reshape(4, 6)
    with connected(2) as (pool, ends):
        found = sums(pool, ends, [table[:, ::2], table[:, 1::2]])
    assert (found[0] == table[:, ::2] + table[:, 1::2]).all()
    assert table[0, 1] == 1


def test_nobody_waits_for_another_to_read():
    """Each process may be one message of the largest size ahead."""
    with connected(4) as (pool, ends):
        for turn in range(50):
            parts = [np.full(MOST // 8, float(turn * own)) for own in range(4)]
            for found in sums(pool, ends, parts):
                assert (found == turn * 6).all()


def test_a_process_that_ended():
    with connected(3) as (pool, ends):
        ends[1].close()
        for own in (0, 2):
            done = pool.submit(ends[own].sum, np.ones(3))
            with pytest.raises(ProcessLostError, match="another process of this run"):
                done.result(20)


def test_a_process_that_does_not_answer():
    with connected(2, patience=0.2) as (pool, ends):
        done = pool.submit(ends[0].sum, np.ones(3))
        with pytest.raises(ProcessLostError) as error:
            done.result(20)
    assert isinstance(error.value.__cause__, TimeoutError)


def test_what_is_no_number_comes_without_a_warning():
    parts = [np.array([3e38, np.inf, np.nan], dtype=np.float32)] * 2
    parts[1] = parts[1] * np.float32([1, -1, 1])
    with warnings.catch_warnings(), connected(2) as (pool, ends):
        warnings.simplefilter("error")
        for found in sums(pool, ends, parts):
            np.testing.assert_array_equal(found, [np.inf, np.nan, np.nan])


@pytest.mark.parametrize("lonely", [1, 2])
def test_on_several_machines_there_are_none(lonely):
    """One process does not see the files of the others."""

    def seen(own: int, value: Any) -> Any:
        return f"{value}-elsewhere" if own == lonely and type(value) is str else value

    with connected(3, seen) as (_, ends):
        assert ends == [None] * 3


def test_many_processes_have_none(monkeypatch):
    monkeypatch.setattr(pipes, "MANY", 2)
    with connected(3) as (_, ends):
        assert ends == [None] * 3


def test_a_folder_with_too_long_a_name(monkeypatch, tmp_path):
    """A socket's name is limited to about a hundred characters."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with connected(2) as (_, ends):
        assert ends == [None, None]
    assert list(folder.iterdir()) == []


def test_no_file_is_left(monkeypatch, tmp_path):
    """However a process ends later."""
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        with connected(2) as (_, ends):
            assert None not in ends
            assert list(Path(short).iterdir()) == []


def _by_both_ways() -> list[tuple[bytes, bytes]]:
    """Sum by pipes and by gloo; `joined` makes the pipes."""
    assert ranks._pipes is not None
    torch.manual_seed(ranks.rank())
    found = []
    for shape in ((), (5,), (3, 7), (MOST // 8,), (MOST // 8 + 1,), (40, 40)):
        for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16):
            x = (
                (100 * torch.randn(shape))
                .to(dtype)
                .requires_grad_(dtype.is_floating_point)
            )
            before = x.detach().clone()
            ours = ranks.sum_over_ranks(x)
            assert torch.equal(x.detach(), before)
            assert not ours.requires_grad
            dist.all_reduce(before)
            both = ours, before
            assert ours.shape == before.shape
            assert ours.dtype == before.dtype
            found.append(
                tuple(
                    bytes(y.view(torch.uint8).numpy()) if y.dim() else y.item()
                    for y in both
                )
            )
    return found


def test_ranks_use_them_and_get_what_gloo_gives():
    """A sum of two numbers does not depend on the order."""
    first, second = together(2, joined_call, _by_both_ways)
    assert first == second, first
    assert len(first) == 24
    for ours, gloos in first:
        assert ours == gloos


def _without() -> tuple[bool, float]:
    return ranks._pipes is None, ranks.sum_over_ranks(torch.ones(3)).sum().item()


def _on_two_machines() -> tuple[bool, float]:
    pipes.Client = _no_such_file
    return joined_call(_without)


def _no_such_file(address: str) -> None:
    raise FileNotFoundError(address)


def test_ranks_do_without_them():
    assert together(2, _on_two_machines) == [(True, 6.0)] * 2


def _compiled() -> tuple[torch.Tensor, ...]:
    """A batch norm that sums over ranks, plain and with torch.compile."""
    assert ranks._pipes is not None
    torch.manual_seed(ranks.rank())
    rows = torch.randn(5 + ranks.rank(), 3)
    found = []
    for compiled in (False, True):
        norm = BatchNorm(3)
        if compiled:
            norm.compile(dynamic=True, backend="aot_eager")
        x = rows.clone().requires_grad_()
        y = norm(x)
        y.square().mul(torch.arange(3)).sum().backward()
        found += [y.detach(), x.grad, norm.running_var]
    return tuple(found)


def test_compiled_code_goes_through_them():
    for found in together(2, joined_call, _compiled):
        assert isinstance(found, tuple), found
        for eager, compiled in zip(found[:3], found[3:], strict=True):
            torch.testing.assert_close(eager, compiled)
