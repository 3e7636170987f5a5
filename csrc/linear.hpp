// Linear maps on packed weights: out = epilogue(x @ w^T). The one header that packing, drivers and leaves share.
//
// A packed weight is a row of panels of PANEL outputs each; a panel holds all inputs of its outputs, in an order that
// lets one vector register hold neighbouring outputs at the same input, so that products need no horizontal sums. With
// a step of s inputs and PANEL outputs n, panel p holds [K / s][PANEL][s] elements:
//
//   f32, f16 s = 1   one element
//   bf16     s = 2   a pair of neighbouring inputs, as vdpbf16ps takes them
//   i8, g8   s = 4   four bytes: the weight plus 128
//   g4       s = 8   four bytes; byte j holds input j in its low and input j + 4 in its high half (0..15)
//
// g8 and g4 have the scales of a group inside the panel, before its steps: linear_int.hpp.
//
// N is padded to whole panels and K to whole steps (groups: to whole groups) with zeros. One layout for all levels and
// all row counts: a weight exists once in memory, and a packed file may be read on another machine.
//
// With an activation the outputs are a gate [N / 2] and an up part [N / 2]; a panel then holds PANEL / 2 gate outputs
// followed by the PANEL / 2 up outputs that belong to them, and the result has N / 2 columns.
//
// Whatever the batch and the threads, an output is summed over its inputs in the same order: a row's result depends on
// that row alone.
#pragma once

#include "kernels.hpp"

#include <cstdint>

namespace pando {

constexpr int64_t PANEL = 64;

// i8: int8 with one scale per output. g8, g4: int8 and 4 bits with a scale (and an offset) per group of inputs.
enum class WeightKind : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, g8 = 4, g4 = 5 };

constexpr int NO_ACTIVATION = -1;

// Views; whoever made the weight keeps the memory alive. Everything per output is in panel order and padded.
struct PackedWeight {
    WeightKind kind;
    int64_t n, k;        // before padding; n counts gate and up
    int64_t group;       // inputs per scale; k for i8
    int activation;      // NO_ACTIVATION or an Activation
    int activation_bits; // 16 or 8, see QuantizedWeight in pando/kernels/weights.py
    const char* panels;  // aligned to 64
    const float* bias;   // [padded n] or null
    const float* scale;  // i8: [padded n]. g8, g4: a factor per output for the group scales, [padded n]
    bool has_offsets;    // g8, g4: groups have offsets
};

// Internal linkage: leaves of several levels include this, and the linker must not pick one level's copy for all.
static inline int64_t columns_per_panel(const PackedWeight& w) {
    return w.activation == NO_ACTIVATION ? PANEL : PANEL / 2;
}

// Columns of the result.
static inline int64_t num_columns(const PackedWeight& w) { return w.activation == NO_ACTIVATION ? w.n : w.n / 2; }

static inline int64_t num_panels(const PackedWeight& w) {
    return (num_columns(w) + columns_per_panel(w) - 1) / columns_per_panel(w);
}

static inline bool is_float(WeightKind kind) { return kind <= WeightKind::f16; }

struct LinearArgs {
    const PackedWeight* weight;
    DType x_dtype, out_dtype;
    const char* x;
    int64_t rows, x_stride; // of a row, in elements
    char* out;
    int64_t out_stride;
    bool accumulate; // out += result (the residual stream), rounded once
};

// Runs on all threads of the pool. Any number of rows, 0 included. The result of a row depends neither on the other
// rows nor on the number of threads.
void run_linear(const Kernels& kernels, const LinearArgs& args);

// The same for the integer kinds, to which run_linear passes them on.
void run_linear_int(const Kernels& kernels, const LinearArgs& args);

// ---- what the leaves of a family of weight kinds do (PanelKernels in kernels.hpp) ----

// Rows as PanelKernels::prepare leaves them, or as they are where PanelKernels::takes allows it.
struct PanelArgs {
    const PackedWeight* weight;
    const char* x;
    int64_t x_stride; // bytes
    DType out_dtype;
    char* out;
    int64_t out_stride; // elements
    bool accumulate;
};

struct PanelTask {
    int64_t row_begin, row_end;
    int64_t panel_begin, panel_end;
};

// ---- routed experts ----

// out[t] = sum over j of weights[t, j] * results[places[t, j]], in the order of j.
struct CombineArgs {
    DType dtype; // of out
    const float* results;
    const int64_t* places; // [tokens, top_k]: rows of results
    const float* weights;  // [tokens, top_k]
    int64_t top_k, size;
    char* out;
    int64_t out_stride;
};

// out[t] = sum over j of weights[t, j] * down[e](gate_up[e](x[t])) with e = ids[t, j]; summed in float32 in the order
// of j and rounded once. All gate_up are of one kind and shape, and so are all down.
struct ExpertsArgs {
    const PackedWeight* gate_up; // [num_experts]
    const PackedWeight* down;    // [num_experts]
    int64_t num_experts;
    DType dtype; // of x, of out and of what lies between the two products
    const char* x;
    int64_t tokens, x_stride;
    const int64_t* ids;   // [tokens, top_k]
    const float* weights; // [tokens, top_k]
    int64_t top_k;
    char* out;
    int64_t out_stride;
};

// Float kinds only. Throws std::invalid_argument on an id out of range.
void run_experts(const Kernels& kernels, const ExpertsArgs& args);

// ---- packing ----

struct FloatSource {
    DType dtype;
    const char* data;
    int64_t row_stride; // elements; a row is contiguous
};

// Bytes of the panels of a float kind.
int64_t panel_bytes(WeightKind kind, int64_t n, int64_t k, int activation);

// For memory not touched yet: first touches cost a page fault each, and panels are streamed. A matter of speed only, so
// that a refusal is no error.
void ask_for_huge_pages(char* data, int64_t bytes);

// Backs memory as if all of it were written; its contents stay, and others may use it meanwhile. False where the system
// has no such call.
bool populate(char* data, int64_t bytes);

// Fills the panels of a float kind from [n, k] on all threads, converting from another dtype.
void pack_float(WeightKind kind, const FloatSource& source, int64_t n, int64_t k, int activation, char* panels);

// The row of a source of n outputs that a slot of a panel holds, -1 for padding.
int64_t source_row(int64_t n, int activation, int64_t panel, int64_t slot);

// Something per output [n] (a bias, a scale) in panel order [padded n], zeros in the padding.
void pack_outputs(const float* source, int64_t n, int activation, float* out);

} // namespace pando
