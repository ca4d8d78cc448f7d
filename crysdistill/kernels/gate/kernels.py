"""The gate of CGCNN compiled for the CPU: no tensor has a row for every edge.

Everything about an edge, z = a_i + b_j + W u(d), its norm, its gate and their
gradients, is computed in registers, sixteen channels at a time, from what stands in
memory per atom and per knot of the table; what forward has computed, backward computes
again. Arrays are flat, and channels come in blocks, so that one block's part of the
table stays in the cache:

- products: (N, C, 4, 16), of each atom the gate's and the core's product with the
  weights of the centre, then both with those of the neighbour;
- table: (C, 2 M, 2, 16), gate and core; see `GaussianTable`;
- norm: (C, 3, 2, 16), mean, scale and shift: y = (z - mean) scale + shift;
- sums: (C, 2, 2, 16) float64: of something, and of something times z - mean.

A task is one block of channels for the atoms of some whole crystals, a part of the
batch. No two tasks write to the same place, whichever threads they run on; sums and
gradients of tables have a place for each part.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from crysdistill.kernels.gate.lanes import (
    LANES,
    Vector,
    accumulate,
    exp_of_minus,
    fill,
    fma,
    load,
    log_of_one_plus,
    magnitude,
    store,
    where_less,
)
from crysdistill.kernels.gate.merged_edges import MergedEdges
from crysdistill.machine_code import machine_code

GATE, CORE = 0, LANES  # places in a pair of vectors
PAIR = 2 * LANES
SAMPLE = 16  # edges


@njit(forceinline=True)
def _z(
    own: Vector,
    products: np.ndarray,
    at: int,
    table: np.ndarray,
    row: int,
    weights: np.ndarray,
    e: int,
) -> Vector:
    """Return z of an edge, less what was taken from `own`."""
    z = own + load(products, at)
    z = fma(fill(weights[4 * e]), load(table, row), z)
    z = fma(fill(weights[4 * e + 1]), load(table, row + PAIR), z)
    z = fma(fill(weights[4 * e + 2]), load(table, row + 2 * PAIR), z)
    return fma(fill(weights[4 * e + 3]), load(table, row + 3 * PAIR), z)


@njit(forceinline=True)
def _add(array: np.ndarray, at: int, value: Vector) -> None:
    store(array, at, load(array, at) + value)


@njit(forceinline=True)
def _spread(
    array: np.ndarray, row: int, weights: np.ndarray, e: int, value: Vector
) -> None:
    """Add to four rows of the table what `_z` takes from them."""
    for k in range(4):
        at = row + k * PAIR
        store(array, at, fma(fill(weights[4 * e + k]), value, load(array, at)))


@machine_code
def sample(
    products: np.ndarray,
    tables: np.ndarray,
    edges: MergedEdges,
    pivots: np.ndarray,
) -> None:
    """Fill the mean of z over some edges, to have something near the mean of all."""
    blocks = len(tables)
    for block in range(blocks):
        table, pivot = tables[block], pivots[block]
        gate, core = fill(0.0), fill(0.0)
        atoms = len(edges.first) - 1
        seen = 0
        for k in range(SAMPLE):
            i = k * atoms // SAMPLE
            e = edges.first[i]
            if e == edges.first[i + 1]:
                continue
            own = (i * blocks + block) * 2 * PAIR
            at = (edges.neighbour[e] * blocks + block) * 2 * PAIR + PAIR
            row = edges.row[e] * PAIR
            gate = gate + _z(
                load(products, own), products, at, table, row, edges.weights, e
            )
            core = core + _z(
                load(products, own + CORE),
                products,
                at + CORE,
                table,
                row + CORE,
                edges.weights,
                e,
            )
            seen += 1
        share = fill(1.0 / max(seen, 1))
        store(pivot, GATE, gate * share)
        store(pivot, CORE, core * share)


@machine_code
def add_up(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    products: np.ndarray,
    tables: np.ndarray,
    edges: MergedEdges,
    pivots: np.ndarray,
    all_sums: np.ndarray,
) -> None:
    """Add z - pivot and its square, over all edges, to the sums."""
    blocks = len(tables)
    for task in range(turn, len(tasks), turns):
        part, begin, end, block = tasks[task]
        table, pivot = tables[block], pivots[block]
        sums = all_sums[part, block]
        gate_pivot, core_pivot = load(pivot, GATE), load(pivot, CORE)
        for i in range(begin, end):
            own = (i * blocks + block) * 2 * PAIR
            gate_own = load(products, own) - gate_pivot
            core_own = load(products, own + CORE) - core_pivot
            gate_sum, core_sum = fill(0.0), fill(0.0)
            gate_dot, core_dot = fill(0.0), fill(0.0)
            for e in range(edges.first[i], edges.first[i + 1]):
                at = (edges.neighbour[e] * blocks + block) * 2 * PAIR + PAIR
                row = edges.row[e] * PAIR
                gate = _z(gate_own, products, at, table, row, edges.weights, e)
                core = _z(
                    core_own, products, at + CORE, table, row + CORE, edges.weights, e
                )
                count = fill(edges.times[e])
                gate_sum = fma(gate, count, gate_sum)
                core_sum = fma(core, count, core_sum)
                gate_dot = fma(gate * count, gate, gate_dot)
                core_dot = fma(core * count, core, core_dot)
            accumulate(sums, GATE, gate_sum)
            accumulate(sums, CORE, core_sum)
            accumulate(sums, PAIR + GATE, gate_dot)
            accumulate(sums, PAIR + CORE, core_dot)


@machine_code
def send(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    products: np.ndarray,
    tables: np.ndarray,
    edges: MergedEdges,
    norms: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill the sums of messages, (N, C, 16): sigmoid(gate) softplus(core)."""
    blocks = len(tables)
    for task in range(turn, len(tasks), turns):
        begin, end, block = tasks[task, 1:]
        table, norm = tables[block], norms[block]
        gate_mean, core_mean = load(norm, GATE), load(norm, CORE)
        gate_scale, core_scale = load(norm, PAIR + GATE), load(norm, PAIR + CORE)
        gate_shift, core_shift = (
            load(norm, 2 * PAIR + GATE),
            load(norm, 2 * PAIR + CORE),
        )
        zero, one = fill(0.0), fill(1.0)
        for i in range(begin, end):
            own = (i * blocks + block) * 2 * PAIR
            gate_own = load(products, own) - gate_mean
            core_own = load(products, own + CORE) - core_mean
            total = zero
            for e in range(edges.first[i], edges.first[i + 1]):
                at = (edges.neighbour[e] * blocks + block) * 2 * PAIR + PAIR
                row = edges.row[e] * PAIR
                gate = _z(gate_own, products, at, table, row, edges.weights, e)
                core = _z(
                    core_own, products, at + CORE, table, row + CORE, edges.weights, e
                )
                gate = fma(gate, gate_scale, gate_shift)
                core = fma(core, core_scale, core_shift)
                x, y = exp_of_minus(magnitude(gate)), exp_of_minus(magnitude(core))
                sigmoid = where_less(gate, zero, x, one) / (one + x)
                softplus = where_less(zero, core, core, zero) + log_of_one_plus(y)
                total = fma(sigmoid * fill(edges.times[e]), softplus, total)
            store(out, (i * blocks + block) * LANES, total)


