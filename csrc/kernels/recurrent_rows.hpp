// What the recurrent leaves share: one multiply-add, chunks of tokens, rows between their dtype and float32.
#pragma once

#include "recurrent.hpp"
#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

// a * b + c. Named where the processor rounds once, so that every copy of a loop does the same: the compiler is free to
// contract one and not the other.
inline vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__) && PANDO_VECTOR_BYTES == 64
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && PANDO_VECTOR_BYTES == 32
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// run(first, last) for consecutive chunks of at most `longest` tokens, save(slot) where the state is wanted.
template <class Run, class Save>
inline void for_chunks(const RecurrentTask& task, int64_t longest, const Run& run, const Save& save) {
    const StateSave* next = task.saves;
    const StateSave* const last = task.saves + task.num_saves;
    for (int64_t token = task.token_begin; token < task.token_end;) {
        int64_t stop = smaller(token + longest, task.token_end);
        if (next < last) stop = smaller(stop, next->token + 1);
        run(token, stop);
        for (; next < last && next->token == stop - 1; ++next) {
            if (next->slot != task.slot) save(next->slot);
        }
        token = stop;
    }
}

// body(typed null pointer) for the element type.
template <class Body>
inline void with_type(DType dtype, const Body& body) {
    if (dtype == DType::f32) {
        body(static_cast<float*>(nullptr));
    } else if (dtype == DType::bf16) {
        body(static_cast<bf16*>(nullptr));
    } else {
        body(static_cast<f16*>(nullptr));
    }
}

// out = x * factor; `out` has room for whole vectors, its lanes beyond n become 0.
template <class T>
inline void widen(const T* x, int64_t n, float factor, float* out) {
    const vf scale = splat(factor);
    for_row(
        n, [&](int64_t i) { store(out + i, load(x + i) * scale); },
        [&](int64_t i, int64_t rest) { store(out + i, load_first(x + i, rest) * scale); });
}

template <class T>
inline void narrow(const float* x, int64_t n, T* out) {
    for_row(
        n, [&](int64_t i) { store(out + i, load(x + i)); },
        [&](int64_t i, int64_t rest) { store_first(out + i, load(x + i), rest); });
}

// Whole vectors and tails of a state's row in one loop: a tail's other lanes are 0 and are not written.
inline vf load_part(const float* p, int64_t n) { return n >= W ? load(p) : load_first(p, n); }
inline void store_part(float* p, vf x, int64_t n) {
    if (n >= W) {
        store(p, x);
    } else {
        store_first(p, x, n);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
