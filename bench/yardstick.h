// The physical limit: copy (1 read, 1 write) and triad (2 reads, 1 write) over tensors of the same size and with the
// same thread count, with cached or non-temporal stores; the caller uses the faster one. Also reads alone, of one or
// two tensors: the minimal cost of the statistics if the tensor doesn't stay in cache until the output is computed.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

namespace yardstick {

// Calls f(begin, end) on every thread with its share of the bytes, in whole cache lines.
template <class F> void shares(std::int64_t bytes, int threads, F f) {
    const std::int64_t lines = bytes / 64;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const std::int64_t k = omp_get_thread_num(), n = omp_get_num_threads();
        f(lines * k / n * 64, lines * (k + 1) / n * 64);
        _mm_sfence();
    }
}

inline __m256 at(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }

template <bool stream> void put(char* p, __m256 v) {
    if (stream) _mm256_stream_ps(reinterpret_cast<float*>(p), v);
    else _mm256_storeu_ps(reinterpret_cast<float*>(p), v);
}

template <bool stream> void copy(char* y, const char* x, std::int64_t bytes, int threads) {
    shares(bytes, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; i += 64) {
            put<stream>(y + i, at(x + i));
            put<stream>(y + i + 32, at(x + i + 32));
        }
    });
}

template <bool stream> void triad(char* y, const char* a, const char* b, std::int64_t bytes, int threads) {
    const __m256 s = _mm256_set1_ps(1.5f);
    shares(bytes, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; i += 64) {
            put<stream>(y + i, _mm256_add_ps(at(a + i), _mm256_mul_ps(s, at(b + i))));
            put<stream>(y + i + 32, _mm256_add_ps(at(a + i + 32), _mm256_mul_ps(s, at(b + i + 32))));
        }
    });
}

// Sums a and, unless it is null, b. Returns a part of the sum, so that the compiler can't drop the reads.
inline float read(const char* a, const char* b, std::int64_t bytes, int threads) {
    float total = 0;
    shares(bytes, threads, [&](std::int64_t begin, std::int64_t end) {
        __m256 s[8] = {};
        std::int64_t i = begin;
        for (; i + 256 <= end; i += 256)
            for (int k = 0; k < 8; ++k) {
                s[k] = _mm256_add_ps(s[k], at(a + i + 32 * k));
                if (b) s[k] = _mm256_add_ps(s[k], at(b + i + 32 * k));
            }
        for (; i < end; i += 32) s[0] = _mm256_add_ps(s[0], b ? _mm256_add_ps(at(a + i), at(b + i)) : at(a + i));
        for (int k = 1; k < 8; ++k) s[0] = _mm256_add_ps(s[0], s[k]);
        float lanes[8];
        _mm256_storeu_ps(lanes, s[0]);
#pragma omp atomic
        total += lanes[0] + lanes[7];
    });
    return total;
}

}  // namespace yardstick
