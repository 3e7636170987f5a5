// The leaves of one level, by file; table.cpp puts them into the level's Kernels.
#pragma once

#include "kernels.hpp"

namespace pando {
namespace PANDO_LEVEL {

// elementwise.cpp
void norm(const NormArgs&, int64_t begin, int64_t end);
bool rope(const RopeArgs&, int64_t begin, int64_t end);
void activation(const ActivationArgs&, int64_t begin, int64_t end);

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
void logprob(const LogprobArgs&, int64_t begin, int64_t end);

} // namespace PANDO_LEVEL
} // namespace pando
