// Panels of float weights times rows. Every output is one chain of additions over its inputs in ascending order (pairs
// of inputs at a time where the processor multiplies bfloat16 itself), whatever the tile it is computed in, so a row's
// result is bitwise the same in every batch. Sums that leave the registers between two blocks of inputs do so in
// float32, which changes nothing.
//
// vdpbf16ps (AVX-512 BF16) reads subnormal numbers as 0 and flushes subnormal sums to 0; its two products are added
// one after the other with a rounding each. Rows in float32 or float16 are rounded to bfloat16 first at that level; the
// other levels widen the weights and keep the rows.
#include "gemm.hpp"
#include "leaves.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

// Bytes of a panel a block of inputs takes when there is more than one tile: it is fetched once and serves all tiles
// out of the first-level cache. Of the largest there is hardly room for the next one beside it, but spills are rarer;
// up to FEW_TILES the bus is what matters, and the next block has to come in meanwhile.
constexpr int64_t BLOCK_BYTES = W == 16 ? 32 << 10 : 16 << 10, FEW_BLOCK_BYTES = 16 << 10;
constexpr int64_t FEW_TILES = 5;
// How far ahead a single tile fetches.
constexpr int64_t STREAM_BYTES = 4 << 10;

// A kind names the type of a prepared row (X), the inputs of a step and the bytes a step takes in a panel, and adds
// one step's products to the sums of a tile.
struct F32 {
    using X = float;
    static constexpr int64_t INPUTS = 1, STEP_BYTES = PANEL * 4;

    template <int R>
    static inline __attribute__((always_inline)) void step(vf (&sums)[R][TILE_VECTORS], const char* w,
                                                           const X* const (&x)[R], int64_t i) {
        vf weights[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) weights[v] = load(reinterpret_cast<const float*>(w) + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf value = splat(x[r][i]);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; ++v) sums[r][v] += weights[v] * value;
        }
    }
};

struct F16 {
    using X = float;
    static constexpr int64_t INPUTS = 1, STEP_BYTES = PANEL * 2;

    template <int R>
    static inline __attribute__((always_inline)) void step(vf (&sums)[R][TILE_VECTORS], const char* w,
                                                           const X* const (&x)[R], int64_t i) {
        vf weights[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) weights[v] = load(reinterpret_cast<const f16*>(w) + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf value = splat(x[r][i]);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; ++v) sums[r][v] += weights[v] * value;
        }
    }
};

#if defined(__AVX512BF16__)
struct BF16 {
    using X = bf16;
    static constexpr int64_t INPUTS = 2, STEP_BYTES = PANEL * 4;

    template <int R>
    static inline __attribute__((always_inline)) void step(vf (&sums)[R][TILE_VECTORS], const char* w,
                                                           const X* const (&x)[R], int64_t i) {
        __m512i weights[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) weights[v] = _mm512_loadu_si512(w + v * 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            memcpy(&pair, x[r] + 2 * i, 4);
            const __m512bh value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; ++v)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], reinterpret_cast<__m512bh>(weights[v]), value);
        }
    }
};
#else
struct BF16 {
    using X = float;
    static constexpr int64_t INPUTS = 2, STEP_BYTES = PANEL * 4;

    template <int R>
    static inline __attribute__((always_inline)) void step(vf (&sums)[R][TILE_VECTORS], const char* w,
                                                           const X* const (&x)[R], int64_t i) {
        vf weights[TILE_VECTORS];
        vu pairs;
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) {
            memcpy(&pairs, w + v * W * 4, sizeof pairs);
            weights[v] = float_of(pairs << 16);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf value = splat(x[r][2 * i]);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; ++v) sums[r][v] += weights[v] * value;
        }
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) {
            memcpy(&pairs, w + v * W * 4, sizeof pairs);
            weights[v] = float_of(pairs & 0xffff0000u);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf value = splat(x[r][2 * i + 1]);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; ++v) sums[r][v] += weights[v] * value;
        }
    }
};
#endif

// One tile of one block of inputs. sums [R][PANEL] hold what the blocks before gave, if there were any.
struct Block {
    const char* x; // of the tile's first row and the block's first input
    int64_t x_stride;
    const char* w; // the tile's columns at the block's first step
    int64_t steps;
    float* sums;
    bool first;
    Ahead ahead;
};

template <class Kind, int R>
void tile(const Block& block) {
    using X = typename Kind::X;
    const X* x[R];
    vf sums[R][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = reinterpret_cast<const X*>(block.x + r * block.x_stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) sums[r][v] = block.first ? vf{} : load(block.sums + r * PANEL + v * W);
    const char* w = block.w;
    Ahead ahead = block.ahead;
    int64_t i = 0;
    for (; i + 4 <= block.steps; i += 4) {
        ahead.fetch();
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) Kind::template step<R>(sums, w + u * Kind::STEP_BYTES, x, i + u);
        w += 4 * Kind::STEP_BYTES;
    }
    for (; i < block.steps; ++i, w += Kind::STEP_BYTES) Kind::template step<R>(sums, w, x, i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) store(block.sums + r * PANEL + v * W, sums[r][v]);
}

template <class Kind>
void run_tile(const Block& block, int64_t rows) {
    switch (rows) {
    case 1: return tile<Kind, 1>(block);
    case 2: return tile<Kind, 2>(block);
    case 3: return tile<Kind, 3>(block);
    case 4: return tile<Kind, 4>(block);
    case 5: return tile<Kind, 5>(block);
    case 6: return tile<Kind, 6>(block);
    }
}

