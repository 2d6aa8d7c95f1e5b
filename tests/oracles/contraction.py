"""Matrices that cores represent, one matrix at a time, in another order than the product contracts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def mpo_matrix(cores: Sequence[Array]) -> Array:
    """M[i_1..i_K, j_1..j_K] = C_1[i_1, j_1] ... C_K[i_K, j_K], from the right end to the left.

    Args:
        cores: Core k has shape (R_k, m_k, n_k, R_{k+1}); R_1 = R_{K+1} = 1.

    Returns:
        Shape (prod m_k, prod n_k).
    Source: Oseledets 2011, doi:10.1137/090752286.
    """
    matrix: Array = mpo_right_part(cores)[0]
    return matrix


def mpo_right_part(cores: Sequence[Array]) -> Array:
    """Contraction of the last cores, (R_k, rows, columns); the first mode is the slowest in rows and columns."""
    state: Array = np.ones((1, 1, 1))
    for core in reversed(cores):
        bond, m, n, _ = core.shape
        grown = np.einsum("aijb,bkl->aikjl", core, state, optimize=True)
        state = grown.reshape(bond, m * state.shape[1], n * state.shape[2])
    return state


def mpo_left_part(cores: Sequence[Array]) -> Array:
    """Contraction of the first cores, (rows, columns, R_{k+1}), from the right as well."""
    state: Array = np.eye(cores[-1].shape[3])[:, None, None, :]
    for core in reversed(cores):
        grown = np.einsum("aijb,bklc->aikjlc", core, state, optimize=True)
        bond, m, rows, n, columns, last = grown.shape
        state = grown.reshape(bond, m * rows, n * columns, last)
    part: Array = state[0]
    return part


def svd_matrix(cores: Sequence[Array]) -> Array:
    """M = sum_i s_i u_i v_i^T, from U (m, k), s (1, k), V (k, n)."""
    u, s, v = cores
    matrix: Array = np.einsum("ai,bi,ij->aj", u, s, v, optimize=["einsum_path", (1, 2), (0, 1)])
    return matrix


def chain_matrix(cores: Sequence[Array]) -> Array:
    """M = U_1 (U_2 (... U_K)), from the right end to the left."""
    *rest, state = cores
    for core in reversed(rest):
        state = np.einsum("ab,bc->ac", core, state, optimize=True)
    return state


def eigen_matrix(cores: Sequence[Array]) -> Array:
    """M = U Z V^T, from the blocks of U, Z (m, n) and the blocks of V."""
    rows, centre, columns = cores
    return _times_blocks(_times_blocks(centre.T, rows).T, columns)  # a dense V of a vocabulary's side would not fit


def _times_blocks(x: Array, blocks: Array) -> Array:
    """X V^T for a block-diagonal V, one block of columns after the other."""
    ends = np.cumsum(block_lengths(blocks, x.shape[1]))
    parts = zip(np.split(x, ends[:-1], axis=1), blocks, strict=True)
    return np.concatenate([part @ block[: part.shape[1], : part.shape[1]].T for part, block in parts], axis=1)


def block_lengths(blocks: Array, length: int) -> list[int]:
    """Rows of each block that count: what is missing to count * size is missing at the end of the last blocks."""
    count, size, _ = blocks.shape
    return [size if k < length - count * (size - 1) else size - 1 for k in range(count)]


def block_diagonal(blocks: Array, length: int) -> Array:
    """A dense matrix from its diagonal blocks (count, size, size), of which the last ones may lack a row and column.

    Args:
        blocks: As they are kept, each with `size` rows.
        length: Rows of the dense matrix.
    """
    dense, at = np.zeros((length, length), blocks.dtype), 0
    for here, block in zip(block_lengths(blocks, length), blocks, strict=True):
        dense[at : at + here, at : at + here] = block[:here, :here]
        at += here
    assert at == length
    return dense
