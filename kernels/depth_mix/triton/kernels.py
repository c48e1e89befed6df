"""The kernels, in Triton. A program takes whole tokens, one after the other.

A row of M is held as [HP, DP], heads x width of a head, each padded to a power of two. Tuples hold one
pointer an array and are unrolled while a kernel is compiled. `S` holds its sizes, see `plan.Sizes`. Formulas:
with the passes of `xla.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(S: tl.constexpr):
    """Offsets of a row's elements, [HP, DP]."""
    return tl.arange(0, S.HP)[:, None] * S.D + tl.arange(0, S.DP)[None, :]


@triton.jit
def _inside(S: tl.constexpr):
    """Which of a row's elements are there."""
    return (tl.arange(0, S.HP)[:, None] < S.heads) & (tl.arange(0, S.DP)[None, :] < S.D)


@triton.jit
def _zeros(S: tl.constexpr):
    HP: tl.constexpr = S.HP
    DP: tl.constexpr = S.DP
    return tl.zeros([HP, DP], tl.float32)


@triton.jit
def _load(array, row, S: tl.constexpr):
    """Row `row` of an array [rows, M]; 0 where padded."""
    pointers = array + row * S.M + _columns(S)
    if S.HP * S.DP == S.M:
        return tl.load(pointers)
    return tl.load(pointers, mask=_inside(S), other=0)


@triton.jit
def _store(array, row, x, S: tl.constexpr):
    pointers = array + row * S.M + _columns(S)
    if S.HP * S.DP == S.M:
        tl.store(pointers, x.to(array.dtype.element_ty))
    else:
        tl.store(pointers, x.to(array.dtype.element_ty), mask=_inside(S))


@triton.jit
def _load_heads(array, row, S: tl.constexpr):
    """Row `row` of an array [rows, heads] as [HP, 1]; 0 where padded."""
    head = tl.arange(0, S.HP)[:, None]
    if S.heads == S.HP:
        return tl.load(array + row * S.heads + head)
    return tl.load(array + row * S.heads + head, mask=head < S.heads, other=0)


@triton.jit
def _store_heads(array, row, x, S: tl.constexpr):
    head = tl.arange(0, S.HP)[:, None]
    tl.store(array + row * S.heads + head, x, mask=head < S.heads)


@triton.jit
def _load_one(array, row):
    return tl.load(array + row + tl.zeros([1, 1], tl.int32))


@triton.jit
def _store_one(array, row, x):
    tl.store(array + row + tl.zeros([1, 1], tl.int32), x)


@triton.jit
def _nth(arrays, r, S: tl.constexpr):
    """The array with the r-th of R, which are R arrays or one stacked one."""
    return arrays[r] if S.unstacked else arrays[0]


@triton.jit
def _nth_row(r, row, S: tl.constexpr):
    return row if S.unstacked else r * S.T + row


@triton.jit
def _wide(x):
    return x.to(tl.float32)


@triton.jit
def _per_head(x):
    """Sums over each head of a row: [HP, 1]."""
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _heads(x):
    """Sums what is per head: [1, 1]."""
    return tl.sum(x, 0, keep_dims=True)


@triton.jit
def _rms(square, eps, S: tl.constexpr):
    """1 / sqrt(mean + eps), of a row's sum of squares for each head."""
    return tl.rsqrt(_heads(square) / S.M + eps)


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _sums(rows):
    """Each row's sums over its heads, up to four rows at a time: what takes long is that threads exchange."""
    found = ()
    for i in tl.static_range(0, len(rows), 4):
        if i + 3 < len(rows):
            found += tl.reduce((rows[i], rows[i + 1], rows[i + 2], rows[i + 3]), 1, _add4, keep_dims=True)
        else:
            if i + 1 < len(rows):
                found += tl.reduce((rows[i], rows[i + 1]), 1, _add2, keep_dims=True)
            if (len(rows) - i) % 2 == 1:
                found += (_per_head(rows[len(rows) - 1]),)
    return found


