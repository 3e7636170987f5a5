// What the drivers ask of one instruction-set level: leaf functions over ranges of rows or tasks, and their arguments.
// Leaves know no threads and allocate nothing. Strides count elements; the innermost stride is always 1.
//
// int8_kv: the cache holds rows of int8 (kernels/int8_rows.hpp), 4 bytes longer than their head has dims; its strides
// count bytes. A row stands for its values times its scale, rounded to the dtype of the queries.
#pragma once

#include <cstdint>

namespace pando {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Order shared with pando.kernels.reference.ACTIVATIONS.
enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2, relu2 = 3, swiglu_oai = 4 };

// Rows of a tensor of up to three dims: row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct Rows {
    char* data;
    int64_t inner;
    int64_t outer_stride;
    int64_t inner_stride;
};

struct NormArgs {
    DType dtype;
    Rows x;
    char* residual; // contiguous; null: plain norm
    const float* weight;
    char* out; // contiguous
    int64_t size;
    float eps;
};

struct RopeArgs {
    DType dtype;
    char* q;
    char* k;
    int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride;
    int64_t q_heads, k_heads;
    const int64_t* positions;
    const float* cos_sin;
    int64_t max_position, rotary_dim;
    bool interleaved;
};

struct ActivationArgs {
    DType dtype;
    Activation kind;
    const char* gate_up;
    int64_t row_stride;
    char* out;    // contiguous
    int64_t size; // of the output row
};

// out += in, or out *= factor where in is null. Rows are contiguous.
struct BlendArgs {
    DType dtype;
    const char* in;
    char* out;
    int64_t size;
    float factor;
};

struct StoreArgs {
    DType dtype;
    const char* k;
    const char* v;
    char* k_cache;
    char* v_cache;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    int64_t k_slot_stride, k_slot_head_stride, v_slot_stride, v_slot_head_stride;
    int64_t heads, k_dim, v_dim, num_slots;
    const int64_t* out_loc;
    bool int8_kv = false;
};

// What happens to the heads of a fused projection before attention, in one pass: query and key norms, rotary embedding,
// keys and values into the cache. A token's row holds its query heads, its key heads, its value heads.
struct HeadsArgs {
    DType dtype;
    char* qkv;
    int64_t token_stride;
    int64_t q_heads, kv_heads, head_dim, v_dim;
    const float* q_norm; // [head_dim]; null: no norms
    const float* k_norm;
    float eps;
    bool norm_after_rope;
    const int64_t* positions;
    const float* cos_sin; // null: no rotary embedding
    int64_t max_position, rotary_dim;
    bool interleaved;
    char* k_cache;
    char* v_cache;
    int64_t k_slot_stride, k_slot_head_stride, v_slot_stride, v_slot_head_stride, num_slots;
    const int64_t* out_loc;
    bool int8_kv = false;
};

struct AttentionArgs {
    DType dtype;
    const char* q;
    const char* k;
    const char* v;
    char* out; // contiguous [T, H, Dv]
    int64_t q_token_stride, q_head_stride, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride;
    int64_t heads, kv_heads, head_dim, v_dim, num_slots;
    const int32_t* page_table;
    int64_t table_stride, table_width;
    const int32_t* cu_q_lens;
    const int32_t* kv_lens;
    int64_t num_rows, num_tokens, page_size, window;
    float scale, softcap;
    const float* sinks; // may be null
    // [queries][queries] bytes of each row, one after the other: query i sees the step's own token j where it is not 0.
    // Null: causal.
    const uint8_t* tree_mask = nullptr;
    int64_t tree_mask_size = 0;
    bool int8_kv = false;
};

// Consecutive queries of one row.
struct AttentionMember {
    int32_t row;
    int32_t token;    // of the first query: index into q
    int32_t queries;  // how many
    int32_t position; // of the first query
    int32_t own;      // position of the row's first query of this step
    int32_t own_queries;
    int64_t mask;    // offset of the first query's mask row
    int64_t partial; // offset of the row's floats in the partial buffer; see attention_entry_size
};

// Some KV heads, the positions [key_begin, key_end) of the first member's pages, and the queries that look at them: of
// one row, or of several whose pages up to key_end are the same.
struct AttentionTask {
    const AttentionMember* members;
    int32_t num_members;
    int32_t kv_head_begin, kv_head_end;
    int32_t key_begin, key_end;
    int32_t first_part; // number of the rows' first part, if their keys are split
    bool split;         // every part leaves its own result in the partial buffer
};

// Query rows of one KV head (queries times heads of its group) that are worked on together. A row of more may not be
// split.
constexpr int64_t ATTENTION_QUERY_ROWS = 64;
// As many a task holds at most, unless one query has more: they take turns with each block of keys and values.
constexpr int64_t ATTENTION_TASK_ROWS = 4 * ATTENTION_QUERY_ROWS;
// Up to this many query rows a task may take several KV heads: decoding is bound by memory, and a token's heads lie
// together.
constexpr int64_t ATTENTION_JOINT_ROWS = 8;
// Keys scored at once: their scores and pointers stay in the first-level cache.
constexpr int64_t ATTENTION_KEY_BLOCK = 64;
// A split row's parts are the positions with the same quotient by this, so that its result depends neither on the
// batch, nor on threads, nor on what it shares. A multiple of the block.
constexpr int64_t ATTENTION_SPLIT = 256;
// Output rows are kept padded to this in scratch and partial buffers: the widest level's vector.
constexpr int64_t ATTENTION_VALUE_PAD = 16;

