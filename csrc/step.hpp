// What happens around the model in a step: pages are entered in the request table, the step is flattened, tokens are
// chosen from logits and written into the history. All is index arithmetic on small arrays, but for the logits.
// All functions throw std::invalid_argument on an index out of range, before they write anything.
#pragma once

#include "kernels.hpp"

#include <cstdint>

namespace pando {

// A row per sequence, `stride` elements apart.
struct TableView {
    int32_t* data;
    int64_t rows, width, stride;

    int32_t* row(int64_t slot) const { return data + slot * stride; }
};

// The pages of one group of layers: those of the request table, and where a step's go. out_loc: a token's place in the
// pools of these layers.
struct PageGroup {
    TableView pages;
    int64_t* out_loc;
    TableView page_table;
};

// The pages of groups[of[i]]: table[slots[i], indices[i]] = ids[i], in order. of: null where all are of the first
// group.
struct PageWriteArgs {
    const PageGroup* groups;
    int64_t num_groups;
    const int64_t* of;
    const int64_t* slots;
    const int64_t* indices;
    const int64_t* ids;
    int64_t count;
};

// Shapes and contents: `StepInputs` in pando/kernels/ops.py.
struct FlattenArgs {
    const int64_t* slots; // [rows], as the next three
    const int64_t* starts;
    const int64_t* lens;
    const int64_t* emits;
    int64_t rows;
    TableView tokens;
    PageGroup* groups; // their tables are of one size
    int64_t num_groups;
    int64_t page_size;

    int64_t num_tokens, num_emitting; // what the outputs have room for, and the rows must add up to
    int64_t* input_ids;
    int64_t* positions;
    int32_t* cu_q_lens;
    int32_t* kv_lens;
    int64_t* last; // [num_emitting], as the next two
    int64_t* emit_slots;
    int64_t* emit_ends;
};

// Sampling parameters by slot.
struct SamplingColumns {
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seed;
};

// Which tokens may come, for some rows of logits: mask row i has a bit per token, the lowest first, for row rows[i].
// The rows ascend.
struct AllowedTokens {
    const int32_t* words = nullptr;
    int64_t stride = 0; // words
    const int64_t* rows = nullptr;
    int64_t count = 0;
};

struct ChooseArgs {
    const float* logits;
    int64_t rows, vocab;
    const int64_t* slots;
    const int64_t* positions;
    SamplingColumns sampling; // ignored where `greedy`
    bool greedy;              // every row takes its largest logit
    TableView history;
    int64_t* tokens; // [rows]
    int64_t* finite; // [rows], 0 or 1
    AllowedTokens allowed{};
};

// history[slots[i], positions[i]] = ids[i], in order.
struct TokenWriteArgs {
    TableView history;
    const int64_t* slots;
    const int64_t* positions;
    const int64_t* ids;
    int64_t count;
};

void write_pages(const PageWriteArgs& args);
void write_tokens(const TokenWriteArgs& args);
void flatten(const FlattenArgs& args);
void choose(const Kernels& kernels, const ChooseArgs& args);

} // namespace pando
