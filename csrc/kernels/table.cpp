#include "leaves.hpp"

namespace pando {
namespace PANDO_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {
    norm, rope, activation, attention_scratch, attend, attention_merge, sample_scratch, sample, logprob,
    // gemm_int.cpp
    {int_takes, int_row_bytes, int_prepare, int_scratch, int_multiply},
};

} // namespace PANDO_LEVEL
} // namespace pando
