// Runs integer linear maps: rounds the activations once per call, then cuts rows and panels into tasks.
#include "linear_int.hpp"

#include "stripes.hpp"

#include <algorithm>

namespace pando {

namespace {

// Rows of one pass; bounds the memory of rounded activations, and costs one more pass over the weights per so many.
constexpr int64_t PASS_ROWS = 1024;
// Bytes and rows of the activations of one task: they stay in the second-level cache while panels stream by. Fewer
// where there would be less than so many tasks per thread to share evenly.
constexpr int64_t TASK_ACTIVATIONS = 384 << 10, MIN_TASK_ROWS = 48, MAX_TASK_ROWS = 192, FAIR_TASKS = 24;
// Bytes of weights a task of few rows reads.
constexpr int64_t TASK_BYTES = 64 << 10;
// Elements rounded by one piece, and multiply-adds of a call below which the caller works alone.
constexpr int64_t ROUND_PIECE = 1 << 14;
constexpr int64_t SMALL = 1 << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void prepare_rows(const PanelKernels& kernels, const LinearArgs& args, int64_t row_bytes, char* prepared) {
    const int64_t width = args.x_dtype == DType::f32 ? 4 : 2;
    const int64_t per_piece = std::max<int64_t>(1, ROUND_PIECE / std::max<int64_t>(1, args.weight->k));
    parallel_for(ceil_div(args.rows, per_piece), [&](int64_t piece) {
        for (int64_t row = piece * per_piece; row < std::min(args.rows, (piece + 1) * per_piece); ++row) {
            kernels.prepare(*args.weight, args.x_dtype, args.x + row * args.x_stride * width,
                            prepared + row * row_bytes);
        }
    });
}

int64_t num_row_blocks(int64_t rows, int64_t panels, int64_t row_bytes) {
    const int64_t most = std::clamp(TASK_ACTIVATIONS / row_bytes, MIN_TASK_ROWS, MAX_TASK_ROWS);
    const int64_t fair = ceil_div(FAIR_TASKS * num_threads(), panels);
    return std::max(ceil_div(rows, most), std::min(fair, rows / MIN_TASK_ROWS));
}

void run_pass(const PanelKernels& kernels, const LinearArgs& args) {
    const PackedWeight& weight = *args.weight;
    const int64_t row_bytes = kernels.row_bytes(weight), panels = num_panels(weight);
    char* prepared = thread_scratch(Scratch::plan, static_cast<size_t>(args.rows * row_bytes));
    prepare_rows(kernels, args, row_bytes, prepared);
    const PanelArgs call{&weight, prepared, row_bytes, args.out_dtype, args.out, args.out_stride, args.accumulate};
    const int64_t row_blocks = num_row_blocks(args.rows, panels, row_bytes);
    const int64_t rows = ceil_div(args.rows, row_blocks);
    const size_t scratch_bytes = static_cast<size_t>(kernels.scratch(weight, rows));
    if (args.rows * weight.n * weight.k < SMALL) {
        for (int64_t row = 0; row < args.rows; row += rows)
            kernels.multiply(call, {row, std::min(args.rows, row + rows), 0, panels},
                             thread_scratch(Scratch::task, scratch_bytes));
        return;
    }
    const int64_t per_task = std::max<int64_t>(1, args.rows > 16 ? 1 : TASK_BYTES / int_shape(weight).panel_bytes);
    const int64_t tasks = ceil_div(panels, per_task);
    parallel_stripes(row_blocks * tasks, [&](int64_t i) {
        const int64_t row = i / tasks * rows, panel = i % tasks * per_task;
        kernels.multiply(call, {row, std::min(args.rows, row + rows), panel, std::min(panels, panel + per_task)},
                         thread_scratch(Scratch::task, scratch_bytes));
    });
}

} // namespace

void run_linear_int(const Kernels& kernels, const LinearArgs& args) {
    const int64_t x_width = args.x_dtype == DType::f32 ? 4 : 2, out_width = args.out_dtype == DType::f32 ? 4 : 2;
    for (int64_t row = 0; row < args.rows; row += PASS_ROWS) {
        LinearArgs part = args;
        part.rows = std::min(PASS_ROWS, args.rows - row);
        part.x += row * args.x_stride * x_width;
        part.out += row * args.out_stride * out_width;
        run_pass(kernels.int_panels, part);
    }
}

} // namespace pando