@triton.jit
def read_forward(sources, queries, eps, means, lse, logits, norms, S: tl.constexpr):
    """`means` may be empty: of one source only logits, `lse` and norms are written."""
    n: tl.constexpr = S.n
    R: tl.constexpr = S.R
    group: tl.constexpr = S.group
    for token in tl.range(tl.program_id(0), S.T, S.programs, num_stages=S.stages):
        row = tl.cast(token, tl.int64)
        # Softmax over groups of sources: what is carried from one to the next for each query.
        top, total, mixed = (), (), ()
        for start in tl.static_range(0, n, group):
            rows = [_load(source, row, S) for source in sources[start : start + group]]
            squares = _sums([_wide(v) * _wide(v) for v in rows])
            norm = [_rms(square, eps, S) for square in squares]
            for i in tl.static_range(len(rows)):
                _store_one(norms, (start + i) * S.T + row, norm[i])
            tops, totals, mixtures = (), (), ()
            for r in tl.static_range(R):
                w = _load(queries, r, S)
                products = _sums([_wide(v) * w for v in rows])
                scores = ()
                for i in tl.static_range(len(rows)):
                    scores += (norm[i] * products[i],)
                    _store_heads(logits, ((start + i) * R + r) * S.T + row, scores[i], S)
                highest = scores[0] if start == 0 else tl.maximum(top[r], scores[0])
                for i in tl.static_range(1, len(rows)):
                    highest = tl.maximum(highest, scores[i])
                p = [tl.exp(s - highest) for s in scores]
                z = p[0]
                for i in tl.static_range(1, len(rows)):
                    z += p[i]
                if start > 0:
                    kept = tl.exp(top[r] - highest)
                    z += total[r] * kept
                scale = tl.full([1, 1], 1, tl.float32) if start + group < n else 1 / z
                mean = p[0] * scale * _wide(rows[0])
                for i in tl.static_range(1, len(rows)):
                    mean += p[i] * scale * _wide(rows[i])
                if start > 0:
                    mean += mixed[r] * (kept * scale)
                if start + group < n:
                    tops += (highest,)
                    totals += (z,)
                    mixtures += (mean,)
                else:
                    _store_heads(lse, r * S.T + row, highest + tl.log(z), S)
                    if len(means) > 0:
                        _store(_nth(means, r, S), _nth_row(r, row, S), mean, S)
            top, total, mixed = tops, totals, mixtures


@triton.jit
def read_backward(sources, query, mean, do, lse, dlse, logits, norms, gradients, dquery, S: tl.constexpr):
    """For one query. `mean` is empty if rows of all sources are held at once: then o is not read.

    `dquery` [programs, M] gets the share of each program.
    """
    n: tl.constexpr = S.n
    group: tl.constexpr = S.group
    program = tl.program_id(0)
    w = _load(query, 0, S)
    share = _zeros(S)
    for token in tl.range(program, S.T, S.programs, num_stages=S.stages):
        row = tl.cast(token, tl.int64)
        d = _load(do, row, S)
        z = _load_heads(lse, row, S)
        # sum_i p_i <do, v_i> - dlse, which the gradients of logits are centered by.
        center = -_load_heads(dlse, row, S)
        if len(mean) > 0:
            center += _per_head(_wide(d) * _wide(_load(mean[0], row, S)))
        for start in tl.static_range(0, n, group):
            rows = [_load(source, row, S) for source in sources[start : start + group]]
            c = _sums([_wide(d) * _wide(v) for v in rows])
            s, p = (), ()
            for i in tl.static_range(len(rows)):
                s += (_load_heads(logits, (start + i) * S.T + row, S),)
                p += (tl.exp(s[i] - z),)
            if len(mean) == 0 and n > 1:
                for i in tl.static_range(n):
                    center += p[i] * c[i]
            for i in tl.static_range(len(rows)):
                # Of one source the gradient of its logit is dlse, exactly.
                ds = p[i] * (c[i] - center) if n > 1 else -center
                norm = _load_one(norms, (start + i) * S.T + row)
                scaled, back = norm * ds, norm * norm / S.M * _heads(ds * s[i])
                share += scaled * _wide(rows[i])
                _store(gradients[start + i], row, p[i] * _wide(d) + scaled * w - back * _wide(rows[i]), S)
    _store(dquery, program, share, S)


