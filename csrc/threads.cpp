#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

namespace pando {

namespace {

// How often the caller looks whether its helpers are done before it sleeps: a few microseconds.
constexpr int LOOKS = 2000;

// How long a helper looks for the next region before it sleeps. Waking a thread takes 20 to 50 microseconds where the
// processor is a virtual one, as long as the product of one row with a small weight; the next is usually that near.
constexpr std::chrono::microseconds PATIENCE{100};

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

struct Region {
    int64_t n;
    void (*body)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(context, i);
    }
};

// Who runs a region opens it (region_, then opened_), helps, closes it and waits until nobody is inside. A helper says
// that it is inside before it looks whether the region is still open: all of these are sequentially consistent, so a
// helper that found the region open is waited for. The same order makes sleeping safe: a helper counts itself as a
// sleeper before it looks at opened_ for the last time, and a region is opened before the sleepers are counted.
class Pool {
  public:
    Pool(int threads, bool patient) : wanted_(threads), patient_(patient) {
        try {
            for (int i = 1; i < threads; ++i) helpers_.emplace_back([this, i] { help(i); });
        } catch (const std::system_error&) {
            // The system allows no more threads: work with those there are, the caller at least.
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& helper : helpers_) helper.join();
    }

    int wanted() const { return wanted_; }

    // helpers: how many may join, those with the lowest numbers.
    void run(Region& region, int helpers) {
        allowed_ = helpers;
        region_ = &region;
        ++opened_;
        wake_sleepers(region.n - 1);
        region.work();
        // From here on nobody can join; those inside finish the pieces they hold.
        region_ = nullptr;
        for (int look = 0; look < LOOKS && inside_ > 0; ++look) relax();
        if (inside_ == 0) return;
        waiting_ = true;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, [this] { return inside_ == 0; });
        }
        waiting_ = false;
    }

  private:
    void wake_sleepers(int64_t useful) {
        const int64_t sleepers = sleepers_;
        if (sleepers == 0) return;
        {
            std::lock_guard<std::mutex> lock(mutex_);
        } // whoever counted itself before is waiting by now
        if (useful >= sleepers) {
            wake_.notify_all();
        } else {
            for (int64_t i = 0; i < useful; ++i) wake_.notify_one();
        }
    }

    void help(int number) {
        for (uint64_t seen = 0; !stopping_;) {
            if (opened_ == seen) {
                if (!patient_ || !look(seen)) sleep(seen);
                continue;
            }
            seen = opened_;
            if (number > allowed_) continue;
            ++inside_;
            if (Region* region = region_) region->work();
            if (--inside_ == 0 && waiting_) {
                {
                    std::lock_guard<std::mutex> lock(mutex_);
                }
                done_.notify_one();
            }
        }
    }

    // True as soon as a region was opened after `seen`, false after a while.
    bool look(uint64_t seen) const {
        const auto end = std::chrono::steady_clock::now() + PATIENCE;
        do {
            for (int i = 0; i < 32; ++i) {
                if (opened_.load(std::memory_order_relaxed) != seen) return true;
                relax();
            }
        } while (!stopping_ && std::chrono::steady_clock::now() < end);
        return false;
    }

    void sleep(uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, [&] { return stopping_ || opened_ != seen; });
        --sleepers_;
    }

    const int wanted_;
    const bool patient_;
    std::vector<std::thread> helpers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    std::atomic<Region*> region_{nullptr};
    std::atomic<int> allowed_{0};
    std::atomic<uint64_t> opened_{0};
    std::atomic<int64_t> inside_{0};
    std::atomic<int64_t> sleepers_{0};
    std::atomic<bool> waiting_{false};
    std::atomic<bool> stopping_{false};
};

// Processors this process may use.
int usable_processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
    const unsigned n = std::thread::hardware_concurrency();
    return n > 0 ? static_cast<int>(n) : 1;
}

int default_threads() {
    if (const char* text = std::getenv("OMP_NUM_THREADS")) {
        const int n = std::atoi(text);
        if (n >= 1) return n;
    }
    return usable_processors();
}

// Never destroyed: helpers may be asleep in it while the process ends. A forked child starts without helpers and with
// the lock in an unknown state, so it gets fresh ones.
struct State {
    std::mutex busy; // held by the region that runs
    Pool* pool = nullptr;
    std::atomic<int> wanted{0};
    std::atomic<int> aside{0};
};

State* state = new State;

void after_fork_in_child() {
    const int wanted = state->wanted.load(), aside = state->aside.load();
    state = new State;
    state->wanted = wanted;
    state->aside = aside;
}

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, after_fork_in_child);

struct Buffer {
    char* data = nullptr;
    size_t size = 0;

    char* at_least(size_t bytes, bool zero) {
        if (bytes <= size) return data;
        const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        void* fresh = nullptr;
        if (posix_memalign(&fresh, 64, rounded) != 0) throw std::bad_alloc();
        std::free(data);
        data = static_cast<char*>(fresh);
        size = rounded;
        if (zero) std::memset(data, 0, size);
        return data;
    }

    ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[3];
thread_local Buffer zeroed;

} // namespace

int num_threads() {
    if (state->wanted == 0) state->wanted = default_threads();
    return state->wanted;
}

void set_num_threads(int n) {
    if (n < 1 || n > 1024) throw std::invalid_argument("the number of threads must be in 1..1024");
    state->wanted = n;
}

void set_aside(int change) { state->aside += change; }

void run_parallel(int64_t n, void (*body)(void*, int64_t), void* context) {
    Region region{n, body, context};
    const int threads = num_threads(), helpers = threads - 1 - std::max(0, state->aside.load());
    if (n <= 1 || helpers <= 0 || !state->busy.try_lock()) {
        region.work();
        return;
    }
    std::lock_guard<std::mutex> lock(state->busy, std::adopt_lock);
    if (state->pool == nullptr || state->pool->wanted() != threads) {
        delete state->pool;
        state->pool = nullptr;
        state->pool = new Pool(threads, threads <= usable_processors());
    }
    state->pool->run(region, helpers);
}

char* thread_scratch(Scratch purpose, size_t bytes) {
    return buffers[static_cast<int>(purpose)].at_least(bytes, false);
}

char* zeroed_scratch(size_t bytes) { return zeroed.at_least(bytes, true); }

} // namespace pando
