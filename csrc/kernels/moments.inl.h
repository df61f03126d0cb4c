// Reduce: moments of one chunk, in one read of memory.
//
// A block (about 16 KiB: it stays in L1) is read twice: first sum(x - x0), x0 the block's first valid value, gives a
// centre c near the block's mean; then d = x - c gives sum(d) and sum(d*d). In float64:
//   mean_b = c + sum(d)/n,   M2_b = sum(d*d) - sum(d)^2/n  (clamped at 0)
// and blocks are merged in order by Chan's formula. x - x0 and x - c are exact or nearly so at any offset, so the
// offset costs no digits; a constant channel has d = 0 and M2 exactly 0. With weights w every sum takes w.
#pragma once
#include "simd.inl.h"

namespace bnfast {
namespace {

// Chan: (na, mean, m2) takes in (nb, mean_b, m2_b). The order of products keeps na = 0 from making inf*0.
struct MergeWeights {
    double r, q;  // nb/n and na*nb/n
    BNFAST_INLINE MergeWeights(double na, double nb) {
        const double n = na + nb;
        r = n > 0 ? nb / n : 0;
        q = na * r;
    }
    BNFAST_INLINE void into(double& mean, double& m2, double mean_b, double m2_b) const {
        const double delta = mean_b - mean;
        mean += delta * r;
        m2 += m2_b + (delta * q) * delta;
    }
};

template <class T> BNFAST_INLINE T finite_or_zero(T t) { return t - t == T(0) ? t : T(0); }
template <class V> BNFAST_INLINE V finite_or(V v, V other) { return v - v == V{} ? v : other; }

struct BlockMoments {
    double n, mean, m2;
    template <class T> BNFAST_INLINE BlockMoments(double count, T c, T sum_d, T sum_dd) {
        const double inv = count > 0 ? 1 / count : 0, s = double(sum_d);
        const double raw = double(sum_dd) - s * s * inv;
        n = count;
        mean = double(c) + s * inv;
        m2 = raw < 0 ? 0 : raw;  // NaN stays NaN
    }
};

BNFAST_INLINE int64_t chunk_end(const Grid& g, int64_t chunk) {
    const int64_t end = (chunk + 1) * g.chunk_blocks;
    return end < g.blocks ? end : g.blocks;
}

// ---- chunk results into (C,) ---------------------------------------------------------------------------------------

double merge_chunks(const MergeArgs& a) noexcept {
    double total = 0;
    for (int64_t c = a.c0; c < a.c1; ++c) a.mean_out[c] = a.variance_out[c] = 0;
    for (int64_t k = 0; k < a.chunks; ++k) {
        const double *mean = a.mean + k * a.C, *m2 = a.m2 + k * a.C;
        const MergeWeights merge(total, a.count[k]);
        for (int64_t c = a.c0; c < a.c1; ++c) merge.into(a.mean_out[c], a.variance_out[c], mean[c], m2[c]);
        total += a.count[k];
    }
    const double inv = total > 0 ? 1 / total : 0;
    for (int64_t c = a.c0; c < a.c1; ++c) a.variance_out[c] *= inv;
    return total;
}

}  // namespace
}  // namespace bnfast