// Floats of one query row's result over one part: its largest score, the sum of its weights, padding, the weighted
// values. A row's entries are [part][KV head][query, head of the group].
inline int64_t attention_entry_size(const AttentionArgs& args) {
    return 16 + (args.v_dim + ATTENTION_VALUE_PAD - 1) / ATTENTION_VALUE_PAD * ATTENTION_VALUE_PAD;
}

struct SampleArgs {
    const float* logits;
    int64_t vocab;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seeds;
    const int64_t* positions;
    int64_t* out;
};

// The largest logit's id (the lowest on a tie) and whether all logits of a row are finite; either may be null.
struct ScanArgs {
    const float* logits;
    int64_t vocab;
    int64_t* argmax;
    uint8_t* finite;
};

// logits[r, v] = -inf where bit v of mask row r is 0.
struct MaskArgs {
    float* logits;
    int64_t vocab;
    const int32_t* mask;
    int64_t mask_stride; // words
};

struct PenaltyArgs {
    float* logits;
    int64_t vocab;
    const int32_t* history;
    int64_t history_stride, history_len; // tokens a row has room for
    const int32_t* prompt_lens;
    const int32_t* lens;
    const float* repetition;
    const float* frequency;
    const float* presence;
};

struct LogprobArgs {
    const float* logits;
    int64_t vocab;
    const int64_t* token_ids;
    float* out;
};

// Products of rows with the panels of one family of weight kinds; linear.hpp has the types.
struct PackedWeight;
struct PanelArgs;
struct PanelTask;
struct CombineArgs;
struct RoundArgs;
enum class WeightKind : int;
struct PanelKernels {
    bool (*takes)(const PackedWeight&, DType x); // rows of x are multiplied as they are, without prepare
    int64_t (*row_bytes)(const PackedWeight&);   // of a prepared row, a multiple of 64
    void (*prepare)(const PackedWeight&, DType x, const char* row, char* prepared);
    int64_t (*scratch)(const PackedWeight&, int64_t rows); // bytes one multiply() of so many rows needs
    void (*multiply)(const PanelArgs&, const PanelTask&, char* scratch);
};

// mixing.hpp has the types.
struct NormalizeArgs;
struct ModulateArgs;
struct GatedNormArgs;
struct GatesArgs;
struct RouteArgs;

// recurrent.hpp has the types.
struct ConvArgs;
struct DeltaArgs;
struct SpaceArgs;
struct SelectiveArgs;
struct RecurrentTask;

// Leaves that read indices return false if one was out of range; that entry is skipped, so memory stays intact.
struct Kernels {
    void (*norm)(const NormArgs&, int64_t begin, int64_t end);
    bool (*rope)(const RopeArgs&, int64_t begin, int64_t end);
    bool (*heads)(const HeadsArgs&, int64_t begin, int64_t end);
    void (*round_kv)(DType, const char* x, int64_t n, char* row); // one row of an int8 cache
    void (*blend)(const BlendArgs&, int64_t begin, int64_t end);
    void (*activation)(const ActivationArgs&, int64_t begin, int64_t end);
    int64_t (*attention_scratch)(const AttentionArgs&); // bytes one attend() needs
    bool (*attend)(const AttentionArgs&, const AttentionTask&, char* scratch, float* partials);
    void (*attention_merge)(const AttentionArgs&, const AttentionMember&, int64_t kv_head, int64_t parts,
                            const float* partials);
    int64_t (*sample_scratch)(const SampleArgs&); // bytes one sample() needs
    void (*sample)(const SampleArgs&, int64_t row, char* scratch);
    void (*scan)(const ScanArgs&, int64_t begin, int64_t end);
    void (*mask)(const MaskArgs&, int64_t begin, int64_t end);
    void (*logprob)(const LogprobArgs&, int64_t begin, int64_t end);

    // mixing.cpp
    void (*normalize)(const NormalizeArgs&, int64_t begin, int64_t end);
    void (*modulate)(const ModulateArgs&, int64_t begin, int64_t end);
    void (*gated_norm)(const GatedNormArgs&, int64_t begin, int64_t end);
    void (*gates)(const GatesArgs&, int64_t begin, int64_t end);
    void (*route)(const RouteArgs&, int64_t begin, int64_t end);

    // recurrent_conv.cpp, recurrent_delta.cpp, recurrent_space.cpp; scratch: bytes one call needs
    void (*conv)(const ConvArgs&, const RecurrentTask&);
    int64_t (*delta_scratch)(const DeltaArgs&);
    void (*delta)(const DeltaArgs&, const RecurrentTask&, char* scratch);
    int64_t (*space_scratch)(const SpaceArgs&);
    void (*space)(const SpaceArgs&, const RecurrentTask&, char* scratch);
    int64_t (*selective_scratch)(const SelectiveArgs&);
    void (*selective)(const SelectiveArgs&, const RecurrentTask&, char* scratch);

    // gemm_float.cpp
    PanelKernels float_panels;
    void (*combine)(const CombineArgs&, int64_t begin, int64_t end);

    // gemm_int.cpp
    PanelKernels int_panels;

    // rounding.cpp
    void (*round_row)(const RoundArgs&);

    // limits.cpp
    int64_t (*burn)(WeightKind, int64_t rounds, float* sink); // operations done, a multiply-add being two
    void (*read_through)(const char* data, int64_t bytes, float* sink);
};

} // namespace pando
