// A model's layers as one list of instructions over numbered buffers, run with one call per step: no interpreter
// between two kernels, one wait for memory less per kernel, threads that stay awake from the first to the last.
//
// A buffer has a width in elements per token; at run time it holds the tokens of the step one after another. Buffer 0
// is the residual stream, buffer 1 the result: both are the caller's.
#pragma once

#include "attention_plan.hpp"
#include "kernels.hpp"
#include "linear.hpp"

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

struct Instruction;

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
