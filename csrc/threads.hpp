// A small pool for the kernels. The caller works, too, and never waits for a thread that has not started, so a busy
// machine costs nothing but the help. Idle threads look for the next region for 0.1 ms, if there is a processor for
// each, and then sleep. One region runs at a time; a second caller (another Python thread) runs its own serially:
// nothing to deadlock with, OpenMP included.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pando {

// Threads of a region, the caller's included. Starts at OMP_NUM_THREADS, else the processors this process may use.
int num_threads();

// Takes effect with the next region. Throws std::invalid_argument unless 1 <= n <= 1024.
void set_num_threads(int n);

// Take so many processors from the regions to come, or give them back (negative): other work needs them. A thread that
// is moved off its processor in the middle of a piece makes its whole region wait for a turn of the system's scheduler,
// some milliseconds; one that is not there costs its share only. The caller always works.
void set_aside(int change);

// body(context, i) for each i in [0, n), in any order, on any thread. Bodies may not throw.
void run_parallel(int64_t n, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int64_t n, const Body& body) {
    run_parallel(
        n, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, const_cast<Body*>(&body));
}

// At least `bytes` of memory of this thread, aligned to 64; valid until the next call with the same purpose. Grows
// only.
enum class Scratch : int { task = 0, plan = 1, partials = 2 };
char* thread_scratch(Scratch purpose, size_t bytes);

// The same, all zero; whoever uses it leaves it all zero.
char* zeroed_scratch(size_t bytes);

} // namespace pando
