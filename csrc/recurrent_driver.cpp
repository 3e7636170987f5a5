#include "recurrent.hpp"

#include "threads.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pando {

namespace {

// State elements times tokens below which a call runs on the caller alone: some microseconds.
constexpr int64_t SMALL = 1 << 15;

[[noreturn]] void out_of_range(const char* what) { throw std::invalid_argument(std::string(what) + " out of range"); }

void check(const RecurrentStep& step) {
    if (step.num_rows == 0 ? step.num_saves > 0 : step.cu_q_lens[0] < 0) out_of_range("cu_q_lens");
    for (int64_t row = 0; row < step.num_rows; ++row) {
        const int64_t begin = step.cu_q_lens[row], end = step.cu_q_lens[row + 1];
        if (end < begin || end > step.num_tokens) out_of_range("cu_q_lens");
        if (end > begin && (step.slots[row] < 0 || step.slots[row] >= step.num_slots)) out_of_range("slots");
    }
    for (int64_t i = 0; i < step.num_saves; ++i) {
        const int64_t token = step.save_token[i], slot = step.save_slot[i];
        if (token < step.cu_q_lens[0] || token >= step.cu_q_lens[step.num_rows]) out_of_range("save_token");
        if (slot < 0 || slot >= step.num_slots) out_of_range("save_slot");
    }
}

// The saves in the order of their tokens.
const StateSave* sorted_saves(const RecurrentStep& step) {
    const size_t bytes = static_cast<size_t>(step.num_saves) * sizeof(StateSave);
    StateSave* saves = reinterpret_cast<StateSave*>(thread_scratch(Scratch::plan, bytes));
    for (int64_t i = 0; i < step.num_saves; ++i) saves[i] = {step.save_token[i], step.save_slot[i]};
    std::sort(saves, saves + step.num_saves, [](const StateSave& a, const StateSave& b) { return a.token < b.token; });
    return saves;
}

// How a row's units are cut: `unit_step` units of a task, `part_step` of the `parts` of each.
struct Cut {
    int64_t units, unit_step, parts, part_step;
};

int64_t pieces(int64_t n, int64_t step) { return (n + step - 1) / step; }

// leaf(task) for all parts of all rows, in parallel. `unit_size`: state elements of a unit.
template <class Leaf>
void over_parts(const RecurrentStep& step, const Cut& cut, int64_t unit_size, const Leaf& leaf) {
    check(step);
    const StateSave* const saves = sorted_saves(step);
    const int64_t units = pieces(cut.units, cut.unit_step), parts = pieces(cut.parts, cut.part_step);
    const auto body = [&](int64_t i) {
        const int64_t row = i / (units * parts), unit = i / parts % units, part = i % parts;
        const int64_t begin = step.cu_q_lens[row], end = step.cu_q_lens[row + 1];
        if (begin == end) return;
        const auto before = [](const StateSave& save, int64_t token) { return save.token < token; };
        const StateSave* const first = std::lower_bound(saves, saves + step.num_saves, begin, before);
        const StateSave* const last = std::lower_bound(first, saves + step.num_saves, end, before);
        leaf(RecurrentTask{begin, end, step.slots[row], step.fresh[row] != 0, first, last - first, unit * cut.unit_step,
                           std::min(cut.units, (unit + 1) * cut.unit_step), part * cut.part_step,
                           std::min(cut.parts, (part + 1) * cut.part_step)});
    };
    const int64_t n = step.num_rows * units * parts;
    if (step.num_tokens * cut.units * unit_size < SMALL) {
        for (int64_t i = 0; i < n; ++i) body(i);
    } else {
        parallel_for(n, body);
    }
}

// Heads are cut further where there are too few of them to keep every thread busy.
int64_t part_step(const RecurrentStep& step, int64_t units, int64_t parts, int64_t smallest) {
    return step.num_rows * units >= 4 * num_threads() ? std::max<int64_t>(parts, 1) : smallest;
}

} // namespace

void run_conv(const Kernels& kernels, const ConvArgs& args, const RecurrentStep& step) {
    over_parts(step, {args.channels, CHANNEL_BLOCK, 1, 1}, args.taps,
               [&](const RecurrentTask& task) { kernels.conv(args, task); });
}

void run_delta(const Kernels& kernels, const DeltaArgs& args, const RecurrentStep& step) {
    const int64_t columns = part_step(step, args.value_heads, args.value_dim, VALUE_BLOCK);
    const size_t bytes = static_cast<size_t>(kernels.delta_scratch(args));
    over_parts(step, {args.value_heads, 1, args.value_dim, columns}, args.key_dim * args.value_dim,
               [&](const RecurrentTask& task) { kernels.delta(args, task, thread_scratch(Scratch::task, bytes)); });
}

void run_space(const Kernels& kernels, const SpaceArgs& args, const RecurrentStep& step) {
    const int64_t rows = part_step(step, args.heads, args.head_dim, STATE_ROWS);
    const size_t bytes = static_cast<size_t>(kernels.space_scratch(args));
    over_parts(step, {args.heads, 1, args.head_dim, rows}, args.head_dim * args.state_size,
               [&](const RecurrentTask& task) { kernels.space(args, task, thread_scratch(Scratch::task, bytes)); });
}

void run_selective(const Kernels& kernels, const SelectiveArgs& args, const RecurrentStep& step) {
    const size_t bytes = static_cast<size_t>(kernels.selective_scratch(args));
    over_parts(step, {args.channels, CHANNEL_BLOCK, 1, 1}, args.state_size,
               [&](const RecurrentTask& task) { kernels.selective(args, task, thread_scratch(Scratch::task, bytes)); });
}

} // namespace pando
