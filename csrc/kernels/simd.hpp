// Vectors of one instruction-set level and the arithmetic the leaves share. Everything is inside the level's namespace,
// and nothing inline comes from the C++ library: see CMakeLists.txt.
#pragma once

#include "kernels.hpp"

#include <cmath>
#include <cstring>
#if defined(__AVX__)
#if !defined(__clang__)
// GCC 12 takes the deliberately undefined operands in its own header for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace pando {
namespace PANDO_LEVEL {

constexpr int W = PANDO_VECTOR_BYTES / 4; // floats of a vector: 4, 8 or 16

typedef float vf __attribute__((vector_size(PANDO_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(PANDO_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(PANDO_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(PANDO_VECTOR_BYTES / 2)));
typedef float v4 __attribute__((vector_size(16)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline vf splat(float x) { return x - vf{}; }
inline vu bits_of(vf x) { return reinterpret_cast<vu>(x); }
inline vf float_of(vu x) { return reinterpret_cast<vf>(x); }
inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
// The second argument if either is NaN.
inline vf vmax(vf a, vf b) { return select(a > b, a, b); }
inline vf vmin(vf a, vf b) { return select(a < b, a, b); }

// ---- loads and stores: element type in memory, float32 in registers ----

inline vf load(const float* p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

inline vf load(const bf16* p) {
#if defined(__AVX512F__) && PANDO_VECTOR_BYTES == 64
    // GCC 12 makes four instructions of the conversion below.
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return reinterpret_cast<vf>(_mm512_slli_epi32(wide, 16));
#else
    vh x;
    memcpy(&x, p, sizeof x);
    return float_of(__builtin_convertvector(x, vu) << 16);
#endif
}

inline vf load(const f16* p) {
#if defined(__F16C__) && PANDO_VECTOR_BYTES == 64
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && PANDO_VECTOR_BYTES == 32
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vh x;
    memcpy(&x, p, sizeof x);
    const vu half = __builtin_convertvector(x, vu);
    const vu magnitude = half & 0x7fffu;
    // Shifted in place the exponent is 112 too small; the product puts that right for subnormal numbers, too.
    vu wide = bits_of(float_of(magnitude << 13) * 0x1p112f);
    wide |= reinterpret_cast<vu>(magnitude >= 0x7c00u) & 0x7f800000u;
    return float_of(wide | (half & 0x8000u) << 16);
#endif
}

inline vf load(const int8_t* p) {
#if defined(__AVX512F__) && PANDO_VECTOR_BYTES == 64
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && PANDO_VECTOR_BYTES == 32
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    vi wide;
    for (int i = 0; i < W; ++i) wide[i] = p[i];
    return __builtin_convertvector(wide, vf);
#endif
}

inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

inline void store(bf16* p, vf x) {
    const vu u = bits_of(x);
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16; // to nearest, ties to even
    const vu nan = reinterpret_cast<vu>(x != x);
    const vh y = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), vh);
    memcpy(p, &y, sizeof y);
}

inline uint16_t half_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u); // rounds to 65536 or more
    if (u < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the result, rounded to nearest even, in the low bits.
        float y;
        memcpy(&y, &u, 4);
        y += 0.5f;
        memcpy(&u, &y, 4);
        return static_cast<uint16_t>(sign | (u - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u) >> 13));
}

inline void store(f16* p, vf x) {
#if defined(__F16C__) && PANDO_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && PANDO_VECTOR_BYTES == 32
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; ++i) p[i].bits = half_bits(x[i]);
#endif
}

// The first n < W elements; the other lanes are 0 (nothing beyond the row is read or written).
template <class T>
inline vf load_first(const T* p, int64_t n) {
    T lanes[W];
    memset(lanes, 0, sizeof lanes);
    memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
    return load(lanes);
}

template <class T>
inline void store_first(T* p, vf x, int64_t n) {
    T lanes[W];
    store(lanes, x);
    memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// each(i, load, store) for the whole vectors and then the tail of a row of n elements.
template <class Whole, class Tail>
inline void for_row(int64_t n, Whole&& whole, Tail&& tail) {
    int64_t i = 0;
    for (; i + W <= n; i += W) whole(i);
    if (i < n) tail(i, n - i);
}

// ---- reductions ----

// Lanes of two vectors by number, as __builtin_shufflevector counts them; GCC before 12 has another builtin for it.
#if defined(__clang__) || __GNUC__ >= 12
#define PANDO_SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t v4i __attribute__((vector_size(16)));
#define PANDO_SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, v4i{__VA_ARGS__})
#endif

inline v4 fold4(vf x) {
#if PANDO_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
    const __m256 y = _mm512_castps512_ps256(x) + _mm512_extractf32x8_ps(x, 1);
    return _mm256_castps256_ps128(y) + _mm256_extractf128_ps(y, 1);
#elif PANDO_VECTOR_BYTES == 32 && defined(__AVX__)
    return _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
#else
    static_assert(W == 4, "wider levels name their instructions above");
    return x;
#endif
}

// The sums of four vectors, in four lanes.
inline v4 sums(vf a, vf b, vf c, vf d) {
    const v4 a4 = fold4(a), b4 = fold4(b), c4 = fold4(c), d4 = fold4(d);
    const v4 ab = PANDO_SHUFFLE4(a4, b4, 0, 4, 1, 5) + PANDO_SHUFFLE4(a4, b4, 2, 6, 3, 7);
    const v4 cd = PANDO_SHUFFLE4(c4, d4, 0, 4, 1, 5) + PANDO_SHUFFLE4(c4, d4, 2, 6, 3, 7);
    return PANDO_SHUFFLE4(ab, cd, 0, 1, 4, 5) + PANDO_SHUFFLE4(ab, cd, 2, 3, 6, 7);
}

inline float sum(vf x) {
    const v4 y = fold4(x);
    return (y[0] + y[2]) + (y[1] + y[3]);
}

inline float max_lane(vf x) {
    float best = x[0];
    for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

// ---- functions ----

// e^x within 2 units in the last place; below the smallest normal result 0, above 88.37 the largest it can give, NaN
// for NaN (the bounds come first in vmin and vmax, which return their second argument when a comparison fails).
inline vf vexp(vf x) {
    const vf clamped = vmin(splat(88.37f), vmax(splat(-87.33f), x));
    const float to_integer = 0x1.8p23f; // adding it rounds to an integer in the low bits
    const vf shifted = clamped * 1.44269504088896f + to_integer;
    const vf n = shifted - to_integer;
    const vf r = (clamped - n * 0.693145751953125f) - n * 1.42860682030942e-6f; // ln 2 in two parts
    vf y = splat(1.0f / 5040);
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const vu exponent = (bits_of(shifted) - 0x4b400000u) << 23;
    const vf result = float_of(bits_of(y) + exponent);
    return select(x < splat(-87.33f), vf{}, result);
}

inline vf vtanh(vf x) {
    const vf square = x * x;
    vf series = splat(62.0f / 2835);
    series = series * square - 17.0f / 315;
    series = series * square + 2.0f / 15;
    series = series * square - 1.0f / 3;
    series = x + x * (square * series); // keeps small values exact, where the quotient below cancels
    const vf quotient = 1.0f - 2.0f / (vexp(x + x) + 1.0f);
    return select(square < splat(0.04f), series, quotient);
}

// 0 where e^-x is beyond the largest number, so that x * sigmoid(x) is 0 for hugely negative x, too.
inline vf vsigmoid(vf x) { return select(x < splat(-88.0f), vf{}, 1.0f / (1.0f + vexp(-x))); }

} // namespace PANDO_LEVEL
} // namespace pando
