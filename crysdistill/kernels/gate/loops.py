"""The gate of CGCNN in compiled loops for the CPU: no tensor has a row for every edge.

Everything about an edge, z = own_i + other_j + W u(d), its norm, its gate and their
gradients, is computed in a few short rows that stay in the nearest cache, from what
stands in memory per atom and per knot of the table; what forward has computed,
backward computes again. Gate and core stand side by side in rows of 2 F:

- products: (N, 2, 2 F), of each atom `own` and then `other`;
- table: (2 M, 2 F); see `GaussianTable`;
- norm: (3, 2 F), mean, scale and shift: y = (z - mean) scale + shift.

A task is the atoms of some whole crystals: first and last. No two tasks write to the
same place, whichever threads they run on; sums and gradients of tables have a place
for each task.

The inner loops run over channels, and each touches few rows: LLVM makes vectors of a
loop only where it need not compare more than eight pairs of addresses, where nothing
can raise, and where no function of a library is called.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit

from crysdistill.kernels.gate.merged_edges import MergedEdges
from crysdistill.machine_code import machine_code

# a b + c may be one step, and what is divided by zero is infinite. NaN stays NaN.
looped = partial(machine_code, fastmath={"contract"}, error_model="numpy")
inlined = njit(forceinline=True, fastmath={"contract"}, error_model="numpy")

ZERO, ONE = np.float32(0), np.float32(1)
LARGEST = np.float32(87.3)
MAGIC = np.float32(12582912)  # 1.5 x 2^23: what is added to it is rounded
STEPS = np.float32(-1.4426950408889634)  # -1 / ln(2)
# ln(2) as two numbers: n times the first is exact.
LN2, REST = np.float32(-0.693359375), np.float32(2.12194440e-4)


@inlined
def exp_of_minus(a: float) -> float:
    """Return exp(-a) for a >= 0, to 1e-7 of itself; 1.2e-38 from a = 87.3 on.

    exp(-a) = 2^n exp(r) with r between -ln(2)/2 and ln(2)/2, and exp(r) by a
    polynomial of degree 6. NaN stays NaN.
    """
    a = LARGEST if LARGEST < a else a
    shifted = np.float32(a * STEPS + MAGIC)
    n = shifted - MAGIC
    r = n * REST + (n * LN2 - a)
    p = np.float32(0.00138427)
    p = p * r + np.float32(0.00837497)
    p = p * r + np.float32(0.04166806)
    p = p * r + np.float32(0.16666422)
    p = p * r + np.float32(0.49999994)
    p = (p * r + ONE) * r + ONE
    # The lowest bits of `shifted` are those of n; here they become the exponent.
    return p * np.int32((shifted.view(np.int32) << 23) + (127 << 23)).view(np.float32)


@inlined
def log_of_one_plus(y: float) -> float:
    """Return log(1 + y) for y from 0 to 1, to 1e-7 of itself.

    log(1 + y) / y by a polynomial of degree 8. NaN stays NaN.
    """
    p = np.float32(0.005232623778283596)
    p = p * y + np.float32(-0.029504956677556038)
    p = p * y + np.float32(0.07822549343109131)
    p = p * y + np.float32(-0.1366320699453354)
    p = p * y + np.float32(0.1910598874092102)
    p = p * y + np.float32(-0.2484297752380371)
    p = p * y + np.float32(0.3331909477710724)
    p = p * y + np.float32(-0.4999949336051941)
    p = p * y + np.float32(0.9999999403953552)
    return p * y


@inlined
def _fill_z(
    z: np.ndarray,
    own: np.ndarray,
    other: np.ndarray,
    table: np.ndarray,
    row: int,
    w: np.ndarray,
) -> None:
    """Fill z of an edge, less what was taken from `own`."""
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    t0, t1, t2, t3 = table[row], table[row + 1], table[row + 2], table[row + 3]
    for c in range(len(z)):
        t = w0 * t0[c] + w1 * t1[c] + w2 * t2[c] + w3 * t3[c]
        z[c] = own[c] + other[c] + t


@inlined
def _spread(d_table: np.ndarray, row: int, w: np.ndarray, d: np.ndarray) -> None:
    """Add to four rows of the table's gradient what `_fill_z` takes from them."""
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    t0, t1 = d_table[row], d_table[row + 1]
    t2, t3 = d_table[row + 2], d_table[row + 3]
    for c in range(len(d)):
        t0[c] += w0 * d[c]
        t1[c] += w1 * d[c]
    for c in range(len(d)):
        t2[c] += w2 * d[c]
        t3[c] += w3 * d[c]


