// Packs quantised weights into panels.
#include "linear_int.hpp"

#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace pando {

namespace {

constexpr int64_t MAX_INPUTS = 1 << 17; // of a group: its product stays below 2^31
constexpr float MAX_SHIFT = 60000.0f;   // of a float16, in units of the scale
constexpr int HALF_EXPONENT = 14;       // the largest scale of an output lies in [2^14, 2^15) of its factor

int64_t num_groups(const IntSource& source) { return (source.k + source.group - 1) / source.group; }

// What an offset is beyond the zero that the panel's integers already have.
float residual(const IntSource& source, int64_t row, int64_t group) {
    const int64_t at = row * num_groups(source) + group;
    const float offset = source.offset == nullptr ? 0.0f : source.offset[at];
    return source.bits == 4 ? offset + 8.0f * source.scale[at] : offset;
}

bool has_residuals(const IntSource& source) {
    if (source.bits == 8 && source.offset == nullptr) return false;
    std::atomic<bool> found{false};
    constexpr int64_t ROWS = 256;
    parallel_for((source.n + ROWS - 1) / ROWS, [&](int64_t piece) {
        for (int64_t row = piece * ROWS; row < std::min(source.n, (piece + 1) * ROWS) && !found; ++row) {
            for (int64_t group = 0; group < num_groups(source); ++group) {
                if (residual(source, row, group) != 0.0f) found = true;
            }
        }
    });
    return found;
}

// To nearest, ties to even; |x| < 65520 or NaN.
uint16_t half_from(float x) {
    if (x != x) return 0x7e00;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (magnitude < 0x1p-14f) return static_cast<uint16_t>(sign | std::lrintf(magnitude * 0x1p24f));
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    bits += 0xfffu + ((bits >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)));
}

// A group as it is packed: w = scale * (integer - zero + shift).
struct GroupScale {
    float scale, shift;
    bool flat; // all integers are zero
};

// A scale that is nothing beside the offset gives way to it.
GroupScale group_scale(const IntSource& source, int64_t row, int64_t group) {
    const float scale = source.scale[row * num_groups(source) + group], rest = residual(source, row, group);
    const float shift = rest == 0.0f ? 0.0f : rest / scale;
    if (std::fabs(shift) > MAX_SHIFT) return {rest, 1.0f, true};
    return {scale, shift, false};
}

// The number an output's group scales are divided by.
float factor(const IntSource& source, bool has_offsets, int64_t row) {
    const int64_t groups = num_groups(source);
    if (groups == 1 && !has_offsets) return source.scale[row];
    float largest = 0.0f;
    for (int64_t group = 0; group < groups; ++group)
        largest = std::fmax(largest, std::fabs(group_scale(source, row, group).scale));
    if (largest == 0.0f || !std::isfinite(largest)) return 1.0f;
    int exponent;
    std::frexp(largest, &exponent); // largest = m * 2^exponent, m in [0.5, 1)
    return std::ldexp(1.0f, std::max(exponent - HALF_EXPONENT - 1, -126));
}

void pack_head(const GroupScale& group, bool has_offsets, float factor, char* head) {
    const uint16_t scale = half_from(group.scale / factor), shift = half_from(group.shift);
    std::memcpy(head, &scale, 2);
    if (has_offsets) std::memcpy(head + PANEL * 2, &shift, 2);
}

// Up to four values as bytes of a word; missing ones are 0.
uint32_t word(const uint8_t* values, int64_t count) {
    uint32_t bytes = 0;
    if (count >= 4) {
        std::memcpy(&bytes, values, 4);
    } else if (count > 0) {
        std::memcpy(&bytes, values, static_cast<size_t>(count));
    }
    return bytes;
}

void pack_group(const IntSource& source, const IntShape& shape, int64_t row, int64_t group, bool flat, char* out) {
    const int64_t first = group * source.group, count = std::min(source.group, source.k - first);
    const uint8_t* values = source.values + row * source.k + first;
    for (int64_t step = 0; step < shape.group_steps; ++step, out += STEP_BYTES) {
        const int64_t at = step * shape.step_inputs;
        const uint32_t low = word(values + at, count - at);
        const uint32_t zeros = source.bits == 4 ? 0x88888888u : 0x80808080u;
        const uint32_t packed = flat               ? zeros
                                : source.bits == 4 ? low | word(values + at + 4, count - at - 4) << 4
                                                   : low ^ 0x80808080u;
        std::memcpy(out, &packed, 4);
    }
}

