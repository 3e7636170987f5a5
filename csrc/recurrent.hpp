// Recurrent ops: rows of tokens on states of fixed size. Contracts are in pando/kernels/recurrent.py.
//
// A state is read and written in place. Leaves run a part of one row (some heads, columns or channels) through all its
// tokens, in chunks whose inputs are widened to float32 first; the state stays in registers or in the first-level cache
// meanwhile. Arithmetic is token by token and the same for every chunk, so that cuts leave no trace in the results.
#pragma once

#include "kernels.hpp"

namespace pando {

// What every op is told about the step.
struct RecurrentStep {
    const int32_t* cu_q_lens;
    const int64_t* slots;
    const uint8_t* fresh;
    int64_t num_rows, num_tokens, num_slots;
    const int64_t* save_token;
    const int64_t* save_slot;
    int64_t num_saves;
};

struct StateSave {
    int64_t token, slot;
};

// Part of one row. A unit is a head, or a channel where there are no heads; parts are value columns (gated delta) or
// rows (state space) of the unit's state.
struct RecurrentTask {
    int64_t token_begin, token_end; // not empty
    int64_t slot;
    bool fresh;
    const StateSave* saves; // of the row's tokens, in their order
    int64_t num_saves;
    int64_t unit_begin, unit_end;
    int64_t part_begin, part_end;
};

struct ConvArgs {
    DType dtype; // of x, state and out
    const char* x;
    int64_t token_stride;
    const float* weight; // [channels][taps]
    const float* bias;   // may be null
    char* state;         // [slot][channels][taps - 1]
    int64_t slot_stride;
    char* out; // contiguous
    int64_t channels, taps;
    bool silu;
};

struct DeltaArgs {
    DType dtype;
    const char* q;
    const char* k;
    const char* v;
    int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    const float* log_decay; // [T][value heads], with channels [T][value heads][key_dim]
    const float* beta;      // [T][value heads]
    float* state;           // [slot][value heads][key_dim][value_dim]
    int64_t slot_stride;
    char* out; // contiguous [T][value heads][value_dim]
    int64_t key_heads, value_heads, key_dim, value_dim;
    bool channels, normalize;
    float scale;
};

struct SpaceArgs {
    DType dtype;
    const char* x;
    const char* b;
    const char* c;
    int64_t x_token_stride, x_head_stride, b_token_stride, b_group_stride, c_token_stride, c_group_stride;
    const float* dt; // [T][heads]
    const float* a;
    const float* d; // may be null
    float* state;   // [slot][heads][head_dim][state_size]
    int64_t slot_stride;
    char* out; // contiguous [T][heads][head_dim]
    int64_t heads, groups, head_dim, state_size;
};

struct SelectiveArgs {
    DType dtype;
    const char* x;
    const char* b;
    const char* c;
    int64_t x_token_stride, b_token_stride, c_token_stride;
    const float* dt; // [T][channels]
    const float* a;  // [channels][state_size]
    const float* d;  // may be null
    float* state;    // [slot][channels][state_size]
    int64_t slot_stride;
    char* out; // contiguous [T][channels]
    int64_t channels, state_size;
};

// Taps of a convolution the kernels have registers for.
constexpr int64_t MAX_TAPS = 16;
// Channels of a task of the ops without heads.
constexpr int64_t CHANNEL_BLOCK = 64;
// Value columns a task of the gated delta rule has at least; a multiple of what every level takes at once.
constexpr int64_t VALUE_BLOCK = 64;
// Rows of a head's state a task of the state space has at least.
constexpr int64_t STATE_ROWS = 16;

// Drivers: std::invalid_argument on an index out of range, before anything is written.
void run_conv(const Kernels&, const ConvArgs&, const RecurrentStep&);
void run_delta(const Kernels&, const DeltaArgs&, const RecurrentStep&);
void run_space(const Kernels&, const SpaceArgs&, const RecurrentStep&);
void run_selective(const Kernels&, const SelectiveArgs&, const RecurrentStep&);

} // namespace pando
