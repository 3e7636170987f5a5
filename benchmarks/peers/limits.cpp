// What the cores can do at best, with N threads: reading memory, and multiply-adds between registers.
//
//     c++ -O3 -march=native -pthread limits.cpp -o limits && ./limits THREADS
//
// Prints JSON: read (bytes/s from DRAM), bf16 and int8 (operations/s; a multiply-add is two), each the best of a few
// passes. A figure is left out where the processor has no such instruction.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include <sys/mman.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Far more than any cache, so that every pass comes from memory.
constexpr std::size_t kBytes = std::size_t{1} << 30;
constexpr int kPasses = 5;
// As many independent sums as hide the latency of a multiply-add, and fit the registers.
constexpr int kSums = 12;
constexpr long kRounds = 8'000'000;

volatile std::uint64_t sink;

double seconds_of(int threads, const std::function<void(int)> &work) {
    double best = 1e30;
    for (int pass = 0; pass < kPasses; ++pass) {
        const auto begin = std::chrono::steady_clock::now();
        std::vector<std::thread> team;
        for (int thread = 0; thread < threads; ++thread) team.emplace_back(work, thread);
        for (auto &member : team) member.join();
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
        if (spent.count() < best) best = spent.count();
    }
    return best;
}

void read(const std::uint64_t *data, std::size_t count) {
    std::uint64_t sums[32] = {};
    for (std::size_t at = 0; at + 32 <= count; at += 32) {
        for (int lane = 0; lane < 32; ++lane) sums[lane] += data[at + lane];
    }
    std::uint64_t total = 0;
    for (const std::uint64_t sum : sums) total += sum;
    sink = total;
}

#if defined(__AVX512BF16__)
void multiply_bf16() {
    __m512 sums[kSums] = {};
    const __m512 factor = _mm512_setzero_ps();
    for (long round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
        for (int at = 0; at < kSums; ++at) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sums[at]) : "v"(factor));
    }
}
#endif

#if defined(__AVX512VNNI__)
void multiply_int8() {
    __m512i sums[kSums] = {};
    const __m512i factor = _mm512_setzero_si512();
    for (long round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
        for (int at = 0; at < kSums; ++at) asm volatile("vpdpbusd %1, %1, %0" : "+v"(sums[at]) : "v"(factor));
    }
}
#endif

}  // namespace

int main(int argc, char **argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const std::size_t share = kBytes / sizeof(std::uint64_t) / threads;
    auto *data = static_cast<std::uint64_t *>(std::aligned_alloc(std::size_t{1} << 21, kBytes));
#if defined(MADV_HUGEPAGE)
    madvise(data, kBytes, MADV_HUGEPAGE);  // page walks are no property of the memory
#endif
    std::fill_n(data, share * threads, 1);  // written, so that every page is there
    const double reading = seconds_of(threads, [&](int thread) { read(data + thread * share, share); });
    std::printf("{\"read\": %.6g", double(share) * threads * sizeof(std::uint64_t) / reading);
#if defined(__AVX512BF16__)
    const double bf16 = seconds_of(threads, [](int) { multiply_bf16(); });
    std::printf(", \"bf16\": %.6g", 64.0 * kSums * kRounds * threads / bf16);
#endif
#if defined(__AVX512VNNI__)
    const double int8 = seconds_of(threads, [](int) { multiply_int8(); });
    std::printf(", \"int8\": %.6g", 128.0 * kSums * kRounds * threads / int8);
#endif
    std::printf("}\n");
    return 0;
}
