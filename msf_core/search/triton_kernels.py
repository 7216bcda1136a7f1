"""The two kernels of the fused search; `triton_backend` launches and explains them."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))
UNKNOWN = tl.constexpr(-(2**63) + 1)  # also below every key


@triton.jit
def _key(similarity, index):
    """Pack into an int64 that sorts by float32 similarity; if similarities are equal, the lower index comes first."""
    bits = similarity.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as a signed integer, it now sorts like the float
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
    queries,  # [count, DIM], in the dtype of the rows; float32 for int8 rows if PRECISE
    rows,  # [n, DIM]
    q_scale,  # [count] float32, not negative; read if INT8 and not PRECISE
    scale,  # [n] float32, read if INT8
    q_labels,  # [count] int64, read if BY_LABEL
    labels,  # [n] int64, likewise
    q_ids,  # [count] int64, read if BY_ID
    ids,  # [n] int64, likewise
    unsettled,  # [count] int32, read if PRECISE: 1 for a query that needs the precise pass
    maxima,  # [count, stride] float32, written; only the first ``groups`` columns are used
    count,
    n,
    groups,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,  # for Triton's interpreter, which would multiply the bits of bfloat16 values as integers
    INT8: tl.constexpr,
    BY_LABEL: tl.constexpr,
    BY_ID: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Write the largest product of each query with the rows of each group; NaN if all rows of the group are excluded.

    If PRECISE, the products are exact up to the rounding of a float32 sum, only blocks with an unsettled query are
    written, and any number of programs can share the work.
    """
    # Consecutive tiles read the same rows, so the second tile finds them in the L2 cache.
    blocks = tl.cdiv(count, BLOCK_Q)
    first = tl.program_id(0)
    last, step = first + 1, 1
    if PRECISE:
        last, step = blocks * tl.cdiv(n, BLOCK_N), tl.num_programs(0)
    for tile in range(first, last, step):
        block_q, block_n = tile % blocks, tile // blocks
        q = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        r = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        # Beyond the end, use the last row instead: this does not change the maximum of its group.
        q_inside, r_inside = tl.minimum(q, count - 1).to(tl.int64), tl.minimum(r, n - 1).to(tl.int64)
        wanted = True
        if PRECISE:
            wanted = tl.max(tl.load(unsettled + q_inside)) > 0
        if wanted:
            q_values = queries + q_inside[:, None] * DIM + d[None, :]
            r_values = rows + r_inside[None, :] * DIM + d[:, None]
            whole: tl.constexpr = INT8 and not PRECISE
            products = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.int32 if whole else tl.float32)
            for start in range(0, DIM, BLOCK_D):
                if DIM % BLOCK_D == 0:
                    q_tile = tl.load(q_values + start)
                    r_tile = tl.load(r_values + start)
                else:
                    q_tile = tl.load(q_values + start, mask=d[None, :] < DIM - start, other=0)
                    r_tile = tl.load(r_values + start, mask=d[:, None] < DIM - start, other=0)
                if whole:
                    products = tl.dot(q_tile, r_tile, products, out_dtype=tl.int32)
                else:
                    if WIDEN or PRECISE:
                        q_tile = q_tile.to(tl.float32)
                        r_tile = r_tile.to(tl.float32)
                    products = tl.dot(q_tile, r_tile, products, input_precision="tf32x3" if PRECISE else "tf32")
            if INT8:
                products = products.to(tl.float32) * tl.load(scale + r_inside)[None, :]
            if BY_LABEL:
                q_label = tl.load(q_labels + q_inside)[:, None]
                wrong = (q_label >= 0) & (q_label != tl.load(labels + r_inside)[None, :])
                products = tl.where(wrong, float("nan"), products)
            if BY_ID:
                q_id = tl.load(q_ids + q_inside)[:, None]
                same = (q_id >= 0) & (q_id == tl.load(ids + r_inside)[None, :])
                products = tl.where(same, float("nan"), products)
            # The maximum ignores NaN, unless the whole group is NaN.
            largest = tl.max(tl.reshape(products, (BLOCK_Q, BLOCK_N // GROUP, GROUP)), axis=2)
            if whole:
                largest *= tl.load(q_scale + q_inside)[:, None]
            g = block_n * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
            places = maxima + q.to(tl.int64)[:, None] * _stride_of(groups) + g[None, :]
            tl.store(places, largest, mask=(q[:, None] < count) & (g[None, :] < groups))


@triton.jit
def _stride_of(groups):
    """Return the distance between rows of the maxima; rows begin at multiples of 64 bytes."""
    return tl.cdiv(groups, 16) * 16


@triton.jit
def _keys(maxima, g, groups):
    """Return the keys of the groups g; `LOWEST` for groups without allowed rows, and beyond the last group."""
    values = tl.load(maxima + g, mask=g < groups, other=float("nan"))
    return tl.where(values == values, _key(values, g), LOWEST)


@triton.jit
def _best_two_of_each_lane(maxima, groups, LANES: tl.constexpr):
    """Return the keys of the best and of the second best group of each lane, [LANES] each."""
    lanes = tl.arange(0, LANES)
    lane_best = tl.full((LANES,), LOWEST, dtype=tl.int64)
    lane_next = tl.full((LANES,), LOWEST, dtype=tl.int64)
    for start in range(0, groups, LANES):
        keys = _keys(maxima, start + lanes, groups)
        lane_next = tl.maximum(lane_next, tl.minimum(lane_best, keys))
        lane_best = tl.maximum(lane_best, keys)
    return lane_best, lane_next


@triton.jit
def _best_of_lane_below(group_key, lane, maxima, groups, LANES: tl.constexpr, MEMBERS: tl.constexpr):
    """Read a lane again, and return the key of its best group below ``group_key``."""
    members = tl.full((MEMBERS,), LOWEST, dtype=tl.int64)
    for start in range(0, groups, LANES * MEMBERS):
        keys = _keys(maxima, start + lane + tl.arange(0, MEMBERS) * LANES, groups)
        members = tl.maximum(members, tl.where(keys < group_key, keys, LOWEST))
    return tl.max(members)


@triton.jit
def _length(query, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the Euclidean length of a query."""
    d = tl.arange(0, BLOCK_D)
    squares = 0.0
    for start in range(0, DIM, BLOCK_D):
        q_tile = tl.load(query + start + d, mask=d < DIM - start, other=0.0)
        squares += tl.sum(q_tile * q_tile)
    return tl.sqrt(squares)


@triton.jit
def _products(query, rows, r, n, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the float32 products [COUNT] of a query with the rows r; 0 beyond the last row."""
    d = tl.arange(0, BLOCK_D)
    products = tl.zeros((COUNT,), dtype=tl.float32)
    for start in range(0, DIM, BLOCK_D):
        inside = d < DIM - start
        q_tile = tl.load(query + start + d, mask=inside, other=0.0).to(tl.float32)
        places = rows + r[:, None].to(tl.int64) * DIM + start + d[None, :]
        r_tile = tl.load(places, mask=(r < n)[:, None] & inside[None, :], other=0)
        products += tl.sum(r_tile.to(tl.float32) * q_tile[None, :], axis=1)
    return products


@triton.jit
def _settled(worst, group_key, error, K: tl.constexpr):
    """Return whether K rows have been found, and no row of the group ``group_key`` or of a worse one can be nearer."""
    return (worst > LOWEST + K) & (_similarity_of(group_key) + error <= _similarity_of(worst))


@triton.jit(do_not_specialize=["n", "groups", "most"])
def select(
    queries,  # [Q, DIM]
    rows,  # [n, DIM]
    errors,  # [Q] float32, read if INT8 and not PRECISE
    scale,  # [n] float32, read if INT8
    q_labels,  # [Q] int64, read if BY_LABEL
    labels,  # [n] int64, likewise
    q_ids,  # [Q] int64, read if BY_ID
    ids,  # [n] int64, likewise
    own,  # [Q, OWN] int64
    unsettled,  # [Q] int32; read if PRECISE, to skip queries with 0; written if not EXACT
    maxima,  # [Q, stride] float32; only the first ``groups`` columns are used
    similarity,  # [Q, K] float32, written
    index,  # [Q, K] int64, written
    n,
    groups,
    most,  # maximum number of groups to take
    DIM: tl.constexpr,
    K: tl.constexpr,
    K_LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,  # number of groups of a batch
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
    MEMBERS: tl.constexpr,
    ERROR: tl.constexpr,  # error of the maxima, for a query of length 1
    EXACT: tl.constexpr,  # whether the maxima are exact up to the rounding of a sum
    INT8: tl.constexpr,
    BY_LABEL: tl.constexpr,
    BY_ID: tl.constexpr,
    OWN: tl.constexpr,  # number of own rows excluded from each query
    PRECISE: tl.constexpr,
):
    """Write the K nearest rows of one query, chosen by the maxima of their groups.

    Groups are taken in the order of their maxima, BATCH at a time. They are distributed over LANES lanes: lane i has
    the groups i, i + LANES, i + 2·LANES, … Only the best two groups of each lane are kept; when both are taken, the
    lane is read again.
    """
    query = tl.program_id(0).to(tl.int64)
    if PRECISE and tl.load(unsettled + query) == 0:
        return
    queries += query * DIM
    maxima += query * _stride_of(groups)

    lanes = tl.arange(0, LANES)
    lane_best, lane_next = _best_two_of_each_lane(maxima, groups, LANES)
    error = 0.0
    if not EXACT:
        error = tl.load(errors + query) if INT8 else ERROR * _length(queries, DIM, BLOCK_D)

    # The K best rows so far. They start as distinct placeholders below every row's key; lanes from K on are unused.
    k_lanes = tl.arange(0, K_LANES)
    best = tl.where(k_lanes < K, LOWEST + 1 + k_lanes.to(tl.int64), 0x7FFFFFFFFFFFFFFF)
    worst = tl.min(best)
    b, m = tl.arange(0, BATCH), tl.arange(0, GROUP)
    group_key = tl.max(lane_best)
    taken = tl.full((), 0, tl.int32)
    going = group_key > LOWEST
    while going:
        # Take the best groups by their maxima.
        batch = tl.full((BATCH,), LOWEST, dtype=tl.int64)
        place = taken * 0  # with a plain 0, the compilers of Triton 3.3 and 3.4 crash
        while going & (place < BATCH):
            batch = tl.where(b == place, group_key, batch)
            lane = (_index_of(group_key) % LANES).to(tl.int32)
            refill = tl.max(tl.where(lanes == lane, lane_next, LOWEST))
            if refill == UNKNOWN:
                refill = _best_of_lane_below(group_key, lane, maxima, groups, LANES, MEMBERS)
            lane_best = tl.where(lanes == lane, refill, lane_best)
            lane_next = tl.where(lanes == lane, UNKNOWN, lane_next)
            group_key = tl.max(lane_best)
            place += 1
            taken += 1
            going = (group_key > LOWEST) & (taken < most) & (_settled(worst, group_key, error, K) == 0)

        # Compute the products of all their rows; shapes are [BATCH · GROUP] from here on.
        first_row = tl.where(b < place, _index_of(batch).to(tl.int32) * GROUP, n)
        r = tl.reshape(first_row[:, None] + m[None, :], (BATCH * GROUP,))
        products = _products(queries, rows, r, n, BATCH * GROUP, DIM, BLOCK_D)
        if INT8:
            products *= tl.load(scale + r, mask=r < n, other=0.0)
        found = (r < n) & (products == products)
        if BY_LABEL:
            q_label = tl.load(q_labels + query)
            found &= (q_label < 0) | (q_label == tl.load(labels + r, mask=r < n, other=0))
        if BY_ID:
            q_id = tl.load(q_ids + query)
            found &= (q_id < 0) | (q_id != tl.load(ids + r, mask=r < n, other=0))
        for view in tl.static_range(OWN):
            found &= r != tl.load(own + query * OWN + view)
        keys = tl.where(found, _key(products, r), LOWEST)
        key = tl.max(keys)
        while key > worst:
            best = tl.where(best == worst, key, best)
            keys = tl.where(keys == key, LOWEST, keys)
            key = tl.max(keys)
            worst = tl.min(best)
        going = (group_key > LOWEST) & (taken < most) & (_settled(worst, group_key, error, K) == 0)

    if not EXACT:
        left = (group_key > LOWEST) & (_settled(worst, group_key, error, K) == 0)
        tl.store(unsettled + query, left.to(tl.int32))
    best = tl.sort(tl.where(k_lanes < K, best, LOWEST), descending=True)
    found = best > LOWEST + K
    places = query * K + k_lanes
    tl.store(similarity + places, tl.where(found, _similarity_of(best), float("-inf")), mask=k_lanes < K)
    tl.store(index + places, tl.where(found, _index_of(best), -1), mask=k_lanes < K)


# If TRITON_INTERPRET=1 is set before Triton is imported, the kernels run on CPU tensors.
INTERPRETED = not isinstance(select, triton.JITFunction)
