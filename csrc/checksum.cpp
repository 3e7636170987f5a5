#include "checksum.hpp"

#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace pando {

namespace {

constexpr int LANES = 16;

// The finaliser of splitmix64: every bit of the result depends on every bit of x.
uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Fletcher's sums, one pair per lane: the second one weighs a word by its place. Additions only, for any vector unit.
uint64_t chunk_sum(const char* data, int64_t bytes, int64_t place) {
    uint64_t first[LANES] = {}, second[LANES] = {};
    constexpr int64_t STEP = LANES * 8;
    const auto add = [&](const char* from) {
        uint64_t words[LANES];
        std::memcpy(words, from, STEP);
        for (int lane = 0; lane < LANES; ++lane) {
            first[lane] += words[lane];
            second[lane] += first[lane];
        }
    };
    const int64_t whole = bytes / STEP * STEP;
    for (int64_t i = 0; i < whole; i += STEP) add(data + i);
    if (whole < bytes) {
        char rest[STEP] = {};
        std::memcpy(rest, data + whole, static_cast<size_t>(bytes - whole));
        add(rest);
    }
    uint64_t sum = mix(static_cast<uint64_t>(place) + 1) + static_cast<uint64_t>(bytes);
    for (int lane = 0; lane < LANES; ++lane) sum = mix(sum ^ first[lane]) + second[lane];
    return mix(sum);
}

int64_t num_chunks(int64_t bytes) { return (bytes + CHECKSUM_CHUNK - 1) / CHECKSUM_CHUNK; }

uint64_t chunk_of(const char* data, int64_t bytes, int64_t chunk, int64_t first_chunk) {
    const int64_t begin = chunk * CHECKSUM_CHUNK;
    return chunk_sum(data + begin, std::min(CHECKSUM_CHUNK, bytes - begin), first_chunk + chunk);
}

} // namespace

uint64_t checksum(const char* data, int64_t bytes, int64_t first_chunk) {
    std::atomic<uint64_t> sum{0};
    parallel_for(num_chunks(bytes), [&](int64_t chunk) { sum += chunk_of(data, bytes, chunk, first_chunk); });
    return sum;
}

bool has_checksums(const char* file, const ChecksumRange* ranges, int64_t count) {
    struct Piece {
        int64_t range, chunk;
    };
    std::vector<Piece> pieces;
    for (int64_t range = 0; range < count; ++range) {
        for (int64_t chunk = 0; chunk < num_chunks(ranges[range].bytes); ++chunk) pieces.push_back({range, chunk});
    }
    std::vector<std::atomic<uint64_t>> sums(static_cast<size_t>(count));
    parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
        const Piece piece = pieces[static_cast<size_t>(i)];
        const ChecksumRange& range = ranges[piece.range];
        sums[static_cast<size_t>(piece.range)] += chunk_of(file + range.offset, range.bytes, piece.chunk, 0);
    });
    for (int64_t range = 0; range < count; ++range) {
        if (sums[static_cast<size_t>(range)] != ranges[range].sum) return false;
    }
    return true;
}

} // namespace pando
