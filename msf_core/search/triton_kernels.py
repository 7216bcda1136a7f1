"""The two kernels of the fused search, launched and explained by `triton_backend`."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _key(similarity, index):
    """Pack into an int64 that sorts by similarity (float32), and among equal ones by the lower index first."""
    bits = similarity.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as a signed integer it now sorts as the float
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _similarity_of(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["count", "n", "groups"])
def group_maxima(
    queries,  # [count, DIM]; int8 as the rows, or of the dtype of the rows
    rows,  # [n, DIM]
    q_scale,  # [count] float32, read where INT8
    scale,  # [n] float32, likewise
    q_labels,  # [count] int64, read where BY_LABEL
    labels,  # [n] int64, likewise
    q_ids,  # [count] int64, read where BY_ID
    ids,  # [n] int64, likewise
    maxima,  # [count, groups] float32, written
    count,
    n,
    groups,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,  # for Triton's interpreter, which multiplies the bits of bfloat16 values as integers
    INT8: tl.constexpr,
    BY_LABEL: tl.constexpr,
    BY_ID: tl.constexpr,
):
    """Write the largest product of each query with the rows of each group; NaN where it may find none of them."""
    # Programs that follow one another read the same rows, which the second finds in the L2 cache.
    blocks = tl.cdiv(count, BLOCK_Q)
    block_q, block_n = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    q = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    r = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    # Beyond the end the last row stands in: within its own group that changes no maximum.
    q_inside, r_inside = tl.minimum(q, count - 1).to(tl.int64), tl.minimum(r, n - 1).to(tl.int64)
    q_values = queries + q_inside[:, None] * DIM + d[None, :]
    r_values = rows + r_inside[None, :] * DIM + d[:, None]
    products = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.int32 if INT8 else tl.float32)
    for start in range(0, DIM, BLOCK_D):
        if DIM % BLOCK_D == 0:
            q_tile = tl.load(q_values + start)
            r_tile = tl.load(r_values + start)
        else:
            q_tile = tl.load(q_values + start, mask=d[None, :] < DIM - start, other=0)
            r_tile = tl.load(r_values + start, mask=d[:, None] < DIM - start, other=0)
        if INT8:
            products = tl.dot(q_tile, r_tile, products, out_dtype=tl.int32)
        else:
            if WIDEN:
                q_tile = q_tile.to(tl.float32)
                r_tile = r_tile.to(tl.float32)
            products = tl.dot(q_tile, r_tile, products, input_precision="tf32")
    if INT8:
        products = products.to(tl.float32) * tl.load(q_scale + q_inside)[:, None] * tl.load(scale + r_inside)[None, :]
    if BY_LABEL:
        q_label = tl.load(q_labels + q_inside)[:, None]
        wrong = (q_label >= 0) & (q_label != tl.load(labels + r_inside)[None, :])
        products = tl.where(wrong, float("nan"), products)
    if BY_ID:
        q_id = tl.load(q_ids + q_inside)[:, None]
        same = (q_id >= 0) & (q_id == tl.load(ids + r_inside)[None, :])
        products = tl.where(same, float("nan"), products)
    # A NaN counts only in a group that has nothing else.
    largest = tl.max(tl.reshape(products, (BLOCK_Q, BLOCK_N // GROUP, GROUP)), axis=2)
    g = block_n * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    places = maxima + q.to(tl.int64)[:, None] * groups + g[None, :]
    tl.store(places, largest, mask=(q[:, None] < count) & (g[None, :] < groups))


@triton.jit(do_not_specialize=["n", "groups", "most"])
def select(
    queries,  # [Q, DIM]
    rows,  # [n, DIM]
    errors,  # [Q] float32, read where INT8
    scale,  # [n] float32, likewise
    q_labels,  # [Q] int64, read where BY_LABEL
    labels,  # [n] int64, likewise
    q_ids,  # [Q] int64, read where BY_ID
    ids,  # [n] int64, likewise
    maxima,  # [Q, groups] float32
    similarity,  # [Q, K] float32, written
    index,  # [Q, K] int64, written
    n,
    groups,
    most,  # groups that are looked at, at most
    DIM: tl.constexpr,
    K: tl.constexpr,
    K_LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
    MEMBERS: tl.constexpr,
    ERROR: tl.constexpr,
    INT8: tl.constexpr,
    BY_LABEL: tl.constexpr,
    BY_ID: tl.constexpr,
):
    """Write the k nearest rows of one query, by the maxima of their groups."""
    query = tl.program_id(0).to(tl.int64)
    queries += query * DIM
    maxima += query * groups

    # The best group of each lane; lane i has the groups i, i + LANES, i + 2·LANES, …
    lanes = tl.arange(0, LANES)
    lane_best = tl.full((LANES,), LOWEST, dtype=tl.int64)
    for start in range(0, groups, LANES):
        g = start + lanes
        values = tl.load(maxima + g, mask=g < groups, other=float("nan"))
        lane_best = tl.maximum(lane_best, tl.where(values == values, _key(values, g), LOWEST))

    d = tl.arange(0, BLOCK_D)
    length = 0.0
    if ERROR > 0 and not INT8:
        for start in range(0, DIM, BLOCK_D):
            q_tile = tl.load(queries + start + d, mask=d < DIM - start, other=0.0).to(tl.float32)
            length += tl.sum(q_tile * q_tile)
        length = tl.sqrt(length)
    error = tl.load(errors + query) if INT8 else ERROR * length

    # The k best rows so far, first placeholders that differ, below every row's key; lanes beyond k stay out of it.
    k_lanes = tl.arange(0, K_LANES)
    best = tl.where(k_lanes < K, LOWEST + 1 + k_lanes.to(tl.int64), 0x7FFFFFFFFFFFFFFF)
    worst = tl.min(best)
    group_key = tl.max(lane_best)
    taken = 0
    going = group_key > LOWEST
    while going:
        group = _index_of(group_key)
        r = group * GROUP + tl.arange(0, GROUP)
        products = tl.zeros((GROUP,), dtype=tl.float32)
        for start in range(0, DIM, BLOCK_D):
            inside = d < DIM - start
            q_tile = tl.load(queries + start + d, mask=inside, other=0.0).to(tl.float32)
            r_tile = tl.load(
                rows + r[:, None] * DIM + start + d[None, :], mask=(r < n)[:, None] & inside[None, :], other=0
            )
            products += tl.sum(r_tile.to(tl.float32) * q_tile[None, :], axis=1)
        if INT8:
            products *= tl.load(scale + r, mask=r < n, other=0.0)
        if BY_LABEL:
            q_label = tl.load(q_labels + query)
            wrong = (q_label >= 0) & (q_label != tl.load(labels + r, mask=r < n, other=0))
            products = tl.where(wrong, float("nan"), products)
        if BY_ID:
            q_id = tl.load(q_ids + query)
            same = (q_id >= 0) & (q_id == tl.load(ids + r, mask=r < n, other=0))
            products = tl.where(same, float("nan"), products)
        keys = tl.where((r < n) & (products == products), _key(products, r), LOWEST)
        key = tl.max(keys)
        while key > worst:
            best = tl.where(best == worst, key, best)
            keys = tl.where(keys == key, LOWEST, keys)
            key = tl.max(keys)
            worst = tl.min(best)

        # The next best group of that lane, then of all.
        lane = (group % LANES).to(tl.int32)
        next_best = tl.full((MEMBERS,), LOWEST, dtype=tl.int64)
        for start in range(0, groups, LANES * MEMBERS):
            g = start + lane + tl.arange(0, MEMBERS) * LANES
            values = tl.load(maxima + g, mask=g < groups, other=float("nan"))
            member_keys = tl.where(values == values, _key(values, g), LOWEST)
            next_best = tl.maximum(next_best, tl.where(member_keys < group_key, member_keys, LOWEST))
        lane_best = tl.where(lanes == lane, tl.max(next_best), lane_best)
        group_key = tl.max(lane_best)
        taken += 1
        enough = (worst > LOWEST + K) & (_similarity_of(group_key) + error <= _similarity_of(worst))
        going = (group_key > LOWEST) & (taken < most) & (enough == 0)

    best = tl.where(k_lanes < K, best, LOWEST)
    for place in range(K):
        key = tl.max(best)
        found = key > LOWEST + K
        tl.store(similarity + query * K + place, tl.where(found, _similarity_of(key), float("-inf")))
        tl.store(index + query * K + place, tl.where(found, _index_of(key), -1))
        best = tl.where(best == key, LOWEST, best)


# With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run on CPU tensors.
INTERPRETED = not isinstance(select, triton.JITFunction)
