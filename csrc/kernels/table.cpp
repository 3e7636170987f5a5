#include "leaves.hpp"

namespace pando {
namespace PANDO_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {
    norm,
    rope,
    heads,
    round_kv,
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
    // mixing.cpp
    normalize,
    modulate,
    gated_norm,
    gates,
    route,
    // recurrent_conv.cpp, recurrent_delta.cpp, recurrent_space.cpp
    conv,
    delta_scratch,
    delta,
    space_scratch,
    space,
    selective_scratch,
    selective,
    // gemm_float.cpp
    {float_takes, float_row_bytes, float_prepare, float_scratch, float_multiply},
    combine,
    // gemm_int.cpp
    {int_takes, int_row_bytes, int_prepare, int_scratch, int_multiply},
    // rounding.cpp
    round_row,
    // limits.cpp
    burn,
    read_through,
};

} // namespace PANDO_LEVEL
} // namespace pando
