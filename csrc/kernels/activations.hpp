// Gated activations, act(gate) * up, of one vector: the kinds of Activation in kernels.hpp.
#pragma once

#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

struct Silu {
    static vf of(vf gate, vf up) { return gate * vsigmoid(gate) * up; }
};

struct GeluTanh {
    static vf of(vf gate, vf up) {
        const vf inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        return 0.5f * gate * (1.0f + vtanh(inner)) * up;
    }
};

struct Gelu {
    static vf of(vf gate, vf up) {
        vf error;
        for (int i = 0; i < W; ++i) error[i] = erff(gate[i] * 0.7071067811865476f);
        return 0.5f * gate * (1.0f + error) * up;
    }
};

struct Relu2 {
    static vf of(vf gate, vf up) {
        const vf positive = vmax(vf{}, gate);
        return positive * positive * up;
    }
};

struct SwigluOai {
    static vf of(vf gate, vf up) {
        gate = vmin(splat(7.0f), gate);
        up = vmin(splat(7.0f), vmax(splat(-7.0f), up));
        return gate * vsigmoid(1.702f * gate) * (up + 1.0f);
    }
};

} // namespace PANDO_LEVEL
} // namespace pando
