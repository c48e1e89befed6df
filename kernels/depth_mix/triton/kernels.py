"""The four kernels, in Triton. A program takes whole tokens, one after the other.

A row of M is held as [HP, DP], heads x width of a head, each padded to a power of two. Tuples hold one pointer
an array and are unrolled while a kernel is compiled. `S` holds its sizes, see `Sizes`. Formulas: with the
passes of `xla.py`.
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
    if S.HP == S.heads:
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
def _whole(x):
    """Sum of a row: [1, 1]."""
    return tl.sum(_per_head(x), 0, keep_dims=True)


@triton.jit
def _norm(v, S: tl.constexpr):
    return tl.rsqrt(_whole(_wide(v) * _wide(v)) / S.M + S.eps)


@triton.jit
def read_forward(sources, queries, means, lse, logits, norms, S: tl.constexpr):
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
            norm = [_norm(v, S) for v in rows]
            for i in tl.static_range(len(rows)):
                _store_one(norms, (start + i) * S.T + row, norm[i])
            tops, totals, mixtures = (), (), ()
            for r in tl.static_range(R):
                w = _load(queries, r, S)
                scores = ()
                for i in tl.static_range(len(rows)):
                    scores += (norm[i] * _per_head(_wide(rows[i]) * w),)
                    _store_heads(logits, ((start + i) * R + r) * S.T + row, scores[i], S)
                highest = scores[0] if start == 0 else tl.maximum(top[r], scores[0])
                for i in tl.static_range(1, len(rows)):
                    highest = tl.maximum(highest, scores[i])
                p = [tl.exp(s - highest) for s in scores]
                z, mean = p[0], p[0] * _wide(rows[0])
                for i in tl.static_range(1, len(rows)):
                    z += p[i]
                    mean += p[i] * _wide(rows[i])
                if start > 0:
                    kept = tl.exp(top[r] - highest)
                    z += total[r] * kept
                    mean += mixed[r] * kept
                if start + group < n:
                    tops, totals, mixtures = tops + (highest,), totals + (z,), mixtures + (mean,)
                else:
                    _store_heads(lse, r * S.T + row, highest + tl.log(z), S)
                    if len(means) > 0:
                        _store(_nth(means, r, S), _nth_row(r, row, S), mean / z, S)
            top, total, mixed = tops, totals, mixtures


@triton.jit
def read_backward(
    sources, queries, means, dmeans, lse, dlse, logits, norms, gradients, dqueries, S: tl.constexpr
):
    """`means` is empty if sources are held: rows of all of them at once, so that o is not read.

    `dqueries` [programs, R, M] gets the share of each program.
    """
    n: tl.constexpr = S.n
    R: tl.constexpr = S.R
    group: tl.constexpr = S.group
    program = tl.program_id(0)
    shares = ()
    for _ in tl.static_range(R):
        shares += (_zeros(S),)
    for token in tl.range(program, S.T, S.programs, num_stages=S.stages):
        row = tl.cast(token, tl.int64)
        do = ()
        for r in tl.static_range(R):
            do += (_load(_nth(dmeans, r, S), _nth_row(r, row, S), S),)
        # lse - dlse + sum_i p_i <do, v_i> a query, of which the gradient of a logit takes its part.
        offset = ()
        if group < n:
            for r in tl.static_range(R):
                mean = _wide(_load(_nth(means, r, S), _nth_row(r, row, S), S))
                offset += (_per_head(_wide(do[r]) * mean) - _load_heads(dlse, r * S.T + row, S),)
        for start in tl.static_range(0, n, group):
            rows = [_load(source, row, S) for source in sources[start : start + group]]
            norm = ()
            back = ()
            dv = ()
            for i in tl.static_range(len(rows)):
                norm += (_load_one(norms, (start + i) * S.T + row),)
                back += (tl.zeros([1, 1], tl.float32),)
                dv += (_zeros(S),)
            added = ()
            for r in tl.static_range(R):
                z = _load_heads(lse, r * S.T + row, S)
                s, p, c = (), (), ()
                for i in tl.static_range(len(rows)):
                    s += (_load_heads(logits, ((start + i) * R + r) * S.T + row, S),)
                    p += (tl.exp(s[i] - z),)
                    c += (_per_head(_wide(do[r]) * _wide(rows[i])),)
                if group < n:
                    center = offset[r]
                else:
                    center = -_load_heads(dlse, r * S.T + row, S)
                    # Of one source the gradient of its logit is dlse, exactly.
                    if n > 1:
                        for i in tl.static_range(n):
                            center += p[i] * c[i]
                w = _load(queries, r, S)
                share = shares[r]
                backs, dvs = (), ()
                for i in tl.static_range(len(rows)):
                    ds = p[i] * (c[i] - center) if n > 1 else -center
                    scaled = norm[i] * ds
                    backs += (back[i] + tl.sum(ds * s[i], 0, keep_dims=True),)
                    dvs += (dv[i] + p[i] * _wide(do[r]) + scaled * w,)
                    share += scaled * _wide(rows[i])
                back, dv = backs, dvs
                added += (share,)
            shares = added
            for i in tl.static_range(len(rows)):
                dv_i = dv[i] - (norm[i] * norm[i] / S.M * back[i]) * _wide(rows[i])
                _store(gradients[start + i], row, dv_i, S)
    for r in tl.static_range(R):
        _store(dqueries, program * R + r, shares[r], S)


@triton.jit
def join_forward(
    partial, update, o, lse, query, norm_gain, new_partial, x, logits, norms, rms, S: tl.constexpr
):
    """`update` is an empty tuple where there is none; `new_partial` is then `partial` itself."""
    w, gain = _load(query, 0, S), _load(norm_gain, 0, S)
    for token in tl.range(tl.program_id(0), S.T, S.programs, num_stages=S.stages):
        row = tl.cast(token, tl.int64)
        mean, z = _wide(_load(o, row, S)), _load_heads(lse, row, S)
        s = _load(partial, row, S)
        if len(update) > 0:
            s = (_wide(s) + _wide(_load(update[0], row, S))).to(s.dtype)
        absent = z == float("inf")
        s = tl.where(absent, 0.0, _wide(s))
        if len(update) > 0:
            _store(new_partial, row, s, S)
        elif tl.max(absent.to(tl.int32)) > 0:
            _store(new_partial, row, s, S)
        norm = _norm(s, S)
        logit = norm * _per_head(s * w)
        h = mean + tl.sigmoid(logit - z) * (s - mean)
        scale = tl.rsqrt(_whole(h * h) / S.M + S.norm_eps)
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
        dh = scale * (dy - h * (_whole(dy * h) / S.M))
        a = g * (1 - g) * _per_head(dh * apart)
        logit = tl.where(absent, 0.0, logit)
        back = norm * norm / S.M * tl.sum(a * logit, 0, keep_dims=True)
        dquery += (norm * a) * s
        ds = g * dh + (norm * a) * w - back * s + dsum
        _store(outputs[0], row, tl.where(absent, 0.0, ds), S)
        _store(outputs[1], row, (1 - g) * dh, S)
        _store_heads(outputs[2], row, -a, S)
    _store(shares, program, dquery, S)
    _store(shares, S.programs + program, dgain, S)
