// Ops as the module offers them: check indices, cut the work into pieces, run the level's leaves on the pool.
// All throw std::invalid_argument on an index out of range; nothing outside the tensors is ever touched.
#pragma once

#include "attention_plan.hpp"
#include "kernels.hpp"
#include "mixing.hpp"

namespace pando {

void run_norm(const Kernels&, const NormArgs&, int64_t rows);
void run_rope(const Kernels&, const RopeArgs&, int64_t tokens);
void run_heads(const Kernels&, const HeadsArgs&, int64_t tokens);
void run_blend(const Kernels&, const BlendArgs&, int64_t rows);
void run_activation(const Kernels&, const ActivationArgs&, int64_t rows);
void run_store(const Kernels&, const StoreArgs&, int64_t tokens);
void run_normalize(const Kernels&, const NormalizeArgs&, int64_t rows);
void run_modulate(const Kernels&, const ModulateArgs&, int64_t rows);
void run_gated_norm(const Kernels&, const GatedNormArgs&, int64_t rows);
void run_gates(const Kernels&, const GatesArgs&, int64_t rows);
void run_route(const Kernels&, const RouteArgs&, int64_t rows);
void run_sample(const Kernels&, const SampleArgs&, int64_t rows);
void run_scan(const Kernels&, const ScanArgs&, int64_t rows);
void run_mask(const Kernels&, const MaskArgs&, int64_t rows);
void run_penalties(const PenaltyArgs&, int64_t rows);
void run_logprobs(const Kernels&, const LogprobArgs&, int64_t rows);

} // namespace pando
