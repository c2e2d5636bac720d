"""The kernels of attention over a short context; ``cross_attention.py`` launches them.

Keys and values of a head stay on chip, in parts of M1 and M2 rows as the head is in parts of D1 and D2 columns
(``head_tiles.py``): one pass over the queries, and no online softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .head_tiles import add_product, dot_heads, head_start, load_head, masked_scores, store_head, zeros


@triton.jit
def cross_attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    N,
    M,
    H,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    scale,
    queries,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    BQ: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
):
    """q [B, N, H, D], k and v [B, M, H, D] by strides, o [B, N, H, D], lse [B, H, N] in base 2 or None.

    A program: ``queries`` queries of one head, BQ at a time. ``scale`` counts in base 2 and is positive. The keys are
    parts of M1 and M2 rows; the first is full if there is a second. EVEN: N is a multiple of BQ.
    """
    # Which queries of which head.
    chunks = tl.cdiv(N, queries)
    first_query, head = tl.program_id(0) % chunks * queries, tl.program_id(0) // chunks
    b, h = head // H, head % H
    row, key = tl.arange(0, BQ), tl.arange(0, M1)
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN)
    k_ptr = head_start(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = head_start(v_ptr, b, h, v_b, v_h, ALIGN)

    # Load all keys and values, once for all queries. k1 and k2 are the first part of the keys in its two parts of the
    # head, k3 and k4 the second part of the keys.
    k1, k2 = load_head(k_ptr, key, k_n, M, D, D1, D2, M2 > 0)
    v1, v2 = load_head(v_ptr, key, v_n, M, D, D1, D2, M2 > 0)
    if M2 > 0:
        key = M1 + tl.arange(0, M2)
        k3, k4 = load_head(k_ptr, key, k_n, M, D, D1, D2, False)
        v3, v4 = load_head(v_ptr, key, v_n, M, D, D1, D2, False)

    for start in range(first_query, min(N, first_query + queries), BQ):
        # Load queries.
        q1, q2 = load_head(q_ptr + tl.cast(start, tl.int64) * q_n, row, q_n, N - start, D, D1, D2, EVEN)

        # Scores of all keys, and their maximum. As scale is positive, it may be scaled in place of them.
        p1 = masked_scores(q1, q2, k1, k2, M, D2, M1, M2 > 0)
        top = tl.max(p1, 1)
        if M2 > 0:
            p2 = masked_scores(q1, q2, k3, k4, M - M1, D2, M2, False)
            top = tl.maximum(top, tl.max(p2, 1))
        top *= scale

        # Softmax and values, part by part of the keys.
        p1 = tl.exp2(p1 * scale - top[:, None])
        total = tl.sum(p1, 1)
        o1, o2 = zeros(BQ, D1, D2)
        o1, o2 = add_product(o1, o2, p1, v1, v2, D2)
        if M2 > 0:
            p2 = tl.exp2(p2 * scale - top[:, None])
            total += tl.sum(p2, 1)
            o1, o2 = add_product(o1, o2, p2, v3, v4, D2)

        # Store, divided by the sum only now; and, if wanted, the log-sum-exp, from which backward has p again.
        result = ((b.to(tl.int64) * N + start) * H + h) * D
        share = (1.0 / total)[:, None]  # one division a row
        store_head(o_ptr + result, o1 * share, o2 * share, row, H * D, N - start, D, D1, D2)
        if lse_ptr is not None:
            tl.store(lse_ptr + head.to(tl.int64) * N + start + row, top + tl.log2(total), mask=row < N - start)


@triton.jit
def cross_attention_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    N,
    M,
    H,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    do_b,
    do_n,
    do_h,
    scale2,
    scale,
    queries,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    KEYS: tl.constexpr,
    BQ: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """As the forward kernel, and do by strides, dq [B, N, H, D], dk and dv [chunks, B, M, H, D], one chunk a program.

    KEYS is M padded to a power of two, EVEN says that nothing is padded; ``scale2`` is ``scale`` times log2(e). Keys,
    values and the sums of their gradients stay on chip. delta = sum(p dp) is taken over the keys and divided by sum(p),
    so that the rounding of lse does not keep ds from adding up to 0.
    """
    # Which chunk of queries of which head.
    chunks = tl.cdiv(N, queries)
    chunk, head = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = head // H, head % H
    row, key = tl.arange(0, BQ), tl.arange(0, KEYS)
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN)
    do_ptr = head_start(do_ptr, b, h, do_b, do_h, ALIGN)

    # Load all keys and values, once for all queries.
    k1, k2 = load_head(head_start(k_ptr, b, h, k_b, k_h, ALIGN), key, k_n, M, D, D1, D2, EVEN)
    v1, v2 = load_head(head_start(v_ptr, b, h, v_b, v_h, ALIGN), key, v_n, M, D, D1, D2, EVEN)
    dk1, dk2 = zeros(KEYS, D1, D2)
    dv1, dv2 = zeros(KEYS, D1, D2)

    for start in range(chunk * queries, min(N, (chunk + 1) * queries), BQ):
        # Load queries. Rows beyond the last add nothing: their queries and their do are 0.
        q1, q2 = load_head(q_ptr + tl.cast(start, tl.int64) * q_n, row, q_n, N - start, D, D1, D2, False)
        do1, do2 = load_head(do_ptr + tl.cast(start, tl.int64) * do_n, row, do_n, N - start, D, D1, D2, False)
        lse = tl.load(lse_ptr + head.to(tl.int64) * N + start + row, mask=row < N - start, other=0.0)

        # Probabilities.
        p = tl.exp2(masked_scores(q1, q2, k1, k2, M, D2, KEYS, EVEN) * scale2 - lse[:, None])

        # Gradient of the scores.
        dp = dot_heads(do1, do2, v1, v2, D2)
        delta = tl.sum(p * dp, 1) / tl.sum(p, 1)
        ds = (p * (dp - delta[:, None])).to(q1.dtype)

        # Gradients of values and keys add up over the queries.
        dv1, dv2 = add_product(dv1, dv2, tl.trans(p.to(q1.dtype)), do1, do2, D2)
        dk1, dk2 = add_product(dk1, dk2, tl.trans(ds), q1, q2, D2)

        # Gradient of these queries, complete: all keys are here. Store.
        dq1, dq2 = zeros(BQ, D1, D2)
        dq1, dq2 = add_product(dq1, dq2, ds, k1, k2, D2)
        result = ((b.to(tl.int64) * N + start) * H + h) * D
        store_head(dq_ptr + result, dq1 * scale, dq2 * scale, row, H * D, N - start, D, D1, D2)

    # Store keys' and values' gradients, each chunk in a place of its own: the order of the sum is always the same.
    batch = tl.num_programs(0) // (chunks * H)
    result = ((chunk.to(tl.int64) * batch + b) * M * H + h) * D
    store_head(dk_ptr + result, dk1 * scale, dk2 * scale, key, H * D, M, D, D1, D2)
    store_head(dv_ptr + result, dv1, dv2, key, H * D, M, D, D1, D2)


@triton.jit
def store_columns(ptr, values, rows, columns, N, M):
    """Store values [rows, columns] into a matrix [N, M]."""
    # Offsets are int64: N M may be more than int32 counts.
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    tl.store(ptr + rows[:, None].to(tl.int64) * M + columns[None, :], values, mask=inside)


@triton.jit
def cross_attention_probabilities_forward_kernel(
    q_ptr,
    k_ptr,
    probs_ptr,
    N,
    M,
    H,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    BQ: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """As above, and probs [B, N, M] float32, the mean over heads. A program: BQ queries of all heads."""
    # Which queries of which sample; the mean over heads stays on chip.
    blocks = tl.cdiv(N, BQ)
    start, b = tl.program_id(0) % blocks * BQ, tl.program_id(0) // blocks
    row, key = start + tl.arange(0, BQ), tl.arange(0, M1)
    mean1 = tl.zeros([BQ, M1], tl.float32)
    if M2 > 0:
        key2 = M1 + tl.arange(0, M2)
        mean2 = tl.zeros([BQ, M2], tl.float32)

    for h in range(H):
        # Load the head's queries, and the first part of its keys.
        q1, q2 = load_head(head_start(q_ptr, b, h, q_b, q_h, ALIGN), row.to(tl.int64), q_n, N, D, D1, D2, False)
        start_k = head_start(k_ptr, b, h, k_b, k_h, ALIGN)
        k1, k2 = load_head(start_k, key, k_n, M, D, D1, D2, M2 > 0)

        # Scores and their maximum; the second part of the keys is loaded only when the first is done with.
        p1 = masked_scores(q1, q2, k1, k2, M, D2, M1, M2 > 0)
        top = tl.max(p1, 1)
        if M2 > 0:
            k3, k4 = load_head(start_k, key2, k_n, M, D, D1, D2, False)
            p2 = masked_scores(q1, q2, k3, k4, M - M1, D2, M2, False)
            top = tl.maximum(top, tl.max(p2, 1))
        top *= scale

        # Softmax, as a share of the mean.
        p1 = tl.exp2(p1 * scale - top[:, None])
        total = tl.sum(p1, 1)
        if M2 > 0:
            p2 = tl.exp2(p2 * scale - top[:, None])
            total += tl.sum(p2, 1)
        share = (1.0 / (total * H))[:, None]
        mean1 += p1 * share
        if M2 > 0:
            mean2 += p2 * share

    # Store.
    probs_ptr += b.to(tl.int64) * N * M
    store_columns(probs_ptr, mean1, row, key, N, M)
    if M2 > 0:
        store_columns(probs_ptr, mean2, row, key2, N, M)
