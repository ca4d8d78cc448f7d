"""The gate of CGCNN in compiled loops for the CPU: no tensor has a row for every edge.

The numbers of an edge, z = own_i + other_j + W u(d), its norm, its gate and their
gradients, are computed in a few short rows that stay in the nearest cache. Memory holds
only numbers per atom and per knot of the table, and backward computes the results of
forward again. Gate and core stand side by side in rows of 2 F:

- products: (N, 2, 2 F), of each atom `own` and then `other`;
- table: (2 M, 2 F); see `GaussianTable`;
- norm: (3, 2 F), mean, scale and shift: y = (z - mean) scale + shift.

Each function works on some crystals, from `begin` to `end`, and writes only to their
atoms; sums and gradients of the table have a place for each call. W u(d) is read from
the table once for each length of a crystal.

The inner loops run over channels, and each touches few rows. LLVM vectorises a loop
only if it need not compare more than eight pairs of addresses, if nothing can raise,
and if it calls no library function.
"""

from __future__ import annotations

import numpy as np

from crysdistill.kernels.gate.merged_edges import MergedEdges
from crysdistill.kernels.softplus import (
    ONE,
    ZERO,
    exp_of_minus,
    inlined,
    log_of_one_plus,
    looped,
)


@inlined
def _room(edges: MergedEdges, width: int) -> np.ndarray:
    """Return an array with a row for each length of any crystal."""
    most = 0
    for b in range(len(edges.atoms) - 1):
        most = max(most, edges.lengths[b + 1] - edges.lengths[b])
    return np.empty((most, width), np.float32)


@inlined
def _look_up(out: np.ndarray, table: np.ndarray, edges: MergedEdges, b: int) -> None:
    """Fill W u(d) for each length of a crystal."""
    for k in range(edges.lengths[b], edges.lengths[b + 1]):
        row, w, t = edges.row[k], edges.weights[k], out[k - edges.lengths[b]]
        w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
        t0, t1, t2, t3 = table[row], table[row + 1], table[row + 2], table[row + 3]
        for c in range(len(t)):
            t[c] = w0 * t0[c] + w1 * t1[c] + w2 * t2[c] + w3 * t3[c]


@inlined
def _spread(d: np.ndarray, d_table: np.ndarray, edges: MergedEdges, b: int) -> None:
    """Add to the table's gradient; this is the reverse of `_look_up`."""
    for k in range(edges.lengths[b], edges.lengths[b + 1]):
        row, w, d_t = edges.row[k], edges.weights[k], d[k - edges.lengths[b]]
        for m in range(4):
            d_row, weight = d_table[row + m], w[m]
            for c in range(len(d_t)):
                d_row[c] += weight * d_t[c]


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
    begin: int,
    end: int,
    sums: np.ndarray,
    products: np.ndarray,
    table: np.ndarray,
    edges: MergedEdges,
    pivot: np.ndarray,
) -> None:
    """Add z - pivot and its square, over all edges, to sums, (2, 2 F)."""
    short = np.empty((4, len(pivot)), np.float32)
    own, z, total, squares = short[0], short[1], short[2], short[3]
    along = _room(edges, len(pivot))
    for b in range(begin, end):
        _look_up(along, table, edges, b)
        for i in range(edges.atoms[b], edges.atoms[b + 1]):
            _subtract(own, products[i, 0], pivot)
            total[:] = ZERO
            squares[:] = ZERO
            for e in range(edges.first[i], edges.first[i + 1]):
                other, t = products[edges.neighbour[e], 1], along[edges.length[e]]
                times = edges.times[e]
                for c in range(len(z)):
                    z[c] = own[c] + other[c] + t[c]
                for c in range(len(z)):
                    total[c] += times * z[c]
                    squares[c] += times * z[c] * z[c]
            _add(sums[0], total)
            _add(sums[1], squares)


