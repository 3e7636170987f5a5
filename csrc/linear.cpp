#include "linear.hpp"

#include "stripes.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace pando {

namespace {

// Bytes of prepared rows a task multiplies with panel after panel: they stay in the second-level cache.
constexpr int64_t ROWS_BYTES = 512 << 10;
constexpr int64_t MIN_ROWS = 48, MAX_ROWS = 192; // of a task, where the batch has so many
constexpr int64_t TILE = 6;
// Tasks per thread, so that all finish at about the same time; more only make each read further into its neighbour.
constexpr int64_t TASKS_PER_THREAD = 16;
// Bytes of panels below which a product is not worth waking a thread for, and elements of rows to prepare.
constexpr int64_t SMALL_BYTES = 96 << 10;
constexpr int64_t SMALL_ELEMENTS = 1 << 15;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

template <class Body>
void for_each(int64_t n, bool small, const Body& body) {
    if (small) {
        for (int64_t i = 0; i < n; ++i) body(i);
    } else {
        parallel_stripes(n, body);
    }
}

// Rows [0, rows) of one product times all panels, as a grid of tasks: the panels of one block of rows follow each
// other.
struct Grid {
    int64_t rows, panels, row_block, panel_block, down, across;

    Grid(int64_t num_rows, int64_t num_panels, int64_t row_bytes, int64_t threads)
        : rows(num_rows), panels(num_panels) {
        row_block = std::clamp(ROWS_BYTES / std::max<int64_t>(1, row_bytes), MIN_ROWS, MAX_ROWS);
        while (row_block > MIN_ROWS && panels * ceil_div(rows, row_block) < 4 * threads) row_block /= 2;
        row_block = ceil_div(ceil_div(rows, ceil_div(rows, row_block)), TILE) * TILE;
        down = ceil_div(rows, row_block);
        panel_block = std::max<int64_t>(1, panels * down / (TASKS_PER_THREAD * threads));
        across = ceil_div(panels, panel_block);
    }

    int64_t size() const { return down * across; }

    PanelTask task(int64_t i) const {
        const int64_t row = i / across * row_block, panel = i % across * panel_block;
        return {row, std::min(rows, row + row_block), panel, std::min(panels, panel + panel_block)};
    }
};

const PanelKernels& panel_kernels(const Kernels& kernels, const PackedWeight& weight) {
    return is_float(weight.kind) ? kernels.float_panels : kernels.int_panels;
}

bool is_small(const PackedWeight& weight, int64_t rows) {
    return num_panels(weight) * PANEL * weight.k * (1 + rows / 16) < SMALL_BYTES / 2;
}

// Where the rows of a product are and how far apart: as they came, or prepared in `room`.
struct PreparedRows {
    const char* data;
    int64_t stride; // bytes
};

PreparedRows prepare_rows(const PanelKernels& panels, const PackedWeight& weight, DType dtype, const char* x,
                          int64_t rows, int64_t stride, char* room) {
    const int64_t from = stride * element_bytes(dtype), to = panels.row_bytes(weight);
    if (panels.takes(weight, dtype)) return {x, from};
    for_each(rows, rows * weight.k < SMALL_ELEMENTS,
             [&](int64_t row) { panels.prepare(weight, dtype, x + row * from, room + row * to); });
    return {room, to};
}

int64_t prepared_bytes(const PanelKernels& panels, const PackedWeight& weight, DType dtype, int64_t rows) {
    return panels.takes(weight, dtype) ? 0 : rows * panels.row_bytes(weight);
}

} // namespace

void run_linear(const Kernels& kernels, const LinearArgs& args) {
    const PackedWeight& weight = *args.weight;
    if (!is_float(weight.kind)) return run_linear_int(kernels, args);
    const PanelKernels& panels = kernels.float_panels;
    if (args.rows <= 0 || num_columns(weight) <= 0) return;
    char* room =
        thread_scratch(Scratch::plan, static_cast<size_t>(prepared_bytes(panels, weight, args.x_dtype, args.rows)));
    const PreparedRows rows = prepare_rows(panels, weight, args.x_dtype, args.x, args.rows, args.x_stride, room);
    const PanelArgs panel_args{&weight,  rows.data,       rows.stride,    args.out_dtype,
                               args.out, args.out_stride, args.accumulate};
    const Grid grid(args.rows, num_panels(weight), panels.row_bytes(weight), num_threads());
    const size_t scratch = static_cast<size_t>(panels.scratch(weight, grid.row_block));
    for_each(grid.size(), is_small(weight, args.rows),
             [&](int64_t i) { panels.multiply(panel_args, grid.task(i), thread_scratch(Scratch::task, scratch)); });
}

// ---- routed experts ----

