// Rows of a KV cache in int8: n values, then the float32 they are to be multiplied with, at no particular alignment.
// So a slot has one address and one stride, as with any other element type.
#pragma once

#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

inline float int8_scale(const int8_t* row, int64_t n) {
    float scale;
    memcpy(&scale, row + n, sizeof scale);
    return scale;
}

// out[0, n) = values * scale, rounded once to T.
template <class T>
void expand_row(const int8_t* row, int64_t n, T* out) {
    const float scale = int8_scale(row, n);
    for_row(
        n, [&](int64_t i) { store(out + i, load(row + i) * scale); },
        [&](int64_t i, int64_t rest) { store_first(out + i, load_first(row + i, rest) * scale, rest); });
}

} // namespace PANDO_LEVEL
} // namespace pando
