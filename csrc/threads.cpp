#include "threads.hpp"

#include <atomic>
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

// How often a thread looks before it sleeps, with a pause of some nanoseconds between two looks: a caller whose helpers
// finish their last pieces, and a helper between two regions of one step (a few hundred microseconds, see Hot).
constexpr int CALLER_LOOKS = 2000;
constexpr int HELPER_LOOKS = 20000;

std::atomic<int> hot_scopes{0};

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A region's work. It lives in the pool, so that a late helper may look at it at any time.
struct Region {
    std::atomic<int64_t> n{0};
    std::atomic<int64_t> next{0};
    void (*body)(void*, int64_t) = nullptr;
    void* context = nullptr;

    bool has_more() const { return next.load(std::memory_order_relaxed) < n.load(std::memory_order_relaxed); }

    void work() {
        const int64_t end = n.load(std::memory_order_relaxed);
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < end;) body(context, i);
    }
};

// A helper counts itself into inside_ and only then looks at open_; the caller closes the region and only then waits
// for inside_ to become 0. Both are sequentially consistent: a helper either sees the region open and is waited for, or
// sees it closed. Sleep is entered under the mutex, by the same argument on sleeping_ and open_.
class Pool {
  public:
    explicit Pool(int threads) : wanted_(threads) {
        try {
            for (int i = 1; i < threads; ++i) helpers_.emplace_back([this] { help(); });
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

    void run(int64_t n, void (*body)(void*, int64_t), void* context) {
        region_.n.store(n, std::memory_order_relaxed);
        region_.next.store(0, std::memory_order_relaxed);
        region_.body = body;
        region_.context = context;
        open_.store(true);
        if (sleeping_.load() > 0) wake(n - 1);
        region_.work();
        open_.store(false);
        for (int look = 0; look < CALLER_LOOKS && inside_.load() > 0; ++look) relax();
        if (inside_.load() == 0) return;
        std::unique_lock<std::mutex> lock(mutex_);
        waiting_.store(true);
        done_.wait(lock, [this] { return inside_.load() == 0; });
        waiting_.store(false);
    }

  private:
    void wake(int64_t useful) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (useful >= static_cast<int64_t>(helpers_.size())) {
            wake_.notify_all();
        } else {
            for (int64_t i = 0; i < useful; ++i) wake_.notify_one();
        }
    }

    void help() {
        for (;;) {
            for (int look = 0; look < HELPER_LOOKS && hot_scopes.load(std::memory_order_relaxed) > 0; ++look) {
                if (has_work()) {
                    take_part();
                    look = 0;
                }
                relax();
            }
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_.fetch_add(1);
            wake_.wait(lock, [this] { return stopping_ || has_work(); });
            sleeping_.fetch_sub(1);
            if (stopping_) return;
            lock.unlock();
            take_part();
        }
    }

    bool has_work() const { return open_.load() && region_.has_more(); }

    void take_part() {
        inside_.fetch_add(1);
        if (open_.load()) region_.work();
        if (inside_.fetch_sub(1) == 1 && waiting_.load()) {
            std::lock_guard<std::mutex> lock(mutex_); // the caller is asleep or has not looked yet
            done_.notify_one();
        }
    }

    const int wanted_;
    std::vector<std::thread> helpers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    Region region_;
    std::atomic<bool> open_{false};
    std::atomic<int> inside_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> waiting_{false};
    bool stopping_ = false;
};

int default_threads() {
    if (const char* text = std::getenv("OMP_NUM_THREADS")) {
        const int n = std::atoi(text);
        if (n >= 1) return n;
    }
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
    const unsigned n = std::thread::hardware_concurrency();
    return n > 0 ? static_cast<int>(n) : 1;
}

// Never destroyed: helpers may be asleep in it while the process ends. A forked child starts without helpers and with
// the lock in an unknown state, so it gets fresh ones.
struct State {
    std::mutex busy; // held by the region that runs
    Pool* pool = nullptr;
    std::atomic<int> wanted{0};
};

State* state = new State;

void after_fork_in_child() {
    const int wanted = state->wanted.load();
    state = new State;
    state->wanted = wanted;
    hot_scopes = 0;
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

void run_parallel(int64_t n, void (*body)(void*, int64_t), void* context) {
    const int threads = num_threads();
    if (n <= 1 || threads == 1 || !state->busy.try_lock()) {
        for (int64_t i = 0; i < n; ++i) body(context, i);
        return;
    }
    std::lock_guard<std::mutex> lock(state->busy, std::adopt_lock);
    if (state->pool == nullptr || state->pool->wanted() != threads) {
        delete state->pool;
        state->pool = nullptr;
        state->pool = new Pool(threads);
    }
    state->pool->run(n, body, context);
}

Hot::Hot() { hot_scopes.fetch_add(1); }
Hot::~Hot() { hot_scopes.fetch_sub(1); }

char* thread_scratch(Scratch purpose, size_t bytes) {
    return buffers[static_cast<int>(purpose)].at_least(bytes, false);
}

char* zeroed_scratch(size_t bytes) { return zeroed.at_least(bytes, true); }

} // namespace pando
