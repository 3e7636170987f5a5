// The leaves of one level, by file; table.cpp puts them into the level's Kernels.
#pragma once

#include "kernels.hpp"

namespace pando {
namespace PANDO_LEVEL {

// elementwise.cpp
void norm(const NormArgs&, int64_t begin, int64_t end);
bool rope(const RopeArgs&, int64_t begin, int64_t end);
bool heads(const HeadsArgs&, int64_t begin, int64_t end);
void blend(const BlendArgs&, int64_t begin, int64_t end);
void activation(const ActivationArgs&, int64_t begin, int64_t end);

// int8_rows.cpp
void round_kv(DType, const char* x, int64_t n, char* row);

// attention.cpp
int64_t attention_scratch(const AttentionArgs&);
bool attend(const AttentionArgs&, const AttentionTask&, char* scratch, float* partials);
void attention_merge(const AttentionArgs&, const AttentionMember&, int64_t kv_head, int64_t parts,
                     const float* partials);

// attention_pairs.cpp
bool attention_in_pairs(const AttentionArgs&); // whether the functions below do this call
int64_t attention_pairs_scratch(const AttentionArgs&);
bool attend_pairs(const AttentionArgs&, const AttentionTask&, char* scratch, float* partials);

// sampling.cpp
int64_t sample_scratch(const SampleArgs&);
void sample(const SampleArgs&, int64_t row, char* scratch);
void scan(const ScanArgs&, int64_t begin, int64_t end);
void mask(const MaskArgs&, int64_t begin, int64_t end);
void logprob(const LogprobArgs&, int64_t begin, int64_t end);

// mixing.cpp
void normalize(const NormalizeArgs&, int64_t begin, int64_t end);
void modulate(const ModulateArgs&, int64_t begin, int64_t end);
void gated_norm(const GatedNormArgs&, int64_t begin, int64_t end);
void gates(const GatesArgs&, int64_t begin, int64_t end);
void route(const RouteArgs&, int64_t begin, int64_t end);

// recurrent_conv.cpp
void conv(const ConvArgs&, const RecurrentTask&);

// recurrent_delta.cpp
int64_t delta_scratch(const DeltaArgs&);
void delta(const DeltaArgs&, const RecurrentTask&, char* scratch);

// recurrent_space.cpp
int64_t space_scratch(const SpaceArgs&);
void space(const SpaceArgs&, const RecurrentTask&, char* scratch);
int64_t selective_scratch(const SelectiveArgs&);
void selective(const SelectiveArgs&, const RecurrentTask&, char* scratch);

// gemm_float.cpp
bool float_takes(const PackedWeight&, DType x);
int64_t float_row_bytes(const PackedWeight&);
void float_prepare(const PackedWeight&, DType x, const char* row, char* prepared);
int64_t float_scratch(const PackedWeight&, int64_t rows);
void float_multiply(const PanelArgs&, const PanelTask&, char* scratch);
void combine(const CombineArgs&, int64_t begin, int64_t end);

// gemm_int.cpp
bool int_takes(const PackedWeight&, DType x);
int64_t int_row_bytes(const PackedWeight&);
void int_prepare(const PackedWeight&, DType x, const char* row, char* prepared);
int64_t int_scratch(const PackedWeight&, int64_t rows);
void int_multiply(const PanelArgs&, const PanelTask&, char* scratch);

// rounding.cpp
void round_row(const RoundArgs&);

// limits.cpp
int64_t burn(WeightKind, int64_t rounds, float* sink);
void read_through(const char* data, int64_t bytes, float* sink);

} // namespace PANDO_LEVEL
} // namespace pando
