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

// Terms 0 .. N - 1 of vectors: the second half is added to the first until one is left.
template <int N, class Term>
inline vf halves(Term&& term) {
    if constexpr (N == 1) {
        return term(0);
    } else {
        return halves<N / 2>([&](int i) { return term(i) + term(i + N / 2); });
    }
}

// Lanes of any level's vector, largest first; they are few instructions where the processor has one for it.
inline float largest_lane(vf x) {
#if PANDO_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return _mm512_reduce_max_ps(x);
#else
    return max_lane(x);
#endif
}

template <class T>
void eight(const T* row, const RoundArgs& args) {
    vf largest{};
    for_row(
        args.k, [&](int64_t i) { largest = vmax(largest, magnitude(load(row + i))); },
        [&](int64_t i, int64_t rest) { largest = vmax(largest, magnitude(load_first(row + i, rest))); });
    args.scale[0] = largest_lane(largest) / 127.0f;
    const float inverse = reciprocal(args.scale[0]);
    for_row(
        args.k, [&](int64_t i) { store_bytes(args.values + i, nearest(load(row + i) * inverse)); },
        [&](int64_t i, int64_t rest) {
            uint8_t lanes[W];
            store_bytes(lanes, nearest(load_first(row + i, rest) * inverse));
            memcpy(args.values + i, lanes, static_cast<size_t>(rest));
        });
}

// Groups of `size` inputs, `count` of them at once: what is done to one does not wait for another. Each has
// N vectors in memory: its weights, zeros behind them, and its codes.
constexpr int TOGETHER = 8;

template <int N>
struct Groups {
    static constexpr int64_t ROOM = N * W;
    int64_t size;
    int count;
    float* wide;  // [count][ROOM]
    float* codes; // the same
    float scale[TOGETHER], offset[TOGETHER], mean[TOGETHER];

    void clear_padding(int g) const {
        for (int64_t i = size; i < ROOM; ++i) codes[g * ROOM + i] = 0.0f;
    }

    template <class T>
    void fill(const T* row) {
        for (int g = 0; g < count; ++g, row += size) {
            vf low = splat(__builtin_inff()), high = splat(-__builtin_inff());
            float* const to = wide + g * ROOM;
            for_row(
                size,
                [&](int64_t i) {
                    const vf x = load(row + i);
                    store(to + i, x);
                    low = vmin(x, low), high = vmax(x, high);
                },
                [&](int64_t i, int64_t rest) {
                    store(to + i, load_first(row + i, rest));
                    for (int64_t j = i; j < size; ++j) low = vmin(splat(to[j]), low), high = vmax(splat(to[j]), high);
                });
            for (int64_t i = round_up(size, W); i < ROOM; ++i) to[i] = 0.0f;
            offset[g] = -largest_lane(-low);
            scale[g] = (largest_lane(high) - offset[g]) / 15.0f;
            mean[g] = sum(halves<N>([&](int i) { return load(to + i * W); })) / static_cast<float>(size);
        }
    }

    // The nearest codes of the lines.
    void encode() const {
        for (int g = 0; g < count; ++g) {
            const float inverse = reciprocal(scale[g]), shift = offset[g] * inverse;
            for (int64_t i = g * ROOM; i < (g + 1) * ROOM; i += W) {
                const vf code = vmin(vmax(load(wide + i) * inverse - shift, vf{}), splat(15.0f));
                store(codes + i, nearest(code));
            }
            if (size < ROOM) clear_padding(g);
        }
    }

    // Least squares: the lines through the weights for the codes as they are.
    void fit() {
        float mean_code[TOGETHER];
        for (int g = 0; g < count; ++g) {
            const float* const from = codes + g * ROOM;
            mean_code[g] = sum(halves<N>([&](int i) { return load(from + i * W); })) / static_cast<float>(size);
        }
        for (int g = 0; g < count; ++g) {
            for (int64_t i = g * ROOM; i < (g + 1) * ROOM; i += W) store(codes + i, load(codes + i) - mean_code[g]);
            if (size < ROOM) clear_padding(g);
        }
        for (int g = 0; g < count; ++g) {
            const float *const code = codes + g * ROOM, *const weight = wide + g * ROOM;
            const float spread = sum(halves<N>([&](int i) { return load(code + i * W) * load(code + i * W); }));
            const float product = sum(halves<N>([&](int i) { return load(code + i * W) * load(weight + i * W); }));
            if (spread > 0.0f) scale[g] = product / spread;
            offset[g] = mean[g] - scale[g] * mean_code[g];
        }
    }

    void put(uint8_t* values) const {
        for (int g = 0; g < count; ++g, values += size) {
            for_row(
                size, [&](int64_t i) { store_bytes(values + i, load(codes + g * ROOM + i)); },
                [&](int64_t i, int64_t rest) {
                    uint8_t lanes[W];
                    store_bytes(lanes, load(codes + g * ROOM + i));
                    memcpy(values + i, lanes, static_cast<size_t>(rest));
                });
        }
    }
};

template <int N, class T>
void round_groups(const T* row, const RoundArgs& args, int64_t start, int64_t size, int count) {
    Groups<N> groups{size, count, args.scratch, args.scratch + TOGETHER * Groups<N>::ROOM, {}, {}, {}};
    groups.fill(row + start);
    for (int fit = 0; fit < FITS; ++fit) {
        groups.encode();
        groups.fit();
    }
    groups.encode();
    groups.put(args.values + start);
    const int64_t at = start / args.group;
    memcpy(args.scale + at, groups.scale, static_cast<size_t>(count) * sizeof(float));
    memcpy(args.offset + at, groups.offset, static_cast<size_t>(count) * sizeof(float));
}

template <class T>
void four(const T* row, const RoundArgs& args) {
    for (int64_t start = 0; start < args.k;) {
        const int64_t size = smaller(args.group, args.k - start);
        const int count = static_cast<int>(larger(1, smaller(TOGETHER, (args.k - start) / args.group)));
        switch (round_room(size) / W) {
        case 1: round_groups<1>(row, args, start, size, count); break;
        case 2: round_groups<2>(row, args, start, size, count); break;
        case 4: round_groups<4>(row, args, start, size, count); break;
        case 8: round_groups<8>(row, args, start, size, count); break;
        case 16: round_groups<16>(row, args, start, size, count); break;
        default: round_groups<32>(row, args, start, size, count); break;
        }
        start += size * count;
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