@looped
def send(
    begin: int,
    end: int,
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
    along = _room(edges, 2 * width)
    for b in range(begin, end):
        _look_up(along, table, edges, b)
        for i in range(edges.atoms[b], edges.atoms[b + 1]):
            total = out[i]
            total[:] = ZERO
            _subtract(own, products[i, 0], mean)
            for e in range(edges.first[i], edges.first[i + 1]):
                other, t = products[edges.neighbour[e], 1], along[edges.length[e]]
                times = edges.times[e]
                for c in range(len(z)):
                    z[c] = own[c] + other[c] + t[c]
                for c in range(width):
                    gate = gate_z[c] * gate_scale[c] + gate_shift[c]
                    core = core_z[c] * core_scale[c] + core_shift[c]
                    x, y = exp_of_minus(abs(gate)), exp_of_minus(abs(core))
                    sigmoid = (x if gate < ZERO else ONE) / (ONE + x)
                    softplus = (core if core > ZERO else ZERO) + log_of_one_plus(y)
                    total[c] += sigmoid * times * softplus


@looped
def pull(
    begin: int,
    end: int,
    d_table: np.ndarray,
    sums: np.ndarray,
    products: np.ndarray,
    table: np.ndarray,
    edges: MergedEdges,
    norm: np.ndarray,
    d_out: np.ndarray,
    d_products: np.ndarray,
) -> None:
    """Fill gradients as if mean and scale did not depend on z; `correct` adds the rest.

    Args:
        begin: the first crystal.
        end: the crystal after the last.
        d_table: the gradient of the table to add to; empty if not needed.
        sums: sums to add to, (2, 2 F): the gradient of y, and that times z - mean.
        products: the products of the atoms.
        table: the table at the knots that are used.
        edges: all edges.
        norm: mean, scale and shift of gate and core.
        d_out: (N, F), gradients of the sums of messages.
        d_products: the gradients of the products to fill.
    """
    width = d_out.shape[1]
    mean, scale, shift = norm[0], norm[1], norm[2]
    short = np.empty((6, 2 * width), np.float32)
    own, z, d, x = short[0], short[1], short[2], short[3]
    total, dots = short[4], short[5]
    gates, cores, x_gate, x_core = d[:width], d[width:], x[:width], x[width:]
    along, d_along = _room(edges, 2 * width), _room(edges, 2 * width)
    for b in range(begin, end):
        _look_up(along, table, edges, b)
        d_along[:] = ZERO
        d_products[edges.atoms[b] : edges.atoms[b + 1]] = ZERO
        for i in range(edges.atoms[b], edges.atoms[b + 1]):
            gradient = d_out[i]
            _subtract(own, products[i, 0], mean)
            total[:] = ZERO
            dots[:] = ZERO
            for e in range(edges.first[i], edges.first[i + 1]):
                j, k, times = edges.neighbour[e], edges.length[e], edges.times[e]
                other, t = products[j, 1], along[k]
                d_other, d_t = d_products[j, 1], d_along[k]
                for c in range(len(z)):
                    z[c] = own[c] + other[c] + t[c]
                for c in range(len(z)):
                    d[c] = z[c] * scale[c] + shift[c]
                    x[c] = exp_of_minus(abs(d[c]))
                for c in range(width):  # y becomes its gradient
                    gate, core = gates[c], cores[c]
                    p, q = ONE + x_gate[c], ONE + x_core[c]
                    inverse = ONE / (p * q)  # one division for both sigmoids
                    of_gate, of_core = inverse * q, inverse * p
                    sigmoid = (x_gate[c] if gate < ZERO else ONE) * of_gate
                    opposite = (ONE if gate < ZERO else x_gate[c]) * of_gate
                    softplus = core if core > ZERO else ZERO
                    softplus += log_of_one_plus(x_core[c])
                    slope = (x_core[c] if core < ZERO else ONE) * of_core
                    share = gradient[c] * times * sigmoid
                    gates[c] = share * softplus * opposite
                    cores[c] = share * slope
                for c in range(len(d)):
                    total[c] += d[c]
                    dots[c] += d[c] * z[c]
                for c in range(len(d)):
                    d[c] *= scale[c]
                    d_other[c] += d[c]
                    d_t[c] += d[c]
            _add(sums[0], total)
            _add(sums[1], dots)
            d_own = d_products[i, 0]
            for c in range(len(d)):
                d_own[c] = total[c] * scale[c]
        if len(d_table) > 0:
            _spread(d_along, d_table, edges, b)


@looped
def correct(
    begin: int,
    end: int,
    d_table: np.ndarray,
    products: np.ndarray,
    table: np.ndarray,
    edges: MergedEdges,
    line: np.ndarray,
    d_products: np.ndarray,
) -> None:
    """Add the gradients through the mean and the variance of all edges.

    They are linear in z: (z - mean) slope + offset, with mean, slope and offset in
    `line`, (3, 2 F).
    """
    mean, slope, offset = line[0], line[1], line[2]
    short = np.empty((3, len(mean)), np.float32)
    own, d, d_own = short[0], short[1], short[2]
    along, d_along = _room(edges, len(mean)), _room(edges, len(mean))
    for b in range(begin, end):
        _look_up(along, table, edges, b)
        d_along[:] = ZERO
        for i in range(edges.atoms[b], edges.atoms[b + 1]):
            _subtract(own, products[i, 0], mean)
            d_own[:] = ZERO
            for e in range(edges.first[i], edges.first[i + 1]):
                j, k, times = edges.neighbour[e], edges.length[e], edges.times[e]
                other, t = products[j, 1], along[k]
                d_other, d_t = d_products[j, 1], d_along[k]
                for c in range(len(d)):
                    d[c] = (own[c] + other[c] + t[c]) * slope[c] + offset[c]
                for c in range(len(d)):
                    d_own[c] += times * d[c]
                    d_other[c] += times * d[c]
                    d_t[c] += times * d[c]
            _add(d_products[i, 0], d_own)
        if len(d_table) > 0:
            _spread(d_along, d_table, edges, b)
