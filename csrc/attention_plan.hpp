// How the work of an attention call is cut, and the calls themselves. The cut depends on the ragged arguments only
// (cu_q_lens, kv_lens, page_table), which are the same for all layers of a step.
#pragma once

#include "kernels.hpp"

#include <memory>

namespace pando {

// Work cuts of one step, one for each kind of layer (heads, window). Reused by the next step after reset(): nothing is
// allocated once it has seen its largest step. Not for two threads at once.
class AttentionPlan {
  public:
    // whole: every query walks its keys from the first to the last in blocks at fixed positions, nothing is split or
    // shared. Then a token's result does not depend on how many tokens its step brought, either.
    explicit AttentionPlan(bool whole = false);
    ~AttentionPlan();
    AttentionPlan(const AttentionPlan&) = delete;
    AttentionPlan& operator=(const AttentionPlan&) = delete;

    // To be called whenever cu_q_lens, kv_lens or page_table change, in place or not.
    void reset();

    // Key positions the cut of the first kind of layer reads for all rows together, and what they would be without
    // sharing; 0 before the first run. For tests and benchmarks.
    int64_t keys_read() const;
    int64_t keys_seen() const;

    struct Cut;

  private:
    friend void run_attention(const Kernels&, const AttentionArgs&, AttentionPlan&);
    const Cut& cut(const AttentionArgs&);

    const bool whole_;
    static constexpr int KINDS = 4; // more kinds of layers than this take turns
    std::unique_ptr<Cut> cuts_[KINDS];
    int used_ = 0;
};

// Builds what `plan` lacks for this kind of layer, then runs. `plan` must have been reset since the ragged arguments
// changed. A row's result is bitwise the same alone or in any batch, sharing or not, for any number of threads.
void run_attention(const Kernels&, const AttentionArgs&, AttentionPlan& plan);

// The same with a plan of its own.
void run_attention(const Kernels&, const AttentionArgs&);

// Whether rows whose page tables begin alike read that KV once (on at the start). Takes effect with the next reset().
void set_shared_prefix(bool on);
bool shared_prefix();

} // namespace pando
