// A region whose pieces lie side by side in memory. parallel_for hands out pieces one by one, so that each thread reads
// every second one and what it fetched ahead is read by another. Here each thread walks a stripe of neighbours, and who
// is done early takes pieces from the far end of another's stripe.
#pragma once

#include "threads.hpp"

#include <algorithm>
#include <atomic>

namespace pando {

// Pieces [begin, end) that are left of a stripe, both in one word. At most 2^32 - 1 pieces.
class alignas(64) Stripe {
  public:
    void assign(int64_t begin, int64_t end) {
        left_.store(word(static_cast<uint64_t>(begin), static_cast<uint64_t>(end)), std::memory_order_relaxed);
    }

    // The first piece that is left, or the last one; -1 if there is none.
    int64_t take(bool last) {
        uint64_t left = left_.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t begin = left >> 32, end = left & 0xffffffffu;
            if (begin >= end) return -1;
            const uint64_t rest = last ? word(begin, end - 1) : word(begin + 1, end);
            if (left_.compare_exchange_weak(left, rest, std::memory_order_relaxed))
                return static_cast<int64_t>(last ? end - 1 : begin);
        }
    }

  private:
    static uint64_t word(uint64_t begin, uint64_t end) { return begin << 32 | end; }

    std::atomic<uint64_t> left_{0};
};

// body(i) for each i in [0, n), as parallel_for; neighbours mostly on one thread, one after the other.
template <class Body>
void parallel_stripes(int64_t n, const Body& body) {
    constexpr int64_t MOST = 64;
    const int64_t count = std::min<int64_t>({n, num_threads(), MOST});
    Stripe stripes[MOST];
    for (int64_t i = 0; i < count; ++i) stripes[i].assign(n * i / count, n * (i + 1) / count);
    parallel_for(count, [&](int64_t own) {
        for (int64_t piece; (piece = stripes[own].take(false)) >= 0;) body(piece);
        for (int64_t other = 1; other < count; ++other) {
            for (int64_t piece; (piece = stripes[(own + other) % count].take(true)) >= 0;) body(piece);
        }
    });
}

} // namespace pando
