// What programs do between products: float32 arithmetic between one load and one rounding store.
#include "mixing.hpp"
#include "activations.hpp"
#include "leaves.hpp"
#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

template <class T>
const T* row_of(const char* data, int64_t row, int64_t stride) {
    return reinterpret_cast<const T*>(data) + row * stride;
}
template <class T>
T* row_of(char* data, int64_t row, int64_t stride) {
    return reinterpret_cast<T*>(data) + row * stride;
}

// each(i, count) over a row, whole vectors and then its tail.
template <class Each>
void pieces(int64_t n, const Each& each) {
    for (int64_t i = 0; i < n; i += W) each(i, smaller(W, n - i));
}

template <class T>
vf take(const T* p, int64_t count) {
    return count == W ? load(p) : load_first(p, count);
}
template <class T>
void put(T* p, vf x, int64_t count) {
    if (count == W) {
        store(p, x);
    } else {
        store_first(p, x, count);
    }
}

template <class T>
void normalize_group(const NormalizeArgs& args, const T* x, T* out, const float* weight, const float* bias) {
    const int64_t n = args.size;
    float mean = 0.0f;
    if (args.centered) {
        vf total{};
        pieces(n, [&](int64_t i, int64_t count) { total += take(x + i, count); });
        mean = sum(total) / static_cast<float>(n);
    }
    vf squares{};
    pieces(n, [&](int64_t i, int64_t count) {
        vf v = take(x + i, count) - mean;
        for (int64_t lane = count; lane < W; ++lane) v[lane] = 0.0f;
        squares += v * v;
    });
    const float scale = 1.0f / sqrtf(sum(squares) / static_cast<float>(n) + args.eps);
    pieces(n, [&](int64_t i, int64_t count) {
        vf v = (take(x + i, count) - mean) * scale;
        if (weight != nullptr) v = v * take(weight + i, count);
        if (bias != nullptr) v = v + take(bias + i, count);
        put(out + i, v, count);
    });
}

template <class T>
void normalize_rows(const NormalizeArgs& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(args.x, row, args.x_stride);
        T* out = row_of<T>(args.out, row, args.out_stride);
        for (int64_t group = 0; group < args.groups; ++group) {
            const int64_t at = group * args.weight_stride;
            normalize_group(args, x + group * args.size, out + group * args.size,
                            args.weight == nullptr ? nullptr : args.weight + at,
                            args.bias == nullptr ? nullptr : args.bias + at);
        }
    }
}

vf modulated(Modulation kind, vf in, vf out) {
    const vf one = splat(1.0f);
    switch (kind) {
    case Modulation::silu: return Silu::of(in, one);
    case Modulation::gelu_tanh: return GeluTanh::of(in, one);
    case Modulation::gelu: return Gelu::of(in, one);
    case Modulation::relu2: return Relu2::of(in, one);
    case Modulation::times_sigmoid: return out * vsigmoid(in);
    }
    return out;
}

template <class T>
void modulate_rows(const ModulateArgs& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* in = row_of<T>(args.in, row, args.in_stride);
        T* out = row_of<T>(args.out, row, args.out_stride);
        const vf same = splat(load_first(in, 1)[0]);
        pieces(args.size, [&](int64_t i, int64_t count) {
            const vf x = args.in_step == 0 ? same : take(in + i, count);
            put(out + i, modulated(args.kind, x, take(out + i, count)), count);
        });
    }
}

template <class T>
void gated_norm_group(const GatedNormArgs& args, T* y, const T* z, const float* weight) {
    const auto gate = [&](int64_t i, int64_t count) {
        const vf v = take(z + i, count);
        return v * vsigmoid(v);
    };
    const auto value = [&](int64_t i, int64_t count) {
        const vf v = take(y + i, count);
        return args.gate_first ? v * gate(i, count) : v;
    };
    if (weight == nullptr) {
        pieces(args.size, [&](int64_t i, int64_t n) { put(y + i, take(y + i, n) * gate(i, n), n); });
        return;
    }
    vf squares{};
    pieces(args.size, [&](int64_t i, int64_t n) {
        const vf v = value(i, n);
        squares += v * v;
    });
    const float scale = 1.0f / sqrtf(sum(squares) / static_cast<float>(args.size) + args.eps);
    pieces(args.size, [&](int64_t i, int64_t n) {
        const vf v = value(i, n) * scale * take(weight + i, n);
        put(y + i, args.gate_first ? v : v * gate(i, n), n);
    });
}

template <class T>
void gated_norm_rows(const GatedNormArgs& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        T* y = row_of<T>(args.y, row, args.y_stride);
        const T* z = row_of<T>(args.z, row, args.z_stride);
        for (int64_t group = 0; group < args.groups; ++group) {
            const float* weight = args.weight == nullptr ? nullptr : args.weight + group * args.weight_stride;
            gated_norm_group(args, y + group * args.size, z + group * args.size, weight);
        }
    }
}

float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

