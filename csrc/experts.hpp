// The experts of one mixture, as Python hands them over.
#pragma once

#include "linear.hpp"

#include <vector>

namespace pando {

struct PackedExperts {
    std::vector<PackedWeight> gate_up, down;
};

} // namespace pando
