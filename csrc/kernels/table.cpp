#include "leaves.hpp"

namespace pando {
namespace PANDO_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {
    norm,
    rope,
    heads,
    blend,
    activation,
    attention_scratch,
    attend,
    attention_merge,
    sample_scratch,
    sample,
    scan,
    mask,
    logprob,
    // gemm_float.cpp
    {float_takes, float_row_bytes, float_prepare, float_scratch, float_multiply},
    combine,
    // limits.cpp
    burn,
    read_through,
};

} // namespace PANDO_LEVEL
} // namespace pando