template <class T>
void gate_rows(const GatesArgs& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(args.x, row, args.x_stride);
        float* out = args.out + row * args.size;
        pieces(args.size, [&](int64_t i, int64_t count) {
            const vf v = take(x + i, count);
            if (args.bias == nullptr) {
                store_first(out + i, vsigmoid(v), count);
                return;
            }
            for (int64_t lane = 0; lane < count; ++lane) {
                float soft = softplus(v[lane] + args.bias[i + lane]);
                soft = soft < args.low ? args.low : soft > args.high ? args.high : soft;
                out[i + lane] = args.rate == nullptr ? soft : args.rate[i + lane] * soft;
            }
        });
    }
}

// The largest `k` of n by value, the lower index first among equals; chosen ones are struck out of `from`.
void take_best(float* from, int64_t n, int64_t k, int64_t* best) {
    for (int64_t taken = 0; taken < k; ++taken) {
        int64_t top = -1;
        for (int64_t i = 0; i < n; ++i) {
            if (from[i] == from[i] && (top < 0 || from[i] > from[top])) top = i;
        }
        best[taken] = top < 0 ? 0 : top; // all are NaN: any will do
        if (top >= 0) from[top] = __builtin_nanf("");
    }
}

void keep_top_groups(const RouteShape& shape, float* choice) {
    const int64_t size = shape.experts / shape.groups;
    float total[MAX_ROUTED], copy[MAX_ROUTED];
    int64_t best[MAX_ROUTED];
    bool kept[MAX_ROUTED];
    for (int64_t group = 0; group < shape.groups; ++group) {
        memcpy(copy, choice + group * size, static_cast<size_t>(size) * 4);
        take_best(copy, size, shape.group_scores, best);
        total[group] = 0.0f;
        for (int64_t i = 0; i < shape.group_scores; ++i) total[group] += choice[group * size + best[i]];
        kept[group] = false;
    }
    take_best(total, shape.groups, shape.top_groups, best);
    for (int64_t i = 0; i < shape.top_groups; ++i) kept[best[i]] = true;
    for (int64_t i = 0; i < shape.experts; ++i) {
        if (!kept[i / size]) choice[i] = -__builtin_inff();
    }
}

// exp(x - max) in place, normalised to a sum of 1.
void soften(float* x, int64_t n) {
    float top = x[0], total = 0.0f;
    for (int64_t i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
    for (int64_t i = 0; i < n; ++i) total += x[i] = expf(x[i] - top);
    for (int64_t i = 0; i < n; ++i) x[i] /= total;
}

template <class T>
void route_rows(const RouteArgs& args, int64_t begin, int64_t end) {
    const RouteShape& shape = args.shape;
    const int64_t n = shape.experts;
    float score[MAX_ROUTED], choice[MAX_ROUTED];
    for (int64_t row = begin; row < end; ++row) {
        const T* logits = row_of<T>(args.logits, row, n);
        pieces(n, [&](int64_t i, int64_t count) {
            const vf v = take(logits + i, count);
            store_first(score + i, shape.score == Score::sigmoid ? 1.0f / (1.0f + vexp(-v)) : v, count);
        });
        if (shape.score == Score::softmax) soften(score, n);
        for (int64_t i = 0; i < n; ++i)
            choice[i] = score[i] + (shape.correction == nullptr ? 0.0f : shape.correction[i]);
        if (shape.groups > 1) keep_top_groups(shape, choice);
        int64_t* ids = args.ids + row * shape.top_k;
        float* weights = args.weights + row * shape.top_k;
        take_best(choice, n, shape.top_k, ids);
        float total = 0.0f;
        for (int64_t i = 0; i < shape.top_k; ++i) total += weights[i] = score[ids[i]];
        if (shape.score == Score::softmax_after_topk) {
            soften(weights, shape.top_k);
            continue;
        }
        for (int64_t i = 0; i < shape.top_k; ++i) {
            weights[i] = (shape.renormalise ? weights[i] / total : weights[i]) * shape.scale;
        }
    }
}

} // namespace

void normalize(const NormalizeArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return normalize_rows<float>(args, begin, end);
    case DType::bf16: return normalize_rows<bf16>(args, begin, end);
    case DType::f16: return normalize_rows<f16>(args, begin, end);
    }
}

void modulate(const ModulateArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return modulate_rows<float>(args, begin, end);
    case DType::bf16: return modulate_rows<bf16>(args, begin, end);
    case DType::f16: return modulate_rows<f16>(args, begin, end);
    }
}

void gated_norm(const GatedNormArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return gated_norm_rows<float>(args, begin, end);
    case DType::bf16: return gated_norm_rows<bf16>(args, begin, end);
    case DType::f16: return gated_norm_rows<f16>(args, begin, end);
    }
}

void gates(const GatesArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return gate_rows<float>(args, begin, end);
    case DType::bf16: return gate_rows<bf16>(args, begin, end);
    case DType::f16: return gate_rows<f16>(args, begin, end);
    }
}

void route(const RouteArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return route_rows<float>(args, begin, end);
    case DType::bf16: return route_rows<bf16>(args, begin, end);
    case DType::f16: return route_rows<f16>(args, begin, end);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