template <class Kind>
void multiply_panel(const PanelArgs& args, const PanelTask& task, int64_t panel, float* sums) {
    constexpr int64_t GROUPS = PANEL / TILE_COLUMNS;
    const Tiles tiles(task.row_end - task.row_begin);
    const int64_t steps = (args.weight->k + Kind::INPUTS - 1) / Kind::INPUTS;
    const int64_t runs = tiles.count * GROUPS;
    const int64_t most = (tiles.count <= FEW_TILES ? FEW_BLOCK_BYTES : BLOCK_BYTES) / Kind::STEP_BYTES;
    const int64_t block = runs == 1 ? larger(1, steps) : even_blocks(steps, most, 4);
    const char* w = args.weight->panels + panel * steps * Kind::STEP_BYTES;
    const char* x = args.x + task.row_begin * args.x_stride;
    for (int64_t from = 0; from == 0 || from < steps; from += block) {
        const int64_t count = smaller(block, steps - from);
        const int64_t distance = runs == 1 ? STREAM_BYTES : count * Kind::STEP_BYTES;
        const char* block_w = w + from * Kind::STEP_BYTES;
        const Shares shares(block_w + distance, count * Kind::STEP_BYTES / 64, count / 4, runs);
        int64_t row = 0;
        for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t rows = tiles.rows(t);
            const char* tile_x =
                x + row * args.x_stride + from * Kind::INPUTS * static_cast<int64_t>(sizeof(typename Kind::X));
            for (int64_t g = 0; g < GROUPS; ++g) {
                run_tile<Kind>({tile_x, args.x_stride, block_w + g * (Kind::STEP_BYTES / GROUPS), count,
                                sums + row * PANEL + g * TILE_COLUMNS, from == 0, shares.of(t * GROUPS + g)},
                               rows);
            }
            if (from + block >= steps)
                finish_rows(args, panel, FloatSums{sums + row * PANEL}, task.row_begin + row, rows);
            row += rows;
        }
    }
}

template <class Kind>
void multiply(const PanelArgs& args, const PanelTask& task, char* scratch) {
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
        multiply_panel<Kind>(args, task, panel, reinterpret_cast<float*>(scratch));
}

template <class Kind>
bool takes(const PackedWeight& weight, DType x) {
    constexpr DType own = sizeof(typename Kind::X) == 2 ? DType::bf16 : DType::f32;
    return x == own && weight.k % Kind::INPUTS == 0;
}

template <class X, class T>
void convert_row(const T* from, X* to, int64_t n, int64_t padded) {
    for_row(
        n, [&](int64_t i) { store(to + i, load(from + i)); },
        [&](int64_t i, int64_t rest) { store_first(to + i, load_first(from + i, rest), rest); });
    if (padded > n) memset(to + n, 0, static_cast<size_t>(padded - n) * sizeof(X));
}

template <class Kind>
void prepare(const PackedWeight& weight, DType dtype, const char* row, char* prepared) {
    using X = typename Kind::X;
    X* to = reinterpret_cast<X*>(prepared);
    const int64_t padded = round_up(weight.k, Kind::INPUTS);
    switch (dtype) {
    case DType::f32: return convert_row(reinterpret_cast<const float*>(row), to, weight.k, padded);
    case DType::bf16: return convert_row(reinterpret_cast<const bf16*>(row), to, weight.k, padded);
    case DType::f16: return convert_row(reinterpret_cast<const f16*>(row), to, weight.k, padded);
    }
}

template <class T>
void combine_tokens(const CombineArgs& args, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        const int64_t* places = args.places + token * args.top_k;
        const float* weights = args.weights + token * args.top_k;
        T* out = reinterpret_cast<T*>(args.out) + token * args.out_stride;
        const auto sum_at = [&](auto&& read, int64_t i) {
            vf sum{};
            for (int64_t j = 0; j < args.top_k; ++j) sum += weights[j] * read(args.results + places[j] * args.size + i);
            return sum;
        };
        for_row(
            args.size, [&](int64_t i) { store(out + i, sum_at([](const float* p) { return load(p); }, i)); },
            [&](int64_t i, int64_t rest) {
                store_first(out + i, sum_at([rest](const float* p) { return load_first(p, rest); }, i), rest);
            });
    }
}

} // namespace

bool float_takes(const PackedWeight& weight, DType x) {
    switch (weight.kind) {
    case WeightKind::bf16: return takes<BF16>(weight, x);
    case WeightKind::f16: return takes<F16>(weight, x);
    default: return takes<F32>(weight, x);
    }
}

int64_t float_row_bytes(const PackedWeight& weight) {
    const int64_t each = weight.kind == WeightKind::bf16 ? sizeof(BF16::X) : sizeof(float);
    return round_up(round_up(weight.k, 2) * each, 64);
}

void float_prepare(const PackedWeight& weight, DType dtype, const char* row, char* prepared) {
    switch (weight.kind) {
    case WeightKind::bf16: return prepare<BF16>(weight, dtype, row, prepared);
    case WeightKind::f16: return prepare<F16>(weight, dtype, row, prepared);
    default: return prepare<F32>(weight, dtype, row, prepared);
    }
}

int64_t float_scratch(const PackedWeight&, int64_t rows) { return rows * PANEL * static_cast<int64_t>(sizeof(float)); }

void float_multiply(const PanelArgs& args, const PanelTask& task, char* scratch) {
    switch (args.weight->kind) {
    case WeightKind::bf16: return multiply<BF16>(args, task, scratch);
    case WeightKind::f16: return multiply<F16>(args, task, scratch);
    default: return multiply<F32>(args, task, scratch);
    }
}

void combine(const CombineArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return combine_tokens<float>(args, begin, end);
    case DType::bf16: return combine_tokens<bf16>(args, begin, end);
    case DType::f16: return combine_tokens<f16>(args, begin, end);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
