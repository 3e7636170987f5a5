// A model's layers as one list of instructions over numbered buffers, run with one call per step: no interpreter
// between two kernels, one wait for memory less per kernel, threads that stay awake from the first to the last.
//
// A buffer has a width in elements per token; at run time it holds the tokens of the step one after another. Buffer 0
// is the residual stream, buffer 1 the result: both are the caller's.
#pragma once

#include "attention_plan.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "mixing.hpp"
#include "recurrent.hpp"

#include <cstdint>
#include <memory>
#include <vector>

namespace pando {

constexpr int RESIDUAL = 0, RESULT = 1;

// One layer's cache. Strides in elements. group: index into StepArgs::groups.
struct LayerCache {
    char* k;
    char* v;
    int64_t k_slot_stride, k_head_stride, v_slot_stride, v_head_stride, num_slots;
    int group;
    bool int8_kv;
};

// Where a step's tokens and rows have their keys in the caches of one group of layers.
struct PageTable {
    const int64_t* out_loc;
    const int32_t* pages;
    int64_t stride, width;
};

// One tensor of a layer's recurrent state. Stride in elements.
struct LayerState {
    char* data;
    int64_t slot_stride, num_slots;
};

// The states of a step's rows, and where to save them on the way: pando.forward.StateBatch.
struct StateRows {
    const int64_t* slots; // null: the model has none
    const uint8_t* fresh;
    const int64_t* save_token;
    const int64_t* save_slot;
    int64_t num_saves;
};

struct RotaryTable {
    const float* cos_sin;
    int64_t num_positions;
};

// A step: what the tensors of pando.forward.ForwardBatch hold, and where the model's state lies this time.
struct StepArgs {
    int64_t num_tokens, num_rows;
    char* residual; // null where the program embeds
    char* result;
    const int64_t* input_ids; // null where it does not
    const int64_t* positions;
    const int32_t* cu_q_lens;
    const int32_t* kv_lens;
    const PageTable* groups;
    int64_t page_size;
    const LayerCache* caches;
    const RotaryTable* rotaries;
    const LayerState* states; // of all layers, one after another
    StateRows state_rows;
};

// Attention heads of one layer. rotary: index into StepArgs::rotaries, or -1.
struct HeadsShape {
    int layer, rotary;
    int64_t q_heads, kv_heads, head_dim, v_dim, rotary_dim;
    const float* q_norm;
    const float* k_norm;
    float eps;
    bool norm_after_rope, interleaved;
};

struct AttentionShape {
    int layer;
    int64_t q_heads, kv_heads, head_dim, v_dim, window;
    float scale, softcap;
    const float* sinks;
};

// The other parts of layers; fields as in mixing.hpp and recurrent.hpp. state: index into StepArgs::states.
struct NormalizeShape {
    int64_t groups, size;
    const float* weight;
    const float* bias;
    int64_t weight_stride;
    float eps;
    bool centered;
};

struct GatedNormShape {
    int64_t size;
    const float* weight;
    int64_t weight_stride;
    float eps;
    bool gate_first;
};

struct ConvShape {
    int state;
    int64_t taps;
    const float* weight;
    const float* bias;
    bool silu;
};

struct DeltaShape {
    int state;
    int64_t key_heads, value_heads, key_dim, value_dim;
    const float* rate;
    const float* dt_bias;
    float scale;
};

struct SpaceShape {
    int state;
    int64_t heads, groups, head_dim, state_size, dt_offset;
    const float* a;
    const float* d;
    const float* dt_bias;
    float dt_low, dt_high;
};

struct Instruction;
struct PackedExperts;

class Program {
  public:
    Program(const Kernels& kernels, DType dtype, int64_t width);
    ~Program();

    int buffer(int64_t width);
    int64_t width(int buffer) const { return widths_.at(static_cast<size_t>(buffer)); }
    // Each appends one instruction; outputs may not be inputs.
    void norm(int in, int out, const float* weight, float eps);
    void linear(int in, int out, const PackedWeight* weight, bool accumulate);
    void add(int in, int out); // out += in
    void scale(int buffer, float factor);
    void heads(int qkv, const HeadsShape& shape);
    void attend(int qkv, int out, const AttentionShape& shape);

    // program_layers.cpp. offset: the first column read.
    void normalize(int in, int64_t in_offset, int out, int64_t out_offset,
                   const NormalizeShape& shape); // may be in place
    void modulate(int in, int64_t offset, int out, Modulation kind, bool broadcast);
    void mixture(int in, int logits, int out, const RouteShape& shape, const PackedExperts* experts);
    void gated_norm(int y, int z, int64_t offset, const GatedNormShape& shape);
    void conv(int in, int64_t offset, int out, const ConvShape& shape);
    void delta(int qkv, int gates, int out, const DeltaShape& shape);
    void space(int xbc, int projected, int out, const SpaceShape& shape);

    // Rows of [vocab][width] are the residual stream at a step's start, instead of what the caller put there.
    void embed(const char* rows, int64_t vocab);

    // Throws std::invalid_argument on an index out of range. Not reentrant.
    void run(const StepArgs& step);

  private:
    const Kernels& kernels_;
    const DType dtype_;
    std::vector<int64_t> widths_;
    std::vector<std::unique_ptr<Instruction>> instructions_;
    std::unique_ptr<char, void (*)(void*)> workspace_;
    size_t workspace_bytes_ = 0;
    bool embeds_ = false;
    AttentionPlan plan_;
};

} // namespace pando