@machine_code
def pull(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    products: np.ndarray,
    tables: np.ndarray,
    edges: MergedEdges,
    norms: np.ndarray,
    d_out: np.ndarray,
    d_products: np.ndarray,
    d_tables: np.ndarray,
    all_sums: np.ndarray,
) -> None:
    """Fill gradients, as if mean and scale did not depend on z; `correct` mends that.

    Args:
        turn: which tasks to do: every `turns`-th from here.
        turns: how many share the tasks.
        tasks: (tasks, 4): part of the batch, its first atom, its last, and a block.
        products: of the atoms.
        tables: of the blocks.
        edges: all of them.
        norms: of the blocks.
        d_out: (N, C, 16), gradients of the sums of messages.
        d_products: what to fill.
        d_tables: what to add to, for each part; empty where not wanted.
        all_sums: what to add to, for each part: the gradient of y, and that times
            z - mean.
    """
    blocks = len(tables)
    for task in range(turn, len(tasks), turns):
        part, begin, end, block = tasks[task]
        table, norm = tables[block], norms[block]
        d_table = d_tables[part, block]
        sums = all_sums[part, block]
        gate_mean, core_mean = load(norm, GATE), load(norm, CORE)
        gate_scale, core_scale = load(norm, PAIR + GATE), load(norm, PAIR + CORE)
        gate_shift, core_shift = (
            load(norm, 2 * PAIR + GATE),
            load(norm, 2 * PAIR + CORE),
        )
        zero, one = fill(0.0), fill(1.0)
        for i in range(begin, end):
            for k in range(4):
                store(d_products, ((i * blocks + block) * 4 + k) * LANES, zero)
        for i in range(begin, end):
            own = (i * blocks + block) * 2 * PAIR
            gate_own = load(products, own) - gate_mean
            core_own = load(products, own + CORE) - core_mean
            gradient = load(d_out, (i * blocks + block) * LANES)
            gate_sum, core_sum = zero, zero
            gate_dot, core_dot = zero, zero
            for e in range(edges.first[i], edges.first[i + 1]):
                at = (edges.neighbour[e] * blocks + block) * 2 * PAIR + PAIR
                row = edges.row[e] * PAIR
                gate_z = _z(gate_own, products, at, table, row, edges.weights, e)
                core_z = _z(
                    core_own, products, at + CORE, table, row + CORE, edges.weights, e
                )
                gate = fma(gate_z, gate_scale, gate_shift)
                core = fma(core_z, core_scale, core_shift)
                x, y = exp_of_minus(magnitude(gate)), exp_of_minus(magnitude(core))
                # One division for both sigmoids.
                inverse = one / ((one + x) * (one + y))
                of_gate, of_core = inverse * (one + y), inverse * (one + x)
                sigmoid = where_less(gate, zero, x, one) * of_gate
                opposite = where_less(gate, zero, one, x) * of_gate  # 1 - sigmoid
                softplus = where_less(zero, core, core, zero) + log_of_one_plus(y)
                slope = where_less(core, zero, y, one) * of_core
                along = gradient * fill(edges.times[e]) * sigmoid
                d_gate = along * softplus * opposite
                d_core = along * slope
                gate_sum, core_sum = gate_sum + d_gate, core_sum + d_core
                gate_dot = fma(d_gate, gate_z, gate_dot)
                core_dot = fma(d_core, core_z, core_dot)
                d_gate, d_core = d_gate * gate_scale, d_core * core_scale
                _add(d_products, at, d_gate)
                _add(d_products, at + CORE, d_core)
                if len(d_table) > 0:
                    _spread(d_table, row, edges.weights, e, d_gate)
                    _spread(d_table, row + CORE, edges.weights, e, d_core)
            _add(d_products, own, gate_sum * gate_scale)
            _add(d_products, own + CORE, core_sum * core_scale)
            accumulate(sums, GATE, gate_sum)
            accumulate(sums, CORE, core_sum)
            accumulate(sums, PAIR + GATE, gate_dot)
            accumulate(sums, PAIR + CORE, core_dot)


