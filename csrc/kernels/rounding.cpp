// Rounds a row of a float weight to 8 or 4 bits. Same integers, scales and offsets as pando/quant/rounding.py, bit for
// bit and on every level: no multiply-add is fused here (CMakeLists.txt), and sums over a group have one order, halves
// added to each other until one number is left.
#include "leaves.hpp"
#include "linear_int.hpp"
#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

typedef uint8_t vb __attribute__((vector_size(PANDO_VECTOR_BYTES / 4)));

constexpr int FITS = 2;
constexpr float TINY = 1e-37f; // below it a scale has no reciprocal

inline float reciprocal(float scale) { return scale > TINY ? 1.0f / scale : 0.0f; }

// To an integer, ties to even; |x| < 2^22.
inline vf nearest(vf x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

inline vf magnitude(vf x) { return float_of(bits_of(x) & 0x7fffffffu); }

inline void store_bytes(uint8_t* to, vf x) {
    const vb bytes = __builtin_convertvector(__builtin_convertvector(x, vi), vb);
    memcpy(to, &bytes, sizeof bytes);
}

// The sum of n values; n is a power of two and at least W. `term(i)` gives those of a vector.
template <class Term>
inline float tree_sum(int64_t n, float* scratch, Term&& term) {
    if (n == W) return sum(term(0));
    for (int64_t i = 0; i < n / 2; i += W) store(scratch + i, term(i) + term(i + n / 2));
    for (int64_t half = n / 4; half >= W; half /= 2) {
        for (int64_t i = 0; i < half; i += W) store(scratch + i, load(scratch + i) + load(scratch + i + half));
    }
    return sum(load(scratch));
}

template <class T>
void eight(const T* row, const RoundArgs& args) {
    vf largest{};
    for_row(
        args.k, [&](int64_t i) { largest = vmax(largest, magnitude(load(row + i))); },
        [&](int64_t i, int64_t rest) { largest = vmax(largest, magnitude(load_first(row + i, rest))); });
    args.scale[0] = max_lane(largest) / 127.0f;
    const float inverse = reciprocal(args.scale[0]);
    for_row(
        args.k, [&](int64_t i) { store_bytes(args.values + i, nearest(load(row + i) * inverse)); },
        [&](int64_t i, int64_t rest) {
            uint8_t lanes[W];
            store_bytes(lanes, nearest(load_first(row + i, rest) * inverse));
            memcpy(args.values + i, lanes, static_cast<size_t>(rest));
        });
}

// A group of `size` inputs, of which `padded` (a power of two) are in memory: wide, zeros behind them; codes and sums.
struct Group {
    int64_t size, padded;
    float *wide, *codes, *sums;
    float low, high;

    void clear_padding() const {
        if (size < padded) memset(codes + size, 0, static_cast<size_t>(padded - size) * sizeof(float));
    }

    // The nearest codes of a line.
    void encode(float scale, float offset) const {
        const float inverse = reciprocal(scale), shift = offset * inverse;
        for (int64_t i = 0; i < padded; i += W) {
            const vf code = vmin(vmax(load(wide + i) * inverse - shift, vf{}), splat(15.0f));
            store(codes + i, nearest(code));
        }
        clear_padding();
    }

    float mean(const float* values) const {
        return tree_sum(padded, sums, [&](int64_t i) { return load(values + i); }) / static_cast<float>(size);
    }

    // Least squares: the line through the weights for the codes as they are.
    void fit(float mean_wide, float& scale, float& offset) const {
        const float mean_code = mean(codes);
        for (int64_t i = 0; i < padded; i += W) store(codes + i, load(codes + i) - mean_code);
        clear_padding();
        const float spread =
            tree_sum(padded, sums, [&](int64_t i) { return load(codes + i) * load(codes + i); });
        const float product = tree_sum(padded, sums, [&](int64_t i) { return load(codes + i) * load(wide + i); });
        if (spread > 0.0f) scale = product / spread;
        offset = mean_wide - scale * mean_code;
    }
};

template <class T>
void fill(const T* row, Group& group) {
    vf low = splat(__builtin_inff()), high = splat(-__builtin_inff());
    for_row(
        group.size,
        [&](int64_t i) {
            const vf x = load(row + i);
            store(group.wide + i, x);
            low = vmin(low, x), high = vmax(high, x);
        },
        [&](int64_t i, int64_t rest) {
            store(group.wide + i, load_first(row + i, rest));
            for (int64_t j = i; j < i + rest; ++j) low = vmin(low, splat(group.wide[j])), high = vmax(high, splat(group.wide[j]));
        });
    const int64_t filled = round_up(group.size, W);
    memset(group.wide + filled, 0, static_cast<size_t>(group.padded - filled) * sizeof(float));
    group.low = -max_lane(-low);
    group.high = max_lane(high);
}

template <class T>
void four(const T* row, const RoundArgs& args) {
    const int64_t room = round_room(args.group);
    for (int64_t start = 0, at = 0; start < args.k; start += args.group, ++at) {
        const int64_t size = smaller(args.group, args.k - start);
        Group group{size, round_room(size), args.scratch, args.scratch + room, args.scratch + 2 * room, 0, 0};
        fill(row + start, group);
        float scale = (group.high - group.low) / 15.0f, offset = group.low;
        const float mean = group.mean(group.wide);
        for (int fit = 0; fit < FITS; ++fit) {
            group.encode(scale, offset);
            group.fit(mean, scale, offset);
        }
        group.encode(scale, offset);
        for (int64_t i = 0; i < size; i += W) {
            uint8_t lanes[W];
            store_bytes(lanes, load(group.codes + i));
            memcpy(args.values + start + i, lanes, static_cast<size_t>(smaller(W, size - i)));
        }
        args.scale[at] = scale;
        args.offset[at] = offset;
    }
}

template <class T>
void round_as(const RoundArgs& args) {
    const T* row = reinterpret_cast<const T*>(args.row);
    return args.bits == 8 ? eight(row, args) : four(row, args);
}

} // namespace

void round_row(const RoundArgs& args) {
    switch (args.dtype) {
    case DType::f32: return round_as<float>(args);
    case DType::bf16: return round_as<bf16>(args);
    case DType::f16: return round_as<f16>(args);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
