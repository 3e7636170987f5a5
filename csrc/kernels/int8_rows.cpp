// Keys and values into an int8 cache. No product may be fused with a sum here (see CMakeLists.txt): every level and the
// reference give the same bits.
#include "int8_rows.hpp"
#include "leaves.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

constexpr float SMALLEST = 0x1p-100f; // rows below are zeros: the reciprocal of their scale may not exist

// To nearest, ties to even: adding this leaves the integer in the low bits.
constexpr float TO_INTEGER = 0x1.8p23f;

template <class T>
void round_as(const T* x, int64_t n, int8_t* row) {
    vf most{}, poison{}; // poison: NaN once an element was not finite
    const auto look = [&](vf v) {
        most = vmax(float_of(bits_of(v) & 0x7fffffffu), most);
        poison += v * 0.0f;
    };
    for_row(n, [&](int64_t i) { look(load(x + i)); }, [&](int64_t i, int64_t rest) { look(load_first(x + i, rest)); });
    const float largest = max_lane(most), doubt = sum(poison);
    const bool sane = doubt == doubt;
    const float factor = sane && largest >= SMALLEST ? 127.0f / largest : 0.0f;
    const float scale = !sane ? __builtin_nanf("") : largest >= SMALLEST ? largest / 127.0f : 0.0f;
    const auto put = [&](int64_t i, vf v, int64_t count) {
        const vi rounded = reinterpret_cast<vi>(bits_of(v * factor + TO_INTEGER) - 0x4b400000u);
        for (int64_t lane = 0; lane < count; ++lane) row[i + lane] = static_cast<int8_t>(rounded[lane]);
    };
    for_row(
        n, [&](int64_t i) { put(i, load(x + i), W); },
        [&](int64_t i, int64_t rest) { put(i, load_first(x + i, rest), rest); });
    memcpy(row + n, &scale, sizeof scale);
}

} // namespace

void round_kv(DType dtype, const char* x, int64_t n, char* out) {
    int8_t* row = reinterpret_cast<int8_t*>(out);
    switch (dtype) {
    case DType::f32: return round_as(reinterpret_cast<const float*>(x), n, row);
    case DType::bf16: return round_as(reinterpret_cast<const bf16*>(x), n, row);
    case DType::f16: return round_as(reinterpret_cast<const f16*>(x), n, row);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
