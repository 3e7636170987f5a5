// A checksum of packed weights on disk: as fast as memory is read, on all threads.
//
// It finds damage, not malice: a changed, missing or moved byte changes the sum. The sum of a range is the sum (modulo
// 2^64) over its chunks of CHECKSUM_CHUNK bytes, each mixed with its place, so that a long range can be summed piece by
// piece.
#pragma once

#include <cstdint>

namespace pando {

constexpr int64_t CHECKSUM_CHUNK = 1 << 20;

// first_chunk: number of chunks before `data`.
uint64_t checksum(const char* data, int64_t bytes, int64_t first_chunk);

struct ChecksumRange {
    int64_t offset, bytes;
    uint64_t sum;
};

// Whether every range of a file in memory has its sum.
bool has_checksums(const char* file, const ChecksumRange* ranges, int64_t count);

} // namespace pando
