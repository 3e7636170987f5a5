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
    using Sum = __m512;
    static inline Sum start(int chain) { return _mm512_set1_ps(static_cast<float>(chain)); }
    static inline Sum next(Sum sum, vf a, vf b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static inline vf total(Sum sum) { return sum; }
};
#endif

#if defined(__AVX512VNNI__)
struct Bytes {
    using Sum = __m512i;
    static inline Sum start(int chain) { return _mm512_set1_epi32(chain); }
    // Not the intrinsic: GCC 12 keeps copies of its sums in memory.
    static inline Sum next(Sum sum, vf a, vf b) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    static inline vf total(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};
#endif

struct Floats {
    using Sum = vf;
    static inline Sum start(int chain) { return splat(static_cast<float>(chain)); }
    // The sum is what is multiplied: without multiply-adds, one product of a and b would serve all chains.
    static inline Sum next(Sum sum, vf a, vf b) { return sum * a + b; }
    static inline vf total(Sum sum) { return sum; }
};

template <class Kind>
float chains(int64_t rounds) {
    const vf factors[2] = {splat(0.75f), splat(0.75f)};
    typename Kind::Sum sums[CHAINS];
#pragma GCC unroll 24
    for (int c = 0; c < CHAINS; ++c) sums[c] = Kind::start(c); // equal sums would be computed once
    for (int64_t i = 0; i < rounds; ++i) {
        const vf* either = factors;
        __asm__ volatile("" : "+r"(either)); // it could be another pair each time, so that nothing leaves the loop
        const vf a = either[0], b = either[1];
#pragma GCC unroll 24
        for (int c = 0; c < CHAINS; ++c) sums[c] = Kind::next(sums[c], a, b);
    }
    vf all{};
#pragma GCC unroll 24
    for (int c = 0; c < CHAINS; ++c) all += Kind::total(sums[c]);
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