@inlined
def _subtract(out: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    for c in range(len(out)):
        out[c] = a[c] - b[c]


@inlined
def _add(out: np.ndarray, a: np.ndarray) -> None:
    for c in range(len(out)):
        out[c] += a[c]


@looped
def add_up(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    products: np.ndarray,
    table: np.ndarray,
    edges: MergedEdges,
    pivot: np.ndarray,
    all_sums: np.ndarray,
) -> None:
    """Add z - pivot and its square, over all edges, to sums of each task, (2, 2 F)."""
    short = np.empty((4, len(pivot)), np.float32)
    own, z, total, squares = short[0], short[1], short[2], short[3]
    for task in range(turn, len(tasks), turns):
        for i in range(tasks[task, 0], tasks[task, 1]):
            _subtract(own, products[i, 0], pivot)
            total[:] = ZERO
            squares[:] = ZERO
            for e in range(edges.first[i], edges.first[i + 1]):
                other = products[edges.neighbour[e], 1]
                _fill_z(z, own, other, table, edges.row[e], edges.weights[e])
                times = edges.times[e]
                for c in range(len(z)):
                    total[c] += times * z[c]
                    squares[c] += times * z[c] * z[c]
            _add(all_sums[task, 0], total)
            _add(all_sums[task, 1], squares)


@looped
def send(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    products: np.ndarray,
    table: np.ndarray,
    edges: MergedEdges,
    norm: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill the sums of messages, (N, F): sigmoid(gate) softplus(core)."""
    width = out.shape[1]
    mean, scale, shift = norm[0], norm[1], norm[2]
    gate_scale, core_scale = scale[:width], scale[width:]
    gate_shift, core_shift = shift[:width], shift[width:]
    short = np.empty((2, 2 * width), np.float32)
    own, z = short[0], short[1]
    gate_z, core_z = z[:width], z[width:]
    for task in range(turn, len(tasks), turns):
        for i in range(tasks[task, 0], tasks[task, 1]):
            total = out[i]
            total[:] = ZERO
            _subtract(own, products[i, 0], mean)
            for e in range(edges.first[i], edges.first[i + 1]):
                other = products[edges.neighbour[e], 1]
                _fill_z(z, own, other, table, edges.row[e], edges.weights[e])
                times = edges.times[e]
                for c in range(width):
                    gate = gate_z[c] * gate_scale[c] + gate_shift[c]
                    core = core_z[c] * core_scale[c] + core_shift[c]
                    x, y = exp_of_minus(abs(gate)), exp_of_minus(abs(core))
                    sigmoid = (x if gate < ZERO else ONE) / (ONE + x)
                    softplus = (core if ZERO < core else ZERO) + log_of_one_plus(y)
                    total[c] += sigmoid * times * softplus


@looped
def pull(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    products: np.ndarray,
    table: np.ndarray,
    edges: MergedEdges,
    norm: np.ndarray,
    d_out: np.ndarray,
    d_products: np.ndarray,
    d_tables: np.ndarray,
    all_sums: np.ndarray,
) -> None:
    """Fill gradients, as if mean and scale did not depend on z; `correct` mends that.

    Args:
        turn: which tasks to do: every `turns`-th from here.
        turns: how many share the tasks.
        tasks: (tasks, 2): the first atom of each, and the one behind its last.
        products: of the atoms.
        table: of the knots that are used.
        edges: all of them.
        norm: of gate and core.
        d_out: (N, F), gradients of the sums of messages.
        d_products: what to fill.
        d_tables: what to add to, for each task; empty where not wanted.
        all_sums: what to add to, for each task, (2, 2 F): the gradient of y, and that
            times z - mean.
    """
    width = d_out.shape[1]
    mean, scale, shift = norm[0], norm[1], norm[2]
    short = np.empty((6, 2 * width), np.float32)
    own, z, d, x = short[0], short[1], short[2], short[3]
    total, dots = short[4], short[5]
    gates, cores, x_gate, x_core = d[:width], d[width:], x[:width], x[width:]
    for task in range(turn, len(tasks), turns):
        begin, end = tasks[task, 0], tasks[task, 1]
        d_table = d_tables[task]
        d_products[begin:end] = ZERO
        for i in range(begin, end):
            gradient = d_out[i]
            _subtract(own, products[i, 0], mean)
            total[:] = ZERO
            dots[:] = ZERO
            for e in range(edges.first[i], edges.first[i + 1]):
                j, row, w = edges.neighbour[e], edges.row[e], edges.weights[e]
                _fill_z(z, own, products[j, 1], table, row, w)
                for c in range(len(z)):
                    d[c] = z[c] * scale[c] + shift[c]
                    x[c] = exp_of_minus(abs(d[c]))
                times = edges.times[e]
                for c in range(width):  # y becomes its gradient
                    gate, core = gates[c], cores[c]
                    a, b = ONE + x_gate[c], ONE + x_core[c]
                    inverse = ONE / (a * b)  # one division for both sigmoids
                    of_gate, of_core = inverse * b, inverse * a
                    sigmoid = (x_gate[c] if gate < ZERO else ONE) * of_gate
                    opposite = (ONE if gate < ZERO else x_gate[c]) * of_gate
                    softplus = core if ZERO < core else ZERO
                    softplus += log_of_one_plus(x_core[c])
                    slope = (x_core[c] if core < ZERO else ONE) * of_core
                    along = gradient[c] * times * sigmoid
                    gates[c] = along * softplus * opposite
                    cores[c] = along * slope
                for c in range(len(d)):
                    total[c] += d[c]
                    dots[c] += d[c] * z[c]
                d_other = d_products[j, 1]
                for c in range(len(d)):
                    d[c] *= scale[c]
                    d_other[c] += d[c]
                if len(d_table) > 0:
                    _spread(d_table, row, w, d)
            _add(all_sums[task, 0], total)
            _add(all_sums[task, 1], dots)
            d_own = d_products[i, 0]
            for c in range(len(d)):
                d_own[c] = total[c] * scale[c]


@looped
def correct(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    products: np.ndarray,
    table: np.ndarray,
    edges: MergedEdges,
    line: np.ndarray,
    d_products: np.ndarray,
    d_tables: np.ndarray,
) -> None:
    """Add to the gradients what z does to the mean and the variance of all edges.

    That is a straight line in z: (z - mean) slope + offset, with mean, slope and
    offset in `line`, (3, 2 F).
    """
    mean, slope, offset = line[0], line[1], line[2]
    short = np.empty((3, len(mean)), np.float32)
    own, d, d_own = short[0], short[1], short[2]
    for task in range(turn, len(tasks), turns):
        d_table = d_tables[task]
        for i in range(tasks[task, 0], tasks[task, 1]):
            _subtract(own, products[i, 0], mean)
            d_own[:] = ZERO
            for e in range(edges.first[i], edges.first[i + 1]):
                j, row, w = edges.neighbour[e], edges.row[e], edges.weights[e]
                _fill_z(d, own, products[j, 1], table, row, w)
                times, d_other = edges.times[e], d_products[j, 1]
                for c in range(len(d)):
                    d[c] = (d[c] * slope[c] + offset[c]) * times
                    d_own[c] += d[c]
                for c in range(len(d)):
                    d_other[c] += d[c]
                if len(d_table) > 0:
                    _spread(d_table, row, w, d)
            _add(d_products[i, 0], d_own)
