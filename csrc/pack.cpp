// Packing: from rows of outputs to panels (see linear.hpp), straight into the memory the kernels read.
#include "linear.hpp"
#include "threads.hpp"

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// The conversions between the float types, compiled for any processor.
#define PANDO_LEVEL packing
#define PANDO_VECTOR_BYTES 16
#include "kernels/simd.hpp"

namespace pando {

int64_t source_row(int64_t n, int activation, int64_t panel, int64_t slot) {
    if (activation == NO_ACTIVATION) {
        const int64_t row = panel * PANEL + slot;
        return row < n ? row : -1;
    }
    const int64_t half = PANEL / 2, row = panel * half + slot % half;
    return row < n / 2 ? row + (slot < half ? 0 : n / 2) : -1;
}

namespace {

using packing::bf16;
using packing::f16;

// Inputs written at once: their part of a panel stays in the first-level cache while 64 rows are scattered into it.
constexpr int64_t CHUNK = 256;
// Rows of the source fetched ahead.
constexpr int64_t AHEAD = 4;

template <class From, class To>
void convert(const From* from, To* to, int64_t n) {
    if constexpr (std::is_same_v<From, To>) {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(To));
    } else {
        packing::for_row(
            n, [&](int64_t i) { packing::store(to + i, packing::load(from + i)); },
            [&](int64_t i, int64_t rest) { packing::store_first(to + i, packing::load_first(from + i, rest), rest); });
    }
}

// The processor does not see rows far apart coming. An address behind the last row does no harm.
template <class T>
void prefetch(const T* data, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(data + i);
}

// Step is what a slot of a panel holds per step: an element or a pair of them.
template <class From, class To, class Step>
void pack_panel(const FloatSource& source, int64_t n, int64_t k, int activation, int64_t panel, char* out) {
    constexpr int64_t INPUTS = sizeof(Step) / sizeof(To);
    const int64_t steps = (k + INPUTS - 1) / INPUTS;
    Step* to = reinterpret_cast<Step*>(out);
    for (int64_t from = 0; from < k; from += CHUNK) {
        const int64_t inputs = std::min(CHUNK, k - from);
        const int64_t first = from / INPUTS, last = std::min(steps, (from + CHUNK) / INPUTS);
        for (int64_t slot = 0; slot < PANEL; ++slot) {
            Step values[CHUNK / INPUTS] = {};
            const int64_t row = source_row(n, activation, panel, slot);
            if (row >= 0) {
                const From* data = reinterpret_cast<const From*>(source.data) + row * source.row_stride + from;
                prefetch(data + AHEAD * source.row_stride, inputs);
                convert(data, reinterpret_cast<To*>(values), inputs);
            }
            for (int64_t step = first; step < last; ++step) to[step * PANEL + slot] = values[step - first];
        }
    }
}

template <class To, class Step>
void pack_panels(const FloatSource& source, int64_t n, int64_t k, int activation, int64_t panels, int64_t bytes,
                 char* out) {
    parallel_for(panels, [&](int64_t panel) {
        char* to = out + panel * bytes;
        switch (source.dtype) {
        case DType::f32: return pack_panel<float, To, Step>(source, n, k, activation, panel, to);
        case DType::bf16: return pack_panel<bf16, To, Step>(source, n, k, activation, panel, to);
        case DType::f16: return pack_panel<f16, To, Step>(source, n, k, activation, panel, to);
        }
    });
}

// For the whole small pages of a range.
[[maybe_unused]] bool advise([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes, [[maybe_unused]] int advice) {
#if defined(__linux__)
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    return end <= begin || madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
#else
    return false;
#endif
}

PackedWeight shape_only(WeightKind kind, int64_t n, int64_t k, int activation) {
    PackedWeight weight{};
    weight.kind = kind;
    weight.n = n;
    weight.k = k;
    weight.activation = activation;
    return weight;
}

} // namespace

void ask_for_huge_pages([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    advise(data, bytes, MADV_HUGEPAGE);
#endif
}

bool populate([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
    return advise(data, bytes, MADV_POPULATE_WRITE);
#else
    return false;
#endif
}

int64_t panel_bytes(WeightKind kind, int64_t n, int64_t k, int activation) {
    const int64_t inputs = kind == WeightKind::bf16 ? (k + 1) / 2 * 2 : k;
    const int64_t each = kind == WeightKind::f32 ? 4 : 2;
    return num_panels(shape_only(kind, n, k, activation)) * PANEL * inputs * each;
}

void pack_float(WeightKind kind, const FloatSource& source, int64_t n, int64_t k, int activation, char* panels) {
    const int64_t count = num_panels(shape_only(kind, n, k, activation));
    const int64_t bytes = panel_bytes(kind, n, k, activation);
    if (bytes == 0) return;
    switch (kind) {
    case WeightKind::bf16: return pack_panels<bf16, uint32_t>(source, n, k, activation, count, bytes / count, panels);
    case WeightKind::f16: return pack_panels<f16, f16>(source, n, k, activation, count, bytes / count, panels);
    default: return pack_panels<float, float>(source, n, k, activation, count, bytes / count, panels);
    }
}

void pack_outputs(const float* source, int64_t n, int activation, float* out) {
    const int64_t count = num_panels(shape_only(WeightKind::f32, n, 1, activation));
    for (int64_t i = 0; i < count * PANEL; ++i) {
        const int64_t row = source_row(n, activation, i / PANEL, i % PANEL);
        out[i] = row < 0 ? 0.0f : source[row];
    }
}

} // namespace pando