namespace {

// Assignments (token, choice) in the order of their experts.
struct Routing {
    int64_t* begin;  // [num_experts + 1]: first assignment of each expert
    int64_t* source; // [assignments]: token of the assignment at a place
    int64_t* place;  // [tokens, top_k]: place of an assignment
};

void sort_by_expert(const ExpertsArgs& args, Routing& routing) {
    const int64_t count = args.tokens * args.top_k;
    std::fill(routing.begin, routing.begin + args.num_experts + 1, 0);
    for (int64_t i = 0; i < count; ++i) {
        if (args.ids[i] < 0 || args.ids[i] >= args.num_experts) throw std::invalid_argument("topk_ids out of range");
        ++routing.begin[args.ids[i] + 1];
    }
    for (int64_t e = 0; e < args.num_experts; ++e) routing.begin[e + 1] += routing.begin[e];
    for (int64_t i = 0; i < count; ++i) {
        const int64_t place = routing.begin[args.ids[i]]++;
        routing.place[i] = place;
        routing.source[place] = i / args.top_k;
    }
    for (int64_t e = args.num_experts; e > 0; --e) routing.begin[e] = routing.begin[e - 1];
    routing.begin[0] = 0;
}

struct ExpertTask {
    const PackedWeight* weight;
    PanelTask task;
};

// One product of every expert that has rows. Returns the number of tasks; counts only if tasks is null.
int64_t plan_experts(const PanelKernels& panels, const PackedWeight* weights, int64_t experts, const int64_t* begin,
                     ExpertTask* tasks) {
    int64_t count = 0;
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t rows = begin[e + 1] - begin[e];
        if (rows == 0) continue;
        const Grid grid(rows, num_panels(weights[e]), panels.row_bytes(weights[e]), num_threads());
        for (int64_t i = 0; tasks != nullptr && i < grid.size(); ++i) {
            PanelTask task = grid.task(i);
            task.row_begin += begin[e];
            task.row_end += begin[e];
            tasks[count + i] = {&weights[e], task};
        }
        count += grid.size();
    }
    return count;
}

void multiply_experts(const PanelKernels& panels, const PackedWeight* weights, int64_t experts, const int64_t* begin,
                      PanelArgs args, ExpertTask* tasks) {
    const int64_t count = plan_experts(panels, weights, experts, begin, tasks);
    const size_t scratch = static_cast<size_t>(panels.scratch(weights[0], MAX_ROWS));
    for_each(count, is_small(weights[0], begin[experts]), [&](int64_t i) {
        PanelArgs own = args;
        own.weight = tasks[i].weight;
        panels.multiply(own, tasks[i].task, thread_scratch(Scratch::task, scratch));
    });
}

// Hands out 64-byte aligned pieces of one buffer; with a null buffer it only counts.
struct Pieces {
    char* base;
    int64_t used = 0;

    char* take(int64_t bytes) {
        char* piece = base == nullptr ? nullptr : base + used;
        used += ceil_div(bytes, 64) * 64;
        return piece;
    }
};

struct ExpertBuffers {
    Routing routing;
    char *x, *between, *prepared;
    float* results;
    ExpertTask* tasks;

    ExpertBuffers(Pieces& pieces, const ExpertsArgs& args, const PanelKernels& panels) {
        const int64_t count = args.tokens * args.top_k;
        const PackedWeight &first = args.gate_up[0], &second = args.down[0];
        routing.begin = reinterpret_cast<int64_t*>(pieces.take((args.num_experts + 1) * 8));
        routing.source = reinterpret_cast<int64_t*>(pieces.take(count * 8));
        routing.place = reinterpret_cast<int64_t*>(pieces.take(count * 8));
        x = pieces.take(count * panels.row_bytes(first));
        between = pieces.take(count * second.k * element_bytes(args.dtype));
        prepared = pieces.take(prepared_bytes(panels, second, args.dtype, count));
        results = reinterpret_cast<float*>(pieces.take(count * second.n * 4));
        // No block of rows but an expert's last is shorter than half of MIN_ROWS.
        const int64_t blocks = std::min(count, args.num_experts) + count / (MIN_ROWS / 2);
        const int64_t most = std::max(num_panels(first), num_panels(second));
        tasks = reinterpret_cast<ExpertTask*>(pieces.take(blocks * most * static_cast<int64_t>(sizeof(ExpertTask))));
    }
};

// Prepared rows of the assignments, in the order of their experts.
void gather_rows(const ExpertsArgs& args, const PanelKernels& panels, const ExpertBuffers& buffers) {
    const PackedWeight& weight = args.gate_up[0];
    const int64_t count = args.tokens * args.top_k, to = panels.row_bytes(weight);
    for_each(count, count * weight.k < SMALL_ELEMENTS, [&](int64_t i) {
        const char* row = args.x + buffers.routing.source[i] * args.x_stride * element_bytes(args.dtype);
        panels.prepare(weight, args.dtype, row, buffers.x + i * to);
    });
}

} // namespace

void run_experts(const Kernels& kernels, const ExpertsArgs& args) {
    const int64_t count = args.tokens * args.top_k;
    if (args.tokens == 0 || args.num_experts == 0) return;
    const PackedWeight &first = args.gate_up[0], &second = args.down[0];
    const PanelKernels& panels = panel_kernels(kernels, first);
    Pieces pieces{nullptr};
    ExpertBuffers(pieces, args, panels);
    pieces = {thread_scratch(Scratch::plan, static_cast<size_t>(pieces.used))};
    ExpertBuffers buffers(pieces, args, panels);
    sort_by_expert(args, buffers.routing);
    gather_rows(args, panels, buffers);
    multiply_experts(panels, args.gate_up, args.num_experts, buffers.routing.begin,
                     {nullptr, buffers.x, panels.row_bytes(first), args.dtype, buffers.between, second.k, false},
                     buffers.tasks);
    const PreparedRows between =
        prepare_rows(panels, second, args.dtype, buffers.between, count, second.k, buffers.prepared);
    multiply_experts(
        panels, args.down, args.num_experts, buffers.routing.begin,
        {nullptr, between.data, between.stride, DType::f32, reinterpret_cast<char*>(buffers.results), second.n, false},
        buffers.tasks);
    const CombineArgs combine{args.dtype, buffers.results, buffers.routing.place, args.weights, args.top_k,
                              second.n,   args.out,        args.out_stride};
    for_each(args.tokens, count * second.n < SMALL_ELEMENTS,
             [&](int64_t token) { kernels.combine(combine, token, token + 1); });
}

} // namespace pando