@triton.jit
def logit_gradients(sources, dmeans, lse, dlse, logits, norms, weights, scaled, back, S: tl.constexpr):
    """The factors in the gradients of R queries and n sources: `weights` and `scaled` = r_i ds are like
    logits, `back` = r_i^2 / M sum ds s is like norms. A program is one warp, over the columns of a token."""
    n: tl.constexpr = S.n
    R: tl.constexpr = S.R
    BC: tl.constexpr = S.BC
    row = tl.cast(tl.program_id(0), tl.int64)
    total = ()
    for _ in tl.static_range(n):
        total += (0.0,)
    for head in tl.range(S.heads):
        c = ()
        for _ in tl.static_range(n * R):
            c += (tl.zeros([BC // 8], tl.float32),)
        for start in tl.range(0, S.D, BC, num_stages=S.stages):
            column = start + tl.arange(0, BC)
            at = row * S.M + head * S.D + column
            rows = [_wide(tl.load(source + at, mask=column < S.D, other=0)) for source in sources]
            found = ()
            for r in tl.static_range(R):
                d = _wide(
                    tl.load(_nth(dmeans, r, S) + _nth_row(r, 0, S) * S.M + at, mask=column < S.D, other=0)
                )
                for i in tl.static_range(n):
                    # Threads add up what they hold, and exchange it once, at the end.
                    found += (c[r * n + i] + tl.sum(tl.reshape(d * rows[i], [BC // 8, 8]), 1),)
            c = found
        for r in tl.static_range(R):
            at = (r * S.T + row) * S.heads + head
            z = tl.load(lse + at)
            center = -tl.load(dlse + at)
            s, p, e = (), (), ()
            for i in tl.static_range(n):
                s += (tl.load(logits + i * R * S.T * S.heads + at),)
                p += (tl.exp(s[i] - z),)
                e += (tl.sum(c[r * n + i], 0),)
                if n > 1:
                    center += p[i] * e[i]
            added = ()
            for i in tl.static_range(n):
                # Of one source the gradient of its logit is dlse, exactly.
                ds = p[i] * (e[i] - center) if n > 1 else -center
                tl.store(weights + i * R * S.T * S.heads + at, p[i])
                tl.store(scaled + i * R * S.T * S.heads + at, tl.load(norms + i * S.T + row) * ds)
                added += (total[i] + ds * s[i],)
            total = added
    for i in tl.static_range(n):
        norm = tl.load(norms + i * S.T + row)
        tl.store(back + i * S.T + row, norm * norm / S.M * total[i])


@triton.jit
def source_gradients(sources, queries, dmeans, weights, scaled, back, gradients, dqueries, S: tl.constexpr):
    """From what `logit_gradients` found. A program has BC columns of a head of every programs-th token;
    `dqueries` [programs, R, M] gets its share."""
    n: tl.constexpr = S.n
    R: tl.constexpr = S.R
    BC: tl.constexpr = S.BC
    of_head: tl.constexpr = S.pieces // S.heads
    head = tl.program_id(0) // of_head
    column = tl.program_id(0) % of_head * BC + tl.arange(0, BC)
    inside = column < S.D
    column += head * S.D
    shares = ()
    for _ in tl.static_range(R):
        shares += (tl.zeros([BC], tl.float32),)
    for token in tl.range(tl.program_id(1), S.T, S.programs, num_stages=S.stages):
        row = tl.cast(token, tl.int64)
        at = row * S.M + column
        rows = [_wide(tl.load(source + at, mask=inside, other=0)) for source in sources]
        dv = ()
        for i in tl.static_range(n):
            dv += (-tl.load(back + i * S.T + row) * rows[i],)
        added = ()
        for r in tl.static_range(R):
            d = _wide(tl.load(_nth(dmeans, r, S) + _nth_row(r, 0, S) * S.M + at, mask=inside, other=0))
            w = tl.load(queries + r * S.M + column, mask=inside, other=0)
            of = (r * S.T + row) * S.heads + head
            share, sums = shares[r], ()
            for i in tl.static_range(n):
                p = tl.load(weights + i * R * S.T * S.heads + of)
                a = tl.load(scaled + i * R * S.T * S.heads + of)
                share += a * rows[i]
                sums += (dv[i] + p * d + a * w,)
            dv = sums
            added += (share,)
        shares = added
        for i in tl.static_range(n):
            tl.store(gradients[i] + at, dv[i].to(gradients[i].dtype.element_ty), mask=inside)
    for r in tl.static_range(R):
        tl.store(dqueries + (tl.program_id(1) * R + r) * S.M + column, shares[r], mask=inside)


@triton.jit
def join_forward(
    partial, update, o, lse, query, norm_gain, eps, norm_eps, total, x, logits, norms, rms, S: tl.constexpr
):
    """`update` is an empty tuple where there is none, `total` where the running sum stays as it is."""
    w, gain = _load(query, 0, S), _load(norm_gain, 0, S)
    for token in tl.range(tl.program_id(0), S.T, S.programs, num_stages=S.stages):
        row = tl.cast(token, tl.int64)
        mean, z = _wide(_load(o, row, S)), _load_heads(lse, row, S)
        s = _load(partial, row, S)
        if len(update) > 0:
            s = (_wide(s) + _wide(_load(update[0], row, S))).to(s.dtype)
        absent = z == float("inf")
        s = tl.where(absent, 0.0, _wide(s))
        if len(total) > 0:
            _store(total[0], row, s, S)
        square, product = _sums((s * s, s * w))
        norm = _rms(square, eps, S)
        logit = norm * product
        h = mean + tl.sigmoid(logit - z) * (s - mean)
        scale = _rms(_per_head(h * h), norm_eps, S)
        _store(x, row, scale * h * gain, S)
        _store_heads(logits, row, tl.where(absent, float("-inf"), logit), S)
        _store_one(norms, row, norm)
        _store_one(rms, row, scale)


@triton.jit
def join_backward(
    partial, dpartial, dx, o, lse, query, norm_gain, logits, norms, rms, outputs, shares, S: tl.constexpr
):
    """`outputs` are the gradients of the running sum, of o and of lse; `shares` [2, programs, M] those of a
    program of query and norm gain."""
    w, gain = _load(query, 0, S), _load(norm_gain, 0, S)
    program = tl.program_id(0)
    dquery = _zeros(S)
    dgain = _zeros(S)
    for token in tl.range(program, S.T, S.programs, num_stages=S.stages):
        row = tl.cast(token, tl.int64)
        s, mean = _wide(_load(partial, row, S)), _wide(_load(o, row, S))
        dy, dsum = _wide(_load(dx, row, S)), _wide(_load(dpartial, row, S))
        z, logit = _load_heads(lse, row, S), _load_heads(logits, row, S)
        norm, scale = _load_one(norms, row), _load_one(rms, row)
        absent = z == float("inf")
        g = tl.sigmoid(logit - z)
        apart = s - mean
        h = (mean + g * apart) * scale
        dgain += dy * h
        dy = dy * gain
        dyh, dya, ha, _ = _sums((dy * h, dy * apart, h * apart, h))
        along = _heads(dyh) / S.M
        dh = scale * (dy - h * along)
        a = g * (1 - g) * scale * (dya - along * ha)
        logit = tl.where(absent, 0.0, logit)
        back = norm * norm / S.M * _heads(a * logit)
        dquery += (norm * a) * s
        ds = g * dh + (norm * a) * w - back * s + dsum
        _store(outputs[0], row, tl.where(absent, 0.0, ds), S)
        _store(outputs[1], row, (1 - g) * dh, S)
        _store_heads(outputs[2], row, -a, S)
    _store(shares, program, dquery, S)
    _store(shares, S.programs + program, dgain, S)
