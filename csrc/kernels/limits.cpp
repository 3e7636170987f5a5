// What the processor can do at best, for benchmarks to stand beside: multiply-adds between registers, and reading.
#include "../linear.hpp"
#include "leaves.hpp"
#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

// Independent sums, enough to hide the latency of an addition.
constexpr int CHAINS = W == 16 ? 24 : 12;

#if defined(__AVX512BF16__)
struct Pairs {
    static inline __attribute__((always_inline)) vf product(vf sum, vf a, vf b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
};
#endif

#if defined(__AVX512VNNI__)
struct Bytes {
    static inline __attribute__((always_inline)) vf product(vf sum, vf a, vf b) {
        return reinterpret_cast<vf>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a),
                                                        reinterpret_cast<__m512i>(b)));
    }
};
#endif

struct Floats {
    static inline __attribute__((always_inline)) vf product(vf sum, vf a, vf b) { return sum + a * b; }
};

template <class Kind>
float chains(int64_t rounds) {
    const vf factors[2] = {splat(1e-20f), splat(1e-20f)};
    vf sums[CHAINS];
#pragma GCC unroll 24
    for (int c = 0; c < CHAINS; ++c) sums[c] = splat(static_cast<float>(c)); // equal sums would be computed once
    for (int64_t i = 0; i < rounds; ++i) {
        __asm__ volatile("" : : "r"(factors) : "memory"); // as if they had changed: else there is one product for all
        const vf a = factors[0], b = factors[1];
#pragma GCC unroll 24
        for (int c = 0; c < CHAINS; ++c) sums[c] = Kind::product(sums[c], a, b);
    }
    vf all{};
#pragma GCC unroll 24
    for (int c = 0; c < CHAINS; ++c) all += sums[c];
    return sum(all);
}

} // namespace

int64_t burn(WeightKind kind, int64_t rounds, float* sink) {
#if defined(__AVX512VNNI__)
    if (!is_float(kind)) {
        *sink = chains<Bytes>(rounds);
        return rounds * CHAINS * W * 8;
    }
#endif
#if defined(__AVX512BF16__)
    if (kind == WeightKind::bf16) {
        *sink = chains<Pairs>(rounds);
        return rounds * CHAINS * W * 4;
    }
#endif
    *sink = chains<Floats>(rounds);
    return rounds * CHAINS * W * 2;
}

void read_through(const char* data, int64_t bytes, float* sink) {
    vf total{};
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int64_t line = 0; line < 256; line += 64) __builtin_prefetch(data + i + (4 << 10) + line);
        for (int64_t at = 0; at < 256; at += W * 4) total += load(reinterpret_cast<const float*>(data + i + at));
    }
    *sink = sum(total);
}

} // namespace PANDO_LEVEL
} // namespace pando
