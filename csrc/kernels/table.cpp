#include "leaves.hpp"

namespace pando {
namespace PANDO_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {
    norm,           rope,   heads, blend, activation, attention_scratch, attend, attention_merge,
    sample_scratch, sample, scan,  mask,  logprob,
};

} // namespace PANDO_LEVEL
} // namespace pando
