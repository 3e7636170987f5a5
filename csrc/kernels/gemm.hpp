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

// Tiles whose heights differ by one at most: 6 + 2 rows would take as long as 4 + 4, and stream the panel less evenly.
struct Tiles {
    int64_t count, height, taller; // the first `taller` have height + 1 rows

    explicit Tiles(int64_t rows)
        : count((rows + TILE_ROWS - 1) / TILE_ROWS), height(count > 0 ? rows / count : 0),
          taller(count > 0 ? rows % count : 0) {}

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

template <class Kind>
inline vf activated(const float* sums, const float* bias, int64_t i) {
    vf gate = load(sums + i), up = load(sums + PANEL / 2 + i);
    if (bias != nullptr) {
        gate += load(bias + i);
        up += load(bias + PANEL / 2 + i);
    }
    return Kind::of(gate, up);
}

inline vf result_at(const PackedWeight& weight, const float* sums, const float* bias, int64_t i) {
    switch (weight.activation) {
    case static_cast<int>(Activation::silu): return activated<Silu>(sums, bias, i);
    case static_cast<int>(Activation::gelu_tanh): return activated<GeluTanh>(sums, bias, i);
    case static_cast<int>(Activation::gelu): return activated<Gelu>(sums, bias, i);
    case static_cast<int>(Activation::relu2): return activated<Relu2>(sums, bias, i);
    case static_cast<int>(Activation::swiglu_oai): return activated<SwigluOai>(sums, bias, i);
    default: return bias == nullptr ? load(sums + i) : load(sums + i) + load(bias + i);
    }
}

template <class T>
void finish_row(const PanelArgs& args, int64_t panel, const float* sums, int64_t row) {
    const PackedWeight& weight = *args.weight;
    const int64_t each = columns_per_panel(weight), first = panel * each;
    const float* bias = weight.bias == nullptr ? nullptr : weight.bias + panel * PANEL;
    T* out = reinterpret_cast<T*>(args.out) + row * args.out_stride + first;
    for_row(
        smaller(each, num_columns(weight) - first),
        [&](int64_t i) {
            const vf result = result_at(weight, sums, bias, i);
            store(out + i, args.accumulate ? load(out + i) + result : result);
        },
        [&](int64_t i, int64_t rest) {
            const vf result = result_at(weight, sums, bias, i);
            store_first(out + i, args.accumulate ? load_first(out + i, rest) + result : result, rest);
        });
}

// sums [rows][PANEL] of one panel -> bias, activation, residual, output dtype; `row` is that of the first.
inline void finish_rows(const PanelArgs& args, int64_t panel, const float* sums, int64_t row, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
        switch (args.out_dtype) {
        case DType::f32: finish_row<float>(args, panel, sums + i * PANEL, row + i); break;
        case DType::bf16: finish_row<bf16>(args, panel, sums + i * PANEL, row + i); break;
        case DType::f16: finish_row<f16>(args, panel, sums + i * PANEL, row + i); break;
        }
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