@machine_code
def correct(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    products: np.ndarray,
    tables: np.ndarray,
    edges: MergedEdges,
    lines: np.ndarray,
    d_products: np.ndarray,
    d_tables: np.ndarray,
) -> None:
    """Add to the gradients what z does to the mean and the variance of all edges.

    That is a straight line in z: (z - mean) slope + offset, with mean, slope and
    offset in `line`.
    """
    blocks = len(tables)
    for task in range(turn, len(tasks), turns):
        part, begin, end, block = tasks[task]
        table, line = tables[block], lines[block]
        d_table = d_tables[part, block]
        gate_mean, core_mean = load(line, GATE), load(line, CORE)
        gate_slope, core_slope = load(line, PAIR + GATE), load(line, PAIR + CORE)
        gate_offset, core_offset = (
            load(line, 2 * PAIR + GATE),
            load(line, 2 * PAIR + CORE),
        )
        for i in range(begin, end):
            own = (i * blocks + block) * 2 * PAIR
            gate_own = load(products, own) - gate_mean
            core_own = load(products, own + CORE) - core_mean
            gate_sum, core_sum = fill(0.0), fill(0.0)
            for e in range(edges.first[i], edges.first[i + 1]):
                at = (edges.neighbour[e] * blocks + block) * 2 * PAIR + PAIR
                row = edges.row[e] * PAIR
                gate = _z(gate_own, products, at, table, row, edges.weights, e)
                core = _z(
                    core_own, products, at + CORE, table, row + CORE, edges.weights, e
                )
                count = fill(edges.times[e])
                gate = fma(gate, gate_slope, gate_offset) * count
                core = fma(core, core_slope, core_offset) * count
                gate_sum, core_sum = gate_sum + gate, core_sum + core
                _add(d_products, at, gate)
                _add(d_products, at + CORE, core)
                if len(d_table) > 0:
                    _spread(d_table, row, edges.weights, e, gate)
                    _spread(d_table, row + CORE, edges.weights, e, core)
            _add(d_products, own, gate_sum)
            _add(d_products, own + CORE, core_sum)
