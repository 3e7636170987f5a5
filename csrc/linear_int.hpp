// Linear maps with integer weights (i8, g8, g4): how their panels look inside, and what the driver asks of the leaves.
//
// Weights are unsigned bytes here, activations signed ones: vpdpbusd wants one operand of each, and this way round it
// is the activations, four at a time, that are broadcast from memory, and an offset of the weights costs one number
// per row and group, not per output. The weight's integer is its stored byte minus `zero`: 128 for 8 bits, 8 for 4.
// The product of a group therefore starts at -zero * (sum of the group's activations), and all sums are exact.
//
// i8 panel: [steps][PANEL][4] bytes. g8 and g4 panel, one stream of memory for one prefetcher:
//
//   [groups] of { scale  float16 [PANEL]
//                 shift  float16 [PANEL]          if the weight has offsets
//                 bytes  [steps][PANEL][4] }
//
// A step is 4 inputs (g4: 8, byte j holds input j in its low and input j + 4 in its high half). A group is padded to
// whole steps. The scale of a group is its float16 times the factor of the output (PackedWeight::scale), a power of
// two, so that float16 and bfloat16 scales are kept exactly. An offset is kept as what it adds to the integer, beyond
// the zero above: exact for zero points that are integers, and nothing at all for symmetric weights.
//
// Activations are rounded once per call: 8 bits, q = x / s to nearest even with s = max |x| / 127 per row and group; or
// 16 bits, q = 256 * high + low with s = max |x| / 32639, so that both are signed bytes. The two terms are two rows of
// the same product, with the scales 256 * s and s, which the epilogue adds.
#pragma once

#include "linear.hpp"

namespace pando {

constexpr int64_t STEP_BYTES = PANEL * 4;

struct IntShape {
    int64_t groups; // 1 for i8
    int64_t group_steps;
    int64_t step_inputs;
    int64_t head_bytes; // scales and shifts of a group
    int32_t zero;
    int64_t padded_group;  // inputs
    int64_t padded_inputs; // values of a term, see below
    int64_t group_bytes;
    int64_t panel_bytes;
};

// Internal linkage: leaves of several levels include this, and the linker must not pick one level's copy for all.
static inline IntShape int_shape(const PackedWeight& w) {
    IntShape shape;
    shape.step_inputs = w.kind == WeightKind::g4 ? 8 : 4;
    shape.groups = (w.k + w.group - 1) / w.group;
    shape.group_steps = (w.group + shape.step_inputs - 1) / shape.step_inputs;
    shape.head_bytes = w.kind == WeightKind::i8 ? 0 : PANEL * (w.has_offsets ? 4 : 2);
    shape.zero = w.kind == WeightKind::g4 ? 8 : 128;
    shape.padded_group = shape.group_steps * shape.step_inputs;
    shape.padded_inputs = shape.groups * shape.padded_group;
    shape.group_bytes = shape.head_bytes + shape.group_steps * STEP_BYTES;
    shape.panel_bytes = shape.groups * shape.group_bytes;
    return shape;
}

// A prepared row of activations, [terms] of { values int8 [padded inputs], GroupSums [groups] }: all terms of all rows are
// rows of one matrix.
struct GroupSums {
    int32_t start; // -zero * (sum of the values)
    float scale;   // NaN if the group has an infinity or a NaN; its values are 0 then
    float sum;     // of the values
};

// A quantised weight as it comes, see QuantizedWeight in pando/kernels/weights.py. Contiguous.
struct IntSource {
    int64_t n, k, group;
    int bits;
    int activation;
    const uint8_t* values; // [n, k]; signed for 8 bits
    const float* scale;    // [n, groups]
    const float* offset;   // the same, or null
};

// Kind, sizes and has_offsets of the packed weight. Throws std::invalid_argument if the scheme can not be packed.
PackedWeight plan_int(const IntSource& source);

// ---- rounding float weights while they are packed ----

// A row of a float weight to round. bits 8: one scale. bits 4: a scale and an offset per group of inputs.
struct RoundArgs {
    DType dtype;
    const char* row;
    int64_t k, group;
    int bits;
    uint8_t* values; // [k]
    float* scale;    // [groups]
    float* offset;   // [groups], bits 4 only
    float* scratch;  // bits 4: ROUND_SCRATCH floats, aligned to 64
};

// Inputs of a group at most, where bits are 4, and floats that hold eight of them and their codes.
constexpr int64_t MAX_ROUND_GROUP = 128, ROUND_SCRATCH = 2 * 8 * MAX_ROUND_GROUP;

// Floats that hold a group: a power of two, whole vectors on every level.
static inline int64_t round_room(int64_t group) {
    int64_t room = 16;
    while (room < group) room *= 2;
    return room;
}

// A float weight [n, k] that lies in several matrices, one after another.
struct RoundSource {
    struct Part {
        FloatSource rows;
        int64_t n;
    };
    const Part* parts;
    int64_t num_parts;
    int64_t n, k, group;
    int bits;
    int activation;
};

// As plan_int. With 4 bits groups always have offsets.
PackedWeight plan_rounded(int64_t n, int64_t k, int64_t group, int bits, int activation);

// Rounds and packs panel by panel: nothing but the panels is ever held whole. The same bytes as rounding first and
// pack_int afterwards.
void pack_rounded(const Kernels& kernels, const RoundSource& source, char* panels, float* scale);

// Fills the buffers of the planned weight, on all threads: num_panels * panel_bytes, and a float per padded output.
void pack_int(const IntSource& source, char* panels, float* scale);

} // namespace pando
