// The instruction-set levels compiled into this module, and which of them this processor runs.
#pragma once

#include "kernels.hpp"

namespace pando {

constexpr int NUM_LEVELS = 4; // portable, avx2, avx512, avx512_bf16: each includes the ones before

const char* level_name(int level);

// Why the level can not be used here; empty if it can.
const char* level_obstacle(int level);

// The level's leaves. Throws std::invalid_argument if it can not be used.
const Kernels& level_kernels(int level);

} // namespace pando
