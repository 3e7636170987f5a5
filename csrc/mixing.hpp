// Small steps between a layer's products that only programs take: arguments of their leaves (kernels/mixing.cpp).
#pragma once

#include "kernels.hpp"

namespace pando {

// Groups of `size` neighbouring elements of each row, each normalised by itself; out may be x. Strides are of rows.
struct NormalizeArgs {
    DType dtype;
    const char* x;
    char* out;
    int64_t x_stride, out_stride, groups, size;
    const float* weight;   // null: 1
    const float* bias;     // null: 0
    int64_t weight_stride; // between groups; 0: all have the same
    float eps;
    bool centered; // layer norm; else RMS
};

// Order shared with pando.kernels.cpu_program.
enum class Modulation : int { silu = 0, gelu_tanh = 1, gelu = 2, relu2 = 3, times_sigmoid = 4 };

// out = f(in), or out * sigmoid(in). in_step 0: one element of a row serves all of it.
struct ModulateArgs {
    DType dtype;
    Modulation kind;
    const char* in;
    char* out;
    int64_t in_stride, in_step, out_stride, size;
};

// y = norm(y) * silu(z), or norm(y * silu(z)) where the gate comes first; without a weight y * silu(z).
struct GatedNormArgs {
    DType dtype;
    char* y;
    const char* z;
    int64_t y_stride, z_stride, groups, size;
    const float* weight;
    int64_t weight_stride;
    float eps;
    bool gate_first;
};

// out[row][i] = rate[i] * clamp(softplus(x[row][i] + bias[i])), contiguous; sigmoid(x[row][i]) without a bias.
struct GatesArgs {
    DType dtype;
    const char* x;
    int64_t x_stride, size;
    const float* rate; // null: 1
    const float* bias;
    float low, high;
    float* out;
};

// How a mixture chooses; pando.layers.moe.route has the meaning.
enum class Score : int { softmax_after_topk = 0, sigmoid = 1, softmax = 2 };

constexpr int64_t MAX_ROUTED = 1024; // experts

struct RouteShape {
    int64_t experts, top_k;
    Score score;
    const float* correction; // may be null
    int64_t groups, top_groups, group_scores;
    bool renormalise;
    float scale;
};

struct RouteArgs {
    DType dtype;
    const char* logits; // contiguous
    RouteShape shape;
    int64_t* ids;
    float* weights;
};

} // namespace pando
