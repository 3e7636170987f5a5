// What the panel kernels of all weight kinds share: how rows are cut into register tiles, and what happens to the sums
// of a tile before they are stored.
#pragma once

#include "../linear.hpp"
#include "activations.hpp"

namespace pando {
namespace PANDO_LEVEL {

// Rows of the highest register tile. With 16 vector registers of 8 floats or fewer, a tile is two vectors wide, with 32
// of 16 it is a whole panel: 12 or 24 accumulators, the most that leave room for the operands.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = W == 16 ? 4 : 2;
constexpr int64_t TILE_COLUMNS = TILE_VECTORS * W;

// Loops over the registers of a tile: only unrolled do they stay registers.
#if defined(__clang__)
#define PANDO_UNROLL _Pragma("unroll")
#else
#define PANDO_UNROLL _Pragma("GCC unroll 8")
#endif

// Tiles whose heights differ by one at most: 6 + 2 rows would take as long as 4 + 4, and stream the panel less evenly.
struct Tiles {
    int64_t count, height, taller; // the first `taller` have height + 1 rows

    explicit Tiles(int64_t rows, int64_t most = TILE_ROWS)
        : count((rows + most - 1) / most), height(count > 0 ? rows / count : 0), taller(count > 0 ? rows % count : 0) {}

    int64_t rows(int64_t tile) const { return height + (tile < taller); }
};

// Lines to have fetched while a tile runs, `lines` per four steps, so that the bus never waits for the arithmetic.
struct Ahead {
    const char* next;
    int64_t lines;

    void fetch() {
        for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(next + 64 * i);
        next += 64 * lines;
    }
};

// `lines` lines from `from` on, in shares for the `runs` tiles of a block, each of which fetches `times` times.
struct Shares {
    const char* from;
    int64_t each, lines, total;

    Shares(const char* first, int64_t count, int64_t times, int64_t runs) : from(first), total(count) {
        times = larger(1, times);
        lines = (total + times * runs - 1) / (times * runs);
        each = times * lines;
    }

    Ahead of(int64_t run) const { return {from + run * each * 64, run * each < total ? lines : 0}; }
};

// Blocks of about the same size, each a multiple of `whole`: a short last one would not be worth its spills.
inline int64_t even_blocks(int64_t units, int64_t most, int64_t whole) {
    const int64_t count = larger(1, (units + larger(1, most) - 1) / larger(1, most));
    return larger(whole, round_up((units + count - 1) / count, whole));
}

// ---- epilogues ----

// The sums of a tile [rows][PANEL], as finish_rows takes them.
struct FloatSums {
    const float* sums;

    vf at(int64_t row, int64_t i) const { return load(sums + row * PANEL + i); }
};

struct Plain {
    static constexpr bool gated = false;
};

// One of those of `activation`, which is looked up vector by vector; the common ones have a copy of the loop.
struct AnyGated {
    static constexpr bool gated = true;

    static vf of(vf gate, vf up, int activation) {
        switch (activation) {
        case static_cast<int>(Activation::gelu_tanh): return GeluTanh::of(gate, up);
        case static_cast<int>(Activation::gelu): return Gelu::of(gate, up);
        case static_cast<int>(Activation::relu2): return Relu2::of(gate, up);
        default: return SwigluOai::of(gate, up);
        }
    }
};

struct SiluGated {
    static constexpr bool gated = true;

    static vf of(vf gate, vf up, int) { return Silu::of(gate, up); }
};

// To bfloat16 with the processor's own instruction where it has one: subnormal results become 0.
template <class T>
inline void store_result(T* p, vf x) {
    store(p, x);
}
#if defined(__AVX512BF16__) && PANDO_VECTOR_BYTES == 64
template <>
inline void store_result(bf16* p, vf x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    memcpy(p, &rounded, sizeof rounded);
}
#endif

// Where the results of one panel go, and what is done to the sums before. Values, not references: a store to the output
// could change whatever is behind those.
template <class Gate, class Sums, class T>
struct Finish {
    static constexpr int64_t COLUMNS = Gate::gated ? PANEL / 2 : PANEL;
    Sums sums;
    const float* bias; // of the panel, or null
    int activation;
    bool accumulate;

    vf result(int64_t row, int64_t i) const {
        vf value = sums.at(row, i);
        if (bias != nullptr) value += load(bias + i);
        if constexpr (Gate::gated) {
            vf up = sums.at(row, PANEL / 2 + i);
            if (bias != nullptr) up += load(bias + PANEL / 2 + i);
            value = Gate::of(value, up, activation);
        }
        return value;
    }

    __attribute__((flatten)) void whole(int64_t row, T* out) const {
        PANDO_UNROLL
        for (int64_t i = 0; i < COLUMNS; i += W) {
            const vf value = result(row, i);
            store_result(out + i, accumulate ? load(out + i) + value : value);
        }
    }

    void part(int64_t row, T* out, int64_t columns) const {
        for (int64_t i = 0; i < columns; i += W) {
            const int64_t count = smaller(W, columns - i);
            const vf value = result(row, i);
            T lanes[W];
            store_result(lanes, accumulate ? load_first(out + i, count) + value : value);
            memcpy(out + i, lanes, static_cast<size_t>(count) * sizeof(T));
        }
    }
};

template <class Gate, class T, class Sums>
void finish_as(const PanelArgs& args, int64_t panel, const Sums& sums, int64_t row, int64_t rows) {
    using F = Finish<Gate, Sums, T>;
    const PackedWeight& weight = *args.weight;
    const int64_t first = panel * F::COLUMNS, columns = smaller(F::COLUMNS, num_columns(weight) - first);
    const F finish{sums, weight.bias == nullptr ? nullptr : weight.bias + panel * PANEL, weight.activation,
                   args.accumulate};
    const int64_t stride = args.out_stride;
    T* out = reinterpret_cast<T*>(args.out) + row * stride + first;
    for (int64_t i = 0; i < rows; ++i, out += stride) {
        if (columns == F::COLUMNS) {
            finish.whole(i, out);
        } else {
            finish.part(i, out, columns);
        }
    }
}

template <class Gate, class Sums>
void finish_into(const PanelArgs& args, int64_t panel, const Sums& sums, int64_t row, int64_t rows) {
    switch (args.out_dtype) {
    case DType::f32: return finish_as<Gate, float>(args, panel, sums, row, rows);
    case DType::bf16: return finish_as<Gate, bf16>(args, panel, sums, row, rows);
    case DType::f16: return finish_as<Gate, f16>(args, panel, sums, row, rows);
    }
}

// The sums of `rows` rows of one panel -> bias, activation, residual, output dtype; `row` is that of the first.
template <class Sums>
inline void finish_rows(const PanelArgs& args, int64_t panel, const Sums& sums, int64_t row, int64_t rows) {
    switch (args.weight->activation) {
    case NO_ACTIVATION: return finish_into<Plain>(args, panel, sums, row, rows);
    case static_cast<int>(Activation::silu): return finish_into<SiluGated>(args, panel, sums, row, rows);
    default: return finish_into<AnyGated>(args, panel, sums, row, rows);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