// row: of the source, -1 for padding.
void pack_output(const IntSource& source, const PackedWeight& plan, const IntShape& shape, int64_t row, int64_t output,
                 char* panel, float* scale) {
    const int64_t inside = output % PANEL;
    scale[output] = row < 0 ? 0.0f : factor(source, plan.has_offsets, row);
    for (int64_t group = 0; group < shape.groups; ++group) {
        char* at = panel + group * shape.group_bytes;
        if (row < 0) {
            for (int64_t head = 0; head < shape.head_bytes; head += PANEL * 2)
                std::memset(at + head + inside * 2, 0, 2);
            for (int64_t step = 0; step < shape.group_steps; ++step)
                std::memset(at + shape.head_bytes + step * STEP_BYTES + inside * 4, 0, 4);
        } else {
            GroupScale one{scale[output], 0.0f, false};
            if (shape.groups > 1 || plan.has_offsets) one = group_scale(source, row, group);
            if (shape.head_bytes > 0) pack_head(one, plan.has_offsets, scale[output], at + inside * 2);
            pack_group(source, shape, row, group, one.flat, at + shape.head_bytes + inside * 4);
        }
    }
}

} // namespace

PackedWeight plan_int(const IntSource& source) {
    const int64_t groups = num_groups(source);
    if (groups > 1 && source.group % 4 != 0) throw std::invalid_argument("groups must be multiples of 4 inputs");
    if (source.group > MAX_INPUTS) throw std::invalid_argument("more than 131,072 inputs share a scale");
    PackedWeight plan{};
    plan.n = source.n;
    plan.k = source.k;
    plan.group = source.group;
    plan.activation = source.activation;
    plan.has_offsets = has_residuals(source);
    plan.kind = source.bits == 4 ? WeightKind::g4 : groups == 1 && !plan.has_offsets ? WeightKind::i8 : WeightKind::g8;
    return plan;
}

void pack_int(const IntSource& source, char* panels, float* scale) {
    const PackedWeight plan = plan_int(source);
    const IntShape shape = int_shape(plan);
    parallel_for(num_panels(plan), [&](int64_t panel) {
        for (int64_t inside = 0; inside < PANEL; ++inside) {
            const int64_t row = source_row(plan.n, plan.activation, panel, inside);
            pack_output(source, plan, shape, row, panel * PANEL + inside, panels + panel * shape.panel_bytes, scale);
        }
    });
}

PackedWeight plan_rounded(int64_t n, int64_t k, int64_t group, int bits, int activation) {
    if (k > MAX_INPUTS && bits == 8) throw std::invalid_argument("more than 131,072 inputs share a scale");
    if (bits == 4 && std::min(group, k) > MAX_ROUND_GROUP)
        throw std::invalid_argument("groups of more than 128 inputs");
    if (group < k && group % 4 != 0) throw std::invalid_argument("groups must be multiples of 4 inputs");
    PackedWeight plan{};
    plan.n = n;
    plan.k = k;
    plan.group = bits == 8 ? k : std::min(group, k);
    plan.activation = activation;
    plan.has_offsets = bits == 4;
    plan.kind = bits == 4 ? WeightKind::g4 : WeightKind::i8;
    return plan;
}

void pack_rounded(const Kernels& kernels, const RoundSource& source, char* panels, float* scale) {
    const PackedWeight plan = plan_rounded(source.n, source.k, source.group, source.bits, source.activation);
    const IntShape shape = int_shape(plan);
    const size_t lines = static_cast<size_t>(PANEL * shape.groups);
    parallel_for(num_panels(plan), [&](int64_t panel) {
        // A panel's rows: [scratch][scales][offsets] floats, values.
        const size_t floats = ROUND_SCRATCH + 2 * lines;
        const size_t bytes = floats * sizeof(float) + static_cast<size_t>(PANEL * source.k);
        float* const work = reinterpret_cast<float*>(thread_scratch(Scratch::task, bytes));
        float* const scales = work + ROUND_SCRATCH;
        float* const offsets = scales + lines;
        uint8_t* const values = reinterpret_cast<uint8_t*>(offsets + lines);
        const IntSource local{PANEL,         plan.k, plan.group, source.bits,
                              NO_ACTIVATION, values, scales,     source.bits == 4 ? offsets : nullptr};
        for (int64_t inside = 0; inside < PANEL; ++inside) {
            int64_t row = source_row(plan.n, plan.activation, panel, inside);
            if (row >= 0) {
                const RoundSource::Part* part = source.parts;
                while (row >= part->n) row -= part++->n;
                const int64_t width = part->rows.dtype == DType::f32 ? 4 : 2;
                kernels.round_row({part->rows.dtype, part->rows.data + row * part->rows.row_stride * width, plan.k,
                                   plan.group, source.bits, values + inside * plan.k, scales + inside * shape.groups,
                                   offsets + inside * shape.groups, work});
                row = inside;
            }
            pack_output(local, plan, shape, row, panel * PANEL + inside, panels + panel * shape.panel_bytes, scale);
        }
    });
}

} // namespace pando
